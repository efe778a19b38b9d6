"""A run or an entry as the subject of a study, with the images that go with it."""

from pathlib import Path

from entry.config import EntryError
from prg.checkpoint import CheckpointError
from prg.recipe import load_recipe
from prg.studies.subject import Material, Subject
from prg.training.data import Images, load_split
from prg.training.held_back import never_seen, told_by_entry
from prg.training.publish import publish
from prg.training.run import Run, Stage, choose_split, demand_test, open_run
from prg.training.sources import splits

VALIDATION, SEED = 0.1, 0
"""What is held back from the training split where an entry does not say what was."""


def open_target(
    target: Path,
    stage: Stage,
    scratch: Path,
    data: str | None = None,
    skip_unreadable: bool = False,
    split: str | None = None,
    version: str | None = None,
    judge: Path | None = None,
) -> tuple[Subject, Material]:
    """The subject and its material; of a run, its model of that stage is exported to `scratch` first.

    Raises EntryError for an entry that names no images, and whatever reading either raises.
    """
    judging = None if judge is None else Subject(judge)
    if (target / "recipe.json").is_file():
        given = ({"source": data} if data else {}) | ({"skip_unreadable": True} if skip_unreadable else {})
        run = open_run(target, load_recipe(str(target / "recipe.json"), given={"data": given}))
        if stage == "pretrain" and not run.pretrained.exists() and run.finetuned.exists():
            raise CheckpointError(
                f"{target}: was not pretrained here; study its fine-tuned model, by --stage finetune"
            )
        publish(run, stage, scratch / "run", "fp32", compact=False)
        subject = Subject(scratch / "run", name=f"{target.resolve().name} ({stage})")
        return subject, of_run(run, stage, split, judging or subject)
    subject = Subject(target, version)
    if not data:
        raise EntryError(f"{target}: say with --data which images to study it on")
    return subject, of_entry(subject, data, skip_unreadable, split, scratch, judging or subject)


def of_run(run: Run, stage: Stage, split: str | None, judge: Subject) -> Material:
    """The run's own images."""
    return Material(
        Path(run.recipe.data.source).name,
        lambda: run.judged_images(stage),
        lambda: run.test_images(split, stage),
        judge,
    )


def of_entry(
    subject: Subject, data: str, skip_unreadable: bool, split: str | None, cache: Path, judge: Subject
) -> Material:
    """Images named by `data`; held back is what the entry says was held back, if it says so."""
    found = splits(data)
    name, spec = Path(data).name, subject.prg.image

    def training() -> tuple[Images, Images]:
        chosen = choose_split(found, "train", data)
        images = load_split(found[chosen], spec, cache, skip_unreadable)
        told = told_by_entry(subject.prg.versions[subject.version].training)
        return never_seen(images, told, subject.name, f"{name}/{chosen}", VALIDATION, SEED)

    def test() -> tuple[str, Images]:
        chosen = demand_test(found, split or "", data)
        return f"{name}/{chosen}", load_split(found[chosen], spec, cache, skip_unreadable)

    return Material(name, training, test, judge)
