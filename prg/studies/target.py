"""A run or an entry as the subject of a study, with the images that go with it."""

import json
from pathlib import Path

from entry.config import EntryError
from prg.recipe import load_recipe
from prg.studies.subject import Material, Subject
from prg.training.data import DataError, Images, hold_out, load_split, splits
from prg.training.publish import Stage, publish
from prg.training.run import Run, choose_split, open_run

VALIDATION, SEED = 0.1, 0
"""What is held back from the training split where an entry does not say what was."""


def open_target(
    target: Path,
    stage: Stage,
    scratch: Path,
    data: str | None = None,
    split: str | None = None,
    version: str | None = None,
    judge: Path | None = None,
) -> tuple[Subject, Material]:
    """The subject and its material; of a run, its model of that stage is exported to `scratch` first.

    Raises EntryError for an entry that names no images, and whatever reading either raises.
    """
    judging = None if judge is None else Subject(judge)
    if (target / "recipe.json").is_file():
        override = [f"data.source={json.dumps(data)}"] if data else []
        run = open_run(target, load_recipe(str(target / "recipe.json"), override) if data else None)
        publish(run, stage, scratch / "run", "fp32", compact=False)
        subject = Subject(scratch / "run", name=f"{target.resolve().name} ({stage})")
        return subject, of_run(run, split, judging or subject)
    subject = Subject(target, version)
    if not data:
        raise EntryError(f"{target}: say with --data which images to study it on")
    return subject, of_entry(subject, data, split, scratch, judging or subject)


def of_run(run: Run, split: str | None, judge: Subject) -> Material:
    """The run's own images."""
    return Material(
        Path(run.recipe.data.source).name, run.training_images, lambda: run.test_images(split), judge
    )


def of_entry(subject: Subject, data: str, split: str | None, cache: Path, judge: Subject) -> Material:
    """Images named by `data`; held back is what the entry says was held back, if it says so."""
    found = splits(data)
    name, spec = Path(data).name, subject.prg.image

    def training() -> tuple[Images, Images]:
        if "train" not in found:
            raise DataError(f"{data}: no split 'train' (there are: {', '.join(found)})")
        images = load_split(found["train"], spec, cache)
        return hold_out(images, *_held_back(subject, len(images)))

    def test() -> tuple[str, Images]:
        chosen = choose_split(found, split or "", data)
        if chosen is None:
            raise DataError(f"{data}: no split test or validation; name one with --split")
        return f"{name}/{chosen}", load_split(found[chosen], spec, cache)

    return Material(name, training, test, judge)


def _held_back(subject: Subject, count: int) -> tuple[float, int]:
    """(share, seed) of the images that the entry's own training was not given."""
    training = subject.prg.versions[subject.version].training
    stage = training.get("pretrain", training.get("finetune"))
    if not isinstance(stage, dict) or not 0 < stage.get("images", 0) < count:
        return VALIDATION, SEED
    return 1 - stage["images"] / count, stage["seed"]
