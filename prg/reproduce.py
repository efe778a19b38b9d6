"""Reproduce: a recipe's whole experiment in one run folder; what is done of it already stays as it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entry.config import read_entry
from entry.files import sha256, write_atomically
from prg.errors import DataError
from prg.evaluation import evaluate, record
from prg.images.sets import Images
from prg.publish import publish
from prg.training import processes
from prg.training.finetune import finetune
from prg.training.loop import is_complete
from prg.training.pretrain import pretrain
from prg.training.run import Run


def reproduce(run: Run) -> Iterator[str]:
    """Pretrain, fine-tune, export to the run's `entry` and evaluate that; yields a line after each stage.

    Of several processes all train, and the main one does the rest. Raises whatever the stages raise,
    CheckpointError also where a checkpoint is of another recipe.
    """
    run.check_classes()
    if run.recipe.finetune.freeze and run.evaluated == run.sources[0]:
        raise DataError(
            f"{run.recipe.data.source}: no split to evaluate on, and a head on a frozen encoder is fitted to all "
            "images; add a test split, or use `prg finetune --freeze`, which cross-validates"
        )
    run.check_test_images()
    for stage, work in (("pretrain", pretrain), ("finetune", finetune)):
        done = is_complete(run.folder / stage / "checkpoint.safetensors")
        work(run)  # changes nothing where it is done, but refuses another recipe
        yield _line(stage, done)
    entry, answer = run.folder / "entry", run.folder / "evaluation.json"
    done = processes.on_main_process(lambda: is_exported(run.finetuned, entry))
    if not done:
        processes.on_main_process(lambda: publish(run, "finetune", entry, "fp32", compact=False))
    yield _line("export", done)
    name, images = run.material("finetune").evaluated()
    done = processes.on_main_process(lambda: bool(measured(answer, entry, name, images)))
    if not done:
        processes.on_main_process(lambda: measure(answer, entry, name, images))
    yield _line("evaluate", done)
    yield json.dumps(processes.on_main_process(lambda: measured(answer, entry, name, images)))


def _line(stage: str, done: bool) -> str:
    return f"{stage}: done{' already' if done else ''}"


def is_exported(checkpoint: Path, directory: Path) -> bool:
    """Whether the entry's highest version was made of this very checkpoint."""
    if not (directory / "config.pbtxt").is_file():
        return False
    entry = read_entry(directory)
    return entry.prg.versions[entry.default_version].training.get("checkpoint") == sha256(checkpoint)


def measure(path: Path, directory: Path, name: str, images: Images) -> None:
    """Evaluate the entry on images of that name; into the entry, and into `path` with what it was measured of."""
    evaluation = evaluate(directory, images, name)
    record(directory, evaluation)
    answer = {"accuracy": evaluation.accuracy.model_dump(), "of": _identity(directory, images)}
    write_atomically(path, (json.dumps(answer, indent=2) + "\n").encode())


def measured(path: Path, directory: Path, name: str, images: Images) -> dict[str, Any]:
    """What `measure` found, if it was of these very weights and images, and the entry says so; else nothing."""
    if not path.exists():
        return {}
    answer: dict[str, Any] = json.loads(path.read_text())
    entry = read_entry(directory)
    accuracies = [a.model_dump() for a in entry.prg.versions[entry.default_version].accuracy]
    accuracy: dict[str, Any] = answer["accuracy"]
    same = answer["of"] == _identity(directory, images) and accuracy["data"] == name
    return accuracy if same and accuracy in accuracies else {}


def _identity(directory: Path, images: Images) -> dict[str, Any]:
    entry = read_entry(directory)
    return {"weights": entry.prg.versions[entry.default_version].sha256, "images": images.digest}
