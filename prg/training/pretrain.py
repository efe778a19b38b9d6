"""Pretraining: a velocity network from images without labels, by flow matching."""

import torch
from torch import Tensor, nn

from prg.paths import PATHS, Path, flow_matching_loss
from prg.recipe import Recipe
from prg.training import figures, processes
from prg.training.augmentation import augment, normalise
from prg.training.compiled import compile_network
from prg.training.data import Images
from prg.training.loop import Batch, Job, Loss, Prepare, step_generator, train
from prg.training.run import Run, choose_device
from prg.unet import UNet

VALIDATION_BATCH = 256
VALIDATION_DRAW = 2**40
"""Far past any step's number, so that validation shares no random numbers with training."""


def pretrain(run: Run) -> None:
    """Train the run's network, or go on with it, and draw what it learned."""
    job = pretraining_job(run)
    trainer = train(job)
    if not processes.writes():
        return
    with trainer.averaged() as net:
        assert isinstance(net, UNet)
        figures.loss_curve(job.folder)
        figures.samples(net, run.recipe, job.folder / "samples.png")
        figures.trajectory(net, run.recipe, job.images.pixels[:6], job.folder / "trajectory.png")


def pretraining_job(run: Run) -> Job:
    """Everything that defines the pretraining of a run."""
    recipe = run.recipe
    run.check_trained_here(run.pretrained)
    images, held_back = run.training_images()
    torch.manual_seed(recipe.seed)
    net = UNet(recipe.unet)
    if recipe.pretrain.compile:
        compile_network(net)
    return Job(
        kind="pretrain",
        model=net,
        prepare=pretraining_batch(recipe),
        loss=pretraining_loss(recipe),
        validate=lambda net: {"validation_loss": validation_loss(net, recipe, held_back)},
        images=images,
        config=recipe.pretrain,
        seed=recipe.seed,
        settings=run.settings(images, "encoder", "pretrain"),
        folder=run.folder / "pretrain",
        device=choose_device(),
        begun=run.remember,
        facts={},
    )


def pretraining_batch(recipe: Recipe) -> Prepare:
    """(data, noise, t): t uniform on (0, t_start), noise drawn anew for each image and paired by the path."""
    path = PATHS[recipe.encoder.path]

    def prepare(pixels: Tensor, _: Tensor | None, generator: torch.Generator) -> Batch:
        return draw(augment(pixels, recipe.pretrain.augment, generator), recipe, path, generator)

    return prepare


def draw(pixels: Tensor, recipe: Recipe, path: Path, generator: torch.Generator) -> Batch:
    """(data, noise, t) of these images."""
    data = normalise(pixels, recipe.image.mean, recipe.image.std)
    noise = torch.randn(data.shape, generator=generator, device=data.device)
    t = torch.rand(len(data), generator=generator, device=data.device) * path.t_start
    return data, path.couple(noise, data), t


def pretraining_loss(recipe: Recipe) -> Loss:
    """Flow matching on the recipe's path."""
    path = PATHS[recipe.encoder.path]

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        data, noise, t = batch
        return flow_matching_loss(net, path, data, noise, t)

    return loss


def validation_loss(net: nn.Module, recipe: Recipe, images: Images) -> float:
    """The same loss on images held back, with the same noise and times at every call."""
    path = PATHS[recipe.encoder.path]
    device = next(net.parameters()).device
    total = 0.0
    for start in range(0, len(images), VALIDATION_BATCH):
        pixels = torch.from_numpy(images.pixels[start : start + VALIDATION_BATCH]).to(device)
        generator = step_generator(recipe.seed, VALIDATION_DRAW + start, device)
        data, noise, t = draw(pixels, recipe, path, generator)
        total += flow_matching_loss(net, path, data, noise, t).item() * len(data)
    return total / len(images)
