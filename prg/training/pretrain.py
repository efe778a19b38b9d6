"""Pretraining: a velocity network from images without labels, by flow matching."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prg.console import is_main_process
from prg.encoder import Encoder
from prg.images.augmentation import augment, normalise
from prg.images.held_out import hold_out
from prg.images.sets import Images
from prg.machine import choose_device, training_precision
from prg.paths import PATHS, Path, flow_matching_loss
from prg.recipe import Image, Recipe
from prg.training import figures
from prg.training.fitted import fit_if_enough
from prg.training.loop import (
    Batch,
    Job,
    Loss,
    Prepare,
    is_complete,
    not_begun,
    step_generator,
    steps_of,
    train,
)
from prg.training.run import Run
from prg.unet import UNet

VALIDATION_BATCH = 256
VALIDATION_DRAW = 2**40
"""Far past any step's number, so that validation shares no random numbers with training."""
BACKEND: str | Callable[..., Any] = "inductor"
"""Of torch.compile."""


def pretrain(run: Run) -> None:
    """Train the run's network, or go on with it, and draw what it learned."""
    recipe = run.recipe
    config = recipe.pretrain
    device = choose_device()
    images, held_out = hold_out(run.training_images().unlabelled(), recipe.data.validation)
    torch.manual_seed(recipe.seed)
    net = UNet(recipe.unet)
    if config.compile:
        compile_network(net)
    precision = training_precision(config.precision, device)
    trained = not_begun(images, steps_of(config, len(images)), precision, device)
    job = Job(
        facts=run.first_facts("pretrain", trained, images, None),
        model=net,
        prepare=pretraining_batch(recipe),
        loss=flow_loss(PATHS[recipe.encoder.path]),
        validate=lambda net: {"validation_loss": validation_loss(net, recipe, held_out)},
        images=images,
        config=config,
        seed=recipe.seed,
        checkpoint=run.pretrained,
        device=device,
        begun=run.remember,
        fit=lambda net: fit_if_enough(Encoder(net, recipe.encoder), recipe, images),  # type: ignore[arg-type]
    )
    drawn = is_complete(job.checkpoint) and (job.folder / "trajectory.png").exists()
    trainer = train(job)
    if drawn or not is_main_process():
        return
    with trainer.averaged():
        encoder = Encoder(net, recipe.encoder)
        figures.loss_curve(job.folder)
        figures.samples(encoder, recipe.image, recipe.seed, job.folder / "samples.png")
        figures.trajectory(encoder, recipe.image, images.pixels[:6], job.folder / "trajectory.png")


def compile_network(net: UNet) -> None:
    """torch.compile both ways through the network, in place, so that its weights keep their names.

    Asked for by the recipe, not probed: whether a minute of compiling is worth it depends on the length of the run.
    """
    net.compile(backend=BACKEND)
    net.activations = torch.compile(net.activations, backend=BACKEND)  # type: ignore[method-assign]


def pretraining_batch(recipe: Recipe) -> Prepare:
    """(data, noise, t): t uniform on (0, t_start), noise drawn anew for each image and paired by the path."""
    path, image, augmentations = PATHS[recipe.encoder.path], recipe.image, recipe.pretrain.augment

    def prepare(pixels: Tensor, _: Tensor | None, generator: torch.Generator) -> Batch:
        return draw(augment(pixels, augmentations, generator), image, path, generator)

    return prepare


def draw(pixels: Tensor, image: Image, path: Path, generator: torch.Generator) -> Batch:
    """(data, noise, t) of these images."""
    data = normalise(pixels, image.mean, image.std)
    noise = torch.randn(data.shape, generator=generator, device=data.device)
    t = torch.rand(len(data), generator=generator, device=data.device) * path.t_start
    return data, path.couple(noise, data), t


def flow_loss(path: Path) -> Loss:
    """Flow matching on the path."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        data, noise, t = batch
        return flow_matching_loss(net, path, data, noise, t)

    return loss


def validation_loss(net: nn.Module, recipe: Recipe, images: Images) -> float:
    """The same loss on images held out, with the same noise and times at every call."""
    path = PATHS[recipe.encoder.path]
    device = next(net.parameters()).device
    total = 0.0
    for start in range(0, len(images), VALIDATION_BATCH):
        pixels = torch.from_numpy(images.pixels[start : start + VALIDATION_BATCH]).to(device)
        generator = step_generator(recipe.seed, VALIDATION_DRAW + start, device)
        data, noise, t = draw(pixels, recipe.image, path, generator)
        total += flow_matching_loss(net, path, data, noise, t).item() * len(data)
    return total / len(images)
