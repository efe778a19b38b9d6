"""Checkpoints: one safetensors file that holds tensors and, as its JSON header, everything else."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken or of another kind; the message names the path and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and plain facts: kind (pretrain or finetune), recipe, step, precision, …"""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

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
        save_file(tensors, temporary, {"format": FORMAT, "prg": json.dumps(checkpoint.facts)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # what a full disk is, to its writer
            kept = "; the checkpoint before it is kept" if path.exists() else ""
            raise CheckpointError(f"{path}: could not be written ({error}){kept}") from None
        raise


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, without its tensors. Raises CheckpointError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it can't be used"
        ) from None
    if header.get("format") != FORMAT or "prg" not in header:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint written by prg")
    facts: dict[str, Any] = json.loads(header["prg"])
    return facts


def load_checkpoint(
    path: Path, kind: str | tuple[str, ...], device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a checkpoint of that kind, or one of them.

    Raises CheckpointError if it is missing, unreadable or of another kind.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; make it with `prg {kinds[0]}`, or name another one"
        )
    facts = read_facts(path)
    if facts["kind"] not in kinds:
        needed = " or ".join(f"`prg {k}`" for k in kinds)
        raise CheckpointError(
            f"{path}: a checkpoint of `prg {facts['kind']}`, where one of {needed} is needed"
        )
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
    """What differs between two recipes, key by key."""
    out = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return out
