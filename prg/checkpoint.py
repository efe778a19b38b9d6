"""Checkpoints: one safetensors file that holds tensors and, as its JSON header, typed facts about them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entry.config import Calibration
from prg.errors import CheckpointError
from prg.machine import Precision
from prg.recipe import Recipe, Section

FORMAT = "3"
AGAIN = "train again, in a new folder"
Stage = Literal["pretrain", "finetune"]


class Trained(Section):
    """What was trained on, and how far."""

    images: int
    digest: str
    """Of the images and, where they are learned, their labels."""
    step: int
    steps: int
    """Of the whole training: done where `step` is as many."""
    seconds: float
    precision: Precision
    device: str
    torch: str


class CrossValidated(Section):
    """A head with one penalty by stratified cross-validation: means over the folds."""

    penalty: float
    folds: int
    loss: float
    """Cross-entropy, in nats."""
    top1: float
    spread: float
    """Standard deviation of top1 over the folds."""


class FittedOn(Section):
    """What the projection to EMBEDDING was fitted to."""

    images: int
    t_end: float


class Imported(Section):
    """A file that others trained."""

    origin: str
    """Whose file it is."""
    file: str
    sha256: str
    version: str
    """Whatever the file says of its own version or epoch."""


class Facts(Section):
    """Everything in a checkpoint that is no tensor. In a file every key is there, whatever has a default here."""

    stage: Stage
    recipe: Recipe
    """Without the place of its images."""
    trained: Trained | None = None
    """None for an import."""
    imported: Imported | None = None
    classes: tuple[str, ...] = ()
    """Of the head; empty without one."""
    init: str = ""
    """SHA-256 of what the weights began from; empty for random ones."""
    held_out: float | None = None
    """The smallest share that was held out by any training behind these weights, this one included; 0 where one
    held none out, None where it is not known (an import)."""
    trained_on: tuple[tuple[str, ...], ...] = ()
    """Keys of some images of each training behind these weights, this one included
    (`prg.images.sets.Images.kept_keys`)."""
    history: tuple[str, ...] = ()
    """The trainings that these weights began from, oldest first, a line each for people."""
    cross_validated: CrossValidated | None = None
    """Of a head on a frozen encoder."""
    fitted_on: FittedOn | None = None
    """Of the projection to EMBEDDING; None without one."""
    calibration: Calibration | None = None
    """Of a head, on images that it was not trained on."""

    @property
    def complete(self) -> bool:
        """Whether the training behind it has ended."""
        return self.trained is None or self.trained.step >= self.trained.steps

    def summary(self) -> str:
        """The training in a line, for the history of what begins from it."""
        if self.imported is not None:
            origin = self.imported
            return f"import: {origin.origin} {origin.version}, {origin.file} (sha256 {origin.sha256[:12]})"
        assert self.trained is not None
        section = self.recipe.pretrain if self.stage == "pretrain" else self.recipe.finetune
        done = f"{section.epochs:g} epochs, {self.trained.step:,} steps"
        if self.cross_validated is not None:
            done = f"a linear head on the frozen encoder, penalty {self.cross_validated.penalty:g}"
        return (
            f"{self.stage}: {self.trained.images:,} images, {done}, {self.trained.seconds / 3600:.3f} hours in "
            f"{self.trained.precision} on {self.trained.device}"
        )

    def identity(self) -> dict[str, Any]:
        """What a training that goes on from this checkpoint must have in common with it, as plain JSON.

        Of the recipe what the stage depends on; not which files would have been refused.
        """
        recipe = self.recipe.model_dump(mode="json")
        for key in ("source", "image_column", "label_column", "skip_unreadable", "enlarge"):
            del recipe["data"][key]
        sections = ("seed", "network", "image", "data", "encoder", self.stage)
        trained = None if self.trained is None else self.trained.model_dump(include={"images", "digest"})
        return {k: recipe[k] for k in sections} | {
            "serve": {"t_end": recipe["serve"]["t_end"]},
            "trained": trained,
            "classes": list(self.classes),
            "init": self.init,
        }


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the facts about them."""

    tensors: dict[str, Tensor]
    facts: Facts

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix.`, the prefix removed."""
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: whatever interrupts this, `path` holds either the old checkpoint or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    try:
        save_file(tensors, temporary, {"format": FORMAT, "prg": checkpoint.facts.model_dump_json()})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # what a full disk is, to its writer
            kept = "; the checkpoint before it is kept" if path.exists() else ""
            raise CheckpointError(f"{path}: could not be written ({error}){kept}") from None
        raise


def read_facts(path: Path) -> Facts:
    """The facts of a checkpoint, without its tensors. Raises CheckpointError for a file that is none."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; make it with `prg {path.parent.name}`, or name another one"
            if path.parent.name in ("pretrain", "finetune")
            else f"{path}: no such checkpoint; name one that `prg pretrain` or `prg finetune` made"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it can't be used"
        ) from None
    if "prg" not in header:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint written by prg")
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: written in format {header['format']}, this prg reads {FORMAT}; {AGAIN}"
        )
    try:
        facts = Facts.model_validate_json(header["prg"])
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError(f"{path}: written by another version of prg ({reason}); {AGAIN}") from None
    # A key that is missing would have got its default, which nobody trained by. Where the images were is no such key.
    saved, now = json.loads(header["prg"]), facts.model_dump(mode="json")
    saved["recipe"]["data"] = {"image_column": "", "label_column": ""} | saved["recipe"].get("data", {})
    if missing := differences(saved, now):
        raise CheckpointError(f"{path}: written by another version of prg ({'; '.join(missing)}); {AGAIN}")
    return facts


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError if it is missing or unreadable."""
    facts = read_facts(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    return Checkpoint(tensors, facts)


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights; every name and shape must match. Raises CheckpointError that shows the first differences."""
    own = module.state_dict()
    problems = [f"{k}: missing" for k in own if k not in tensors]
    problems += [f"{k}: not in this network" for k in tensors if k not in own]
    problems += [
        f"{k}: {tuple(tensors[k].shape)} in the file, {tuple(v.shape)} in the network"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: made for another network ({'; '.join(problems[:3])}{more}); "
            "use the recipe that the checkpoint was made with"
        )
    module.load_state_dict(tensors)


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two tables, key by key."""
    out = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key, "absent"), now.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return out
