"""What is trained for the comparison: PRG with and without its parts, and a ResNet of the same FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.resnet import ResNet, width_of_flops
from prg.classifier import Classifier
from prg.encoder import pooled_state
from prg.recipe import Recipe
from prg.trained import build_classifier
from prg.training.costs import count_flops
from prg.training.start import load_start
from prg.unet import UNet


class Logits(nn.Module):
    """Any of the arms as images to logits: [B, 3, S, S] -> [B, K]."""

    def __init__(self, inner: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.through = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.inner, x)


def reversed_to(level: float) -> Callable[[Classifier, Tensor], Tensor]:
    """The whole: the reverse solve to `level`, then the head."""
    return lambda model, x: model(x, x.new_full((len(x),), level))[2]


def at_one(model: Classifier, x: Tensor) -> Tensor:
    """No solve: activations of the image itself at t = 1, and the pooled image as state."""
    encoder = model.encoder
    one = x.new_full((len(x),), encoder.t_start)
    hidden = encoder.hidden(x, one)
    return model.head(pooled_state(x), hidden)


@dataclass(frozen=True)
class Arm:
    """One way to a classifier that is trained."""

    title: str
    build: Callable[[Recipe, int, Path], Logits]
    """build(recipe, classes, pretrained entry) -> the model before training."""
    equal: Literal["flops", "images"] = "flops"
    """What it gets as much of as the whole of PRG: a cheaper arm sees more images for the same FLOPs."""


def prg_arm(title: str, pretrained: bool, reverse: bool, equal: Literal["flops", "images"] = "flops") -> Arm:
    """The recipe's own network and head."""

    def build(recipe: Recipe, classes: int, entry: Path) -> Logits:
        net = UNet(recipe.unet)
        if pretrained:
            net, _ = load_start(entry, recipe.network, recipe.image, recipe.encoder.path)
        model = build_classifier(net, recipe, classes)
        return Logits(model, reversed_to(recipe.finetune.t_end[0]) if reverse else at_one)

    return Arm(title, build, equal)


def resnet_arm(recipe: Recipe, classes: int, _: Path) -> Logits:
    """A ResNet of the FLOPs of the recipe's extraction."""
    whole = flops(Logits(build_classifier(UNet(recipe.unet), recipe, classes), reversed_to(0.5)), recipe)
    width = width_of_flops(whole, recipe.image.size, classes)
    return Logits(ResNet(width, classes), lambda model, x: model(x))


ARMS = {
    "resnet": Arm("ResNet of the same FLOPs", resnet_arm),
    "scratch": prg_arm("PRG's network and head, without pretraining", pretrained=False, reverse=True),
    "at-one": prg_arm("pretrained, no reverse solve (T_END = 1)", pretrained=True, reverse=False),
    "at-one-images": prg_arm(
        "the same, for as many images as PRG", pretrained=True, reverse=False, equal="images"
    ),
    "finetuned": prg_arm("PRG, fine-tuned", pretrained=True, reverse=True),
}


def flops(model: nn.Module, recipe: Recipe) -> int:
    """Of one image's logits."""
    x = torch.zeros(1, 3, recipe.image.size, recipe.image.size)
    with torch.no_grad():
        found = count_flops(model.eval(), x)
    model.train()
    return found
