"""Where a fine-tuning begins: the network of a pretraining, of another fine-tuning, or of an entry."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entry.config import check_weights, read_entry, sha256
from prg.checkpoint import CheckpointError, differences, load_checkpoint, load_strictly
from prg.recipe import Recipe, recipe_table
from prg.training.held_back import behind, told_by_entry
from prg.training.processes import note
from prg.unet import PRESETS, UNet, UNetConfig

PRETRAINED_FOR = ("network", "image")
"""Sections in which a fine-tuning must agree with the training it begins from."""
NET = "encoder.solver.velocity.net"
"""The network's name in a classifier; an entry's module puts `classifier.` before it where it has a head."""


def load_initial(net: UNet, recipe: Recipe, init: Path) -> dict[str, Any]:
    """The weights of `init` into `net`; returns where they came from, for the record.

    init: a checkpoint of `prg pretrain` or `prg finetune` (its averaged weights), or the folder of an entry
    (its highest version). Raises CheckpointError or EntryError where it is something else, of another network
    than the recipe's, of other image facts, or of another path.
    """
    if (init / "config.pbtxt").is_file():
        return _from_entry(net, recipe, init)
    _refuse_what_lies_beside(init)
    saved = load_checkpoint(init, ("pretrain", "finetune"))
    table, then = recipe_table(recipe), saved.facts["settings"]
    changed = differences({k: then[k] for k in PRETRAINED_FOR}, {k: table[k] for k in PRETRAINED_FOR})
    if then["encoder"]["path"] != recipe.encoder.path:
        changed.append(f"encoder.path was {then['encoder']['path']!r}, is {recipe.encoder.path!r}")
    if changed:
        raise CheckpointError(f"{init}: trained with other settings ({'; '.join(changed)})")
    if saved.facts["step"] < saved.facts["steps"]:
        done = f"step {saved.facts['step']} of {saved.facts['steps']}"
        note(f"{init} is unfinished, {done}")
    digest = sha256(init)
    begun = {"kind": saved.facts["kind"], "sha256": digest, "seen": behind(saved.facts)}
    if saved.facts["kind"] == "finetune":
        load_strictly(net, saved.part(f"average.{NET}"), init)
        earlier = {k: saved.facts[k] for k in ("pretraining",) if k in saved.facts}
        return earlier | {"init": begun}
    load_strictly(net, saved.part("average"), init)
    told = ("step", "steps", "seconds", "precision", "device", "settings")
    facts = {k: saved.facts[k] for k in told} | {"sha256": digest}
    return {"pretraining": facts, "init": begun}


def _refuse_what_lies_beside(init: Path) -> None:
    """Raise CheckpointError that names what was meant, where `init` is near it."""
    inside = [init / stage / "checkpoint.safetensors" for stage in ("pretrain", "finetune", ".")]
    checkpoints = [str(path) for path in inside if path.is_file()]
    if checkpoints:
        raise CheckpointError(f"{init}: a folder; name a checkpoint in it: {' or '.join(checkpoints)}")
    entries = [str(path.parent) for path in sorted(init.glob("*/config.pbtxt"))]
    if entries:
        raise CheckpointError(f"{init}: a folder of entries; name one: {' or '.join(entries)}")
    for entry in (init.parent, init.parent.parent):
        if (entry / "config.pbtxt").is_file():
            raise CheckpointError(f"{init}: a part of an entry; name the entry's folder: {entry}")


def _from_entry(net: UNet, recipe: Recipe, directory: Path) -> dict[str, Any]:
    entry = read_entry(directory)
    version = entry.default_version
    path = check_weights(directory, entry, version)
    there, here = entry.prg.image, recipe.image
    changed = [
        f"image.{key} is {getattr(there, key)} there, {getattr(here, key)} in the recipe"
        for key in ("size", "mean", "std")
        if getattr(there, key) != getattr(here, key)
    ]
    if entry.prg.path != recipe.encoder.path:
        changed.append(f"encoder.path is {entry.prg.path!r} there, {recipe.encoder.path!r} in the recipe")
    if changed:
        raise CheckpointError(
            f"{directory}: its network takes something else than the recipe's ({'; '.join(changed)}); "
            "change the recipe, such as by --set"
        )
    module = torch.jit.load(str(path), map_location="cpu")
    prefix = f"classifier.{NET}." if entry.has_head else f"{NET}."
    weights: dict[str, Tensor] = {
        k.removeprefix(prefix): v.float() for k, v in module.state_dict().items() if k.startswith(prefix)
    }
    try:
        load_strictly(net, weights, path)
    except CheckpointError as error:
        shapes = {k: v.shape for k, v in weights.items()}
        fitting = [name for name, config in PRESETS.items() if shapes_of(config) == shapes]
        if not fitting:
            raise error
        raise CheckpointError(
            f"{directory}: its network is {fitting[0]}, the recipe's is another: --set network={fitting[0]}"
        ) from None
    origin = {"kind": "entry", "entry": entry.name, "version": version, "sha256": sha256(path)}
    training = entry.prg.versions[version].training
    return {"init": origin | {"training": training, "seen": told_by_entry(training)}}


def shapes_of(config: UNetConfig) -> dict[str, torch.Size]:
    """Names and shapes of such a network's weights; nothing is computed."""
    with torch.device("meta"):
        return {k: v.shape for k, v in UNet(config).state_dict().items()}
