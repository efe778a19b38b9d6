"""A run or an entry as the subject of a study, with the images that go with it."""

import sys
from pathlib import Path

from entry.config import EntryError
from prg.recipe import load_recipe
from prg.studies.subject import Material, Subject
from prg.training.data import Images, as_dealt, hold_out, load_split
from prg.training.publish import Stage, publish
from prg.training.run import Run, choose_split, choose_test, open_run
from prg.training.sources import DataError, splits

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
        publish(run, stage, scratch / "run", "fp32", compact=False)
        subject = Subject(scratch / "run", name=f"{target.resolve().name} ({stage})")
        return subject, of_run(run, split, judging or subject)
    subject = Subject(target, version)
    if not data:
        raise EntryError(f"{target}: say with --data which images to study it on")
    return subject, of_entry(subject, data, skip_unreadable, split, scratch, judging or subject)


def of_run(run: Run, split: str | None, judge: Subject) -> Material:
    """The run's own images."""
    return Material(
        Path(run.recipe.data.source).name, run.judged_images, lambda: run.test_images(split), judge
    )


def of_entry(
    subject: Subject, data: str, skip_unreadable: bool, split: str | None, cache: Path, judge: Subject
) -> Material:
    """Images named by `data`; held back is what the entry says was held back, if it says so."""
    found = splits(data)
    name, spec = Path(data).name, subject.prg.image

    def training() -> tuple[Images, Images]:
        images = load_split(found[choose_split(found, "train", data)], spec, cache, skip_unreadable)
        return _dealt(subject, images, name)

    def test() -> tuple[str, Images]:
        chosen = choose_test(found, split or "", data)
        if chosen is None:
            raise DataError(f"{data}: no split test or validation; name one with --split")
        return f"{name}/{chosen}", load_split(found[chosen], spec, cache, skip_unreadable)

    return Material(name, training, test, judge)


def _dealt(subject: Subject, images: Images, name: str) -> tuple[Images, Images]:
    """(training, held back) as the entry's own training had them; by a share of our own where it saw others.

    Raises DataError where these are nearly its images, so that it can't be told which it saw.
    """
    training = subject.prg.versions[subject.version].training
    told = [training.get(kind) for kind in ("pretrain", "finetune")]
    records = [record for record in told if isinstance(record, dict) and "images" in record]
    count = len(images)
    found: dict[tuple[int, int], tuple[Images, Images]] = {}
    for record in records:
        dealt = as_dealt(images, {"validation": 1 - record["images"] / count} | record)
        if dealt:
            found[record["images"], record["seed"]] = dealt
    if len(found) > 1:
        raise DataError(
            f"{subject.name}: was pretrained and fine-tuned on different shares of as many images "
            f"({' and '.join(str(n) for n, _ in sorted(found))} of {count}): it can't be told which were held back"
        )
    if found:
        return next(iter(found.values()))
    exact = [record for record in records if "digest" in record]
    if any(count - round(count * record["validation"]) == record["images"] for record in exact):
        raise DataError(
            f"{name}: {count} images, as many as {subject.name} was trained on, but not the same: "
            "which were held back from it can't be told"
        )
    if exact:
        print(
            f"note: {subject.name} was trained on other images than {name}; should it have seen some of these, "
            "what is judged by them is too good",
            file=sys.stderr,
        )
    return hold_out(images, VALIDATION, SEED)
