"""A run or an entry as something to evaluate: its exported module, and the images that go with it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from entry.config import EntryError, read_entry
from prg.checkpoint import Stage
from prg.errors import CheckpointError
from prg.images.decoded import load_split
from prg.images.material import Material
from prg.images.splits import splits
from prg.publish import publish
from prg.recipe import Data, load_recipe
from prg.training.run import Run

AS_TRAINED = Data()
"""The images of a run as its own recipe has them."""


@dataclass(frozen=True)
class Target:
    """What is evaluated."""

    name: str
    entry: Path
    """Its folder."""
    exported: bool
    """Whether it is a run, exported for the time being."""
    version: str | None
    material: Material


def open_target(
    path: Path,
    stage: Stage,
    scratch: Path,
    data: Data = AS_TRAINED,
    version: str | None = None,
    seen: bool = False,
) -> Target:
    """A run, whose model of that stage is exported to `scratch`, or an entry.

    data: which images; of a run, what replaces keys of its recipe.
    Raises EntryError where it is neither, or an entry and no images are named; and whatever reading them raises.
    """
    if (path / "recipe.json").is_file():
        changed = data.model_dump(exclude_unset=True)
        run = Run(path, load_recipe(str(path / "recipe.json"), given={"data": changed}))
        return _run_target(run, stage, scratch / "run", seen)
    if not (path / "config.pbtxt").is_file():
        there = "no run and no entry" if path.is_dir() else "no such folder"
        raise EntryError(
            f"{path}: {there}; name the folder of a run, or of an entry such as model_repository/prg-cifar10"
        )
    entry = read_entry(path)
    if not data.source:
        raise EntryError(f"{path}: say with --data which images to evaluate it on")
    described = entry.prg.versions.get(version or entry.default_version)
    training = described.training if described else {}
    load = partial(load_split, spec=entry.prg.image, cache=scratch, skip_unreadable=data.skip_unreadable)
    return Target(
        entry.name,
        path,
        False,
        version,
        Material(
            source=data.source,
            found=splits(data.source, data.image_column, data.label_column),
            train=training.get("split", "train"),
            test="",
            held_out=described.held_out if described else None,
            trained_on=training.get("trained_on", ()),
            seen=seen,
            load=load,
        ),
    )


def _run_target(run: Run, stage: Stage, exported: Path, seen: bool) -> Target:
    if stage == "pretrain" and not run.pretrained.exists() and run.finetuned.exists():
        raise CheckpointError(
            f"{run.folder}: was not pretrained here; study its fine-tuned model, by --stage finetune"
        )
    publish(run, stage, exported, "fp32", compact=False)
    return Target(f"{run.folder.resolve().name} ({stage})", exported, True, None, run.material(stage, seen))
