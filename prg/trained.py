"""A checkpoint as an extractor: averaged weights, and what was fitted to them."""

from pathlib import Path

from torch import Tensor

from prg.checkpoint import Facts, load_checkpoint, load_strictly
from prg.classifier import Classifier
from prg.encoder import Encoder
from prg.extractor import Extractor, Projection
from prg.recipe import Recipe
from prg.unet import UNet


def build_classifier(net: UNet, recipe: Recipe, classes: int) -> Classifier:
    """The recipe's classifier around the network, its head with fresh weights."""
    encoder = Encoder(net, recipe.encoder, save_memory=recipe.finetune.save_memory)
    return Classifier(encoder, recipe.head(classes))


def load_trained(checkpoint: Path) -> tuple[Extractor, Facts]:
    """The extractor of a pretraining or a fine-tuning, and the facts. Raises CheckpointError."""
    saved = load_checkpoint(checkpoint)
    recipe, facts = saved.facts.recipe, saved.facts
    net = UNet(recipe.unet)
    projection = projection_of(saved.tensors)
    if facts.stage == "pretrain":
        load_strictly(net, saved.part("average"), checkpoint)
        return Extractor(Encoder(net, recipe.encoder), recipe.image.spec, projection), facts
    model = build_classifier(net, recipe, len(facts.classes))
    load_strictly(model, saved.part("average"), checkpoint)
    return Extractor(model.encoder, recipe.image.spec, projection, model.head), facts


def projection_of(tensors: dict[str, Tensor]) -> Projection | None:
    """What was fitted, from a checkpoint's or a module's tensors; None where nothing was."""
    if "projection.mean" not in tensors:
        return None
    return Projection(
        *(tensors[f"projection.{name}"] for name in ("mean", "inverse_std", "directions", "scale"))
    )


def fitted_tensors(projection: Projection | None) -> dict[str, Tensor]:
    """The same as tensors by name, as a checkpoint holds them."""
    return {f"projection.{k}": v for k, v in projection.state_dict().items()} if projection else {}
