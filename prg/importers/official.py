"""Checkpoints of the official PRG release: a pretrained network, or a network fine-tuned with its head."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prg.errors import CheckpointError
from prg.images.splits import splits
from prg.importers.imported import Imported, read_tensors
from prg.recipe import Recipe
from prg.unet import time_embedding

WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel and torch.compile put into names."""
NETWORK = "model.backbone.unet."
ENCODER = "grlEncoder.diffusionModel.model." + NETWORK
HEAD = "grlHead."
ACCEPTED = (
    f"a checkpoint of the release's pretraining (tensors {NETWORK}…) or of its fine-tuning "
    f"({ENCODER}… and {HEAD}classifier.…), saved as {{'model': …}}"
)


def import_official(path: Path, recipe: Recipe) -> Imported:
    """Read a checkpoint `*_{epoch}.pt` of the release. The recipe says what the file does not: network, path,
    solve, normalisation, class names.

    Raises CheckpointError for any other file, or a recipe that can't be of this one.
    """
    saved = read_tensors(path)
    tensors = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise CheckpointError(f"{path}: holds {_content(saved)}; accepted is {ACCEPTED}")
    tensors = {_unwrapped(k): v for k, v in tensors.items()}
    parts = {p: _part(tensors, p) for p in (NETWORK, ENCODER, HEAD)}
    whole = sum(len(part) for part in parts.values()) == len(tensors)
    if not whole or bool(parts[NETWORK]) == bool(parts[ENCODER]) or bool(parts[ENCODER]) != bool(parts[HEAD]):
        raise CheckpointError(f"{path}: holds {_content(tensors)}; accepted is {ACCEPTED}")
    if recipe.encoder.path == "vp":
        raise CheckpointError(f"{path}: encoder.path = 'vp', but the release has icfm, otcfm and gvp alone")
    net = parts[NETWORK] or parts[ENCODER]
    if recipe.encoder.path == "gvp":
        net = turn_time(net)
    imported = Imported(recipe, path, "official PRG release", f"epoch {saved.get('iteration')}", net)
    if not parts[HEAD]:
        return imported
    return replace(imported, head=parts[HEAD], classes=_classes(parts[HEAD], recipe, path))


def turn_time(net: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that were trained on s = 1 - t and answer dx/ds, as weights of our convention: -net(x, 1 - t).

    The embedding of 1 - t is a rotation of that of t, frequency by frequency,
    cos(f - ft) = cos f cos ft + sin f sin ft and sin(f - ft) = sin f cos ft - cos f sin ft,
    which the linear layer after it can do; the last convolution turns the sign.
    """
    key = "time_embed.0.weight"
    if key not in net or net[key].ndim != 2 or not net[key].is_floating_point():
        return net  # made for another network; loading it will say so
    of_cos, of_sin = net[key].double().chunk(2, dim=1)
    cos, sin = time_embedding(torch.ones(1), net[key].shape[1]).double().chunk(2, dim=1)  # cos f, sin f
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).float()
    return net | {key: turned} | {k: -v for k, v in net.items() if k.startswith("out.2.")}


def _classes(head: dict[str, Tensor], recipe: Recipe, path: Path) -> tuple[str, ...]:
    """The names of the head's classes: the recipe's, or else those of its images."""
    if (recipe.finetune.head_input, recipe.finetune.head) != (("state",), "mlp"):
        raise CheckpointError(
            f"{path}: has the official head, an mlp of the state; "
            "say --set finetune.head_input=state --set finetune.head=mlp"
        )
    last = head.get("classifier.3.weight")
    count = 0 if last is None or not last.ndim else len(last)
    names = recipe.data.labels
    if not names and recipe.data.source:
        data = recipe.data
        found = splits(data.source, data.image_column, data.label_column)
        names = next((s.classes for name, s in found.items() if name == data.train), ())
    if len(names) != count:
        raise CheckpointError(
            f"{path}: its head has {count} classes, the recipe names {len(names)}; "
            "name them in data.labels, or say with --data where the images are that it was trained on"
        )
    return names


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _content(saved: object) -> str:
    """What a file holds, in a few words."""
    if not isinstance(saved, dict):
        return f"an object of type {type(saved).__name__}"
    return f"a table of {', '.join(map(str, list(saved)[:5])) or 'nothing'}"
