"""Fine-tuning: encoder and head together, through the reverse ODE; or a head on the frozen encoder."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prg.classifier import Classifier
from prg.console import is_main_process, note
from prg.errors import CheckpointError
from prg.images.augmentation import augment, mix, normalise
from prg.images.held_out import hold_out, never_trained_on
from prg.images.sets import Images
from prg.machine import choose_device, training_precision
from prg.paths import PATHS, flow_matching_loss
from prg.recipe import Recipe
from prg.trained import build_classifier
from prg.training import figures, processes
from prg.training.fitted import fit_if_enough
from prg.training.frozen import fit_head
from prg.training.loop import Batch, Job, Loss, Prepare, is_complete, not_begun, steps_of, train
from prg.training.pretrain import compile_network, draw
from prg.training.run import Run
from prg.training.start import Start, load_start
from prg.unet import UNet

VALIDATION_BATCH = 256
SHOWN = 10
"""Classes that are named when a training begins."""


def finetune(run: Run, init: Path | None = None) -> None:
    """Train the run's classifier, or go on with it.

    init: the checkpoint or entry to begin from; by default the run's own pretraining. Raises CheckpointError,
    EntryError, DataError.
    """
    recipe = run.recipe
    config = recipe.finetune
    torch.manual_seed(recipe.seed)
    net, start = begin(run, init)
    images = run.labelled_images()
    model = build_classifier(net, recipe, len(images.classes))
    device = choose_device()
    if config.freeze:
        trained = not_begun(images, 1, "fp32", device)
        facts = run.first_facts("finetune", trained, images, start)
        projection = start.projection_for(model.encoder, recipe.serve.t_end) if start else None
        if start and start.fitted.projection and not projection:
            note(
                "another solve or level than that of --init: the embedding is fitted anew, and is not comparable"
            )
        processes.on_main_process(lambda: fit_head(run, model, images, facts, device, projection))
        return
    before = start.held_out if start and run.evaluated == run.sources[0] else None
    images, held_out = hold_out(images, recipe.data.validation, before=before)
    unseen = never_trained_on(held_out, start.held_out) if start else held_out
    precision = training_precision(config.precision, device)
    announce(images, held_out)
    if config.compile:
        compile_network(net)
    trained = not_begun(images, steps_of(config, len(images)), precision, device)
    job = Job(
        facts=run.first_facts("finetune", trained, images, start),
        model=model,
        prepare=finetuning_batch(recipe, len(images.classes)),
        loss=finetuning_loss(recipe),
        validate=lambda m: validation_figures(m, recipe, held_out),
        images=images,
        config=config,
        seed=recipe.seed + 1,
        checkpoint=run.finetuned,
        device=device,
        begun=run.remember,
        fit=lambda m: fit_if_enough(m.encoder, recipe, images, m.head, unseen),  # type: ignore[arg-type]
    )
    drawn = is_complete(job.checkpoint) and (job.folder / "curves.png").exists()
    train(job)
    if is_main_process() and not drawn:
        figures.loss_curve(job.folder)


def begin(run: Run, init: Path | None) -> tuple[UNet, Start | None]:
    """The network that the fine-tuning begins with, and where it is from; None where it goes on by its own checkpoint.

    Raises CheckpointError, EntryError.
    """
    recipe = run.recipe
    if not run.finetuned.is_file() or (init and init.exists()):
        return load_start(init or run.pretrained, recipe.network, recipe.image, recipe.encoder.path)
    if init:
        raise CheckpointError(f"{init}: no such checkpoint; what was begun from it goes on without --init")
    return UNet(recipe.unet), None


def announce(images: Images, held_out: Images) -> None:
    """Show what is trained on before hours are spent."""
    names = [*images.classes[:SHOWN], *(["…"] if len(images.classes) > SHOWN else [])]
    if is_main_process():
        print(
            f"{len(images):,} images to train on and {len(held_out):,} held out to choose by; "
            f"{len(images.classes)} classes: {', '.join(names)}",
            file=sys.stderr,
        )


def finetuning_batch(recipe: Recipe, classes: int) -> Prepare:
    """(images, targets, levels), one of the recipe's levels for each image; with beta, then (data, noise, t).

    Targets are class numbers [B], or each class's share [B, K] where images are mixed.
    """
    config, image, path = recipe.finetune, recipe.image, PATHS[recipe.encoder.path]

    def prepare(pixels: Tensor, labels: Tensor | None, generator: torch.Generator) -> Batch:
        assert labels is not None
        pixels = augment(pixels, config.augment, generator)
        x = normalise(pixels, image.mean, image.std)
        levels = torch.tensor(config.t_end, device=x.device)
        drawn = torch.randint(len(levels), (len(x),), generator=generator, device=x.device)
        flow = draw(pixels, image, path, generator) if config.beta else ()
        if config.mixup or config.cutmix:
            x, labels = mix(x, labels, classes, config.mixup, config.cutmix, generator)
        return x, labels, levels[drawn], *flow

    return prepare


def finetuning_loss(recipe: Recipe) -> Loss:
    """Label-smoothed cross-entropy of the logits, plus beta times flow matching on the same images, unmixed."""
    config, path = recipe.finetune, PATHS[recipe.encoder.path]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Classifier)
        x, targets, levels, *flow = batch
        _, _, logits = model(x, levels)
        total = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        if config.beta:
            data, noise, t = flow
            total = total + config.beta * flow_matching_loss(model.encoder.net, path, data, noise, t)
        return total

    return loss


def validation_figures(model: nn.Module, recipe: Recipe, images: Images) -> dict[str, float]:
    """Cross-entropy and top-1 on images held out, at the default level."""
    assert images.labels is not None
    device = next(model.parameters()).device
    total, right = 0.0, 0
    for start in range(0, len(images), VALIDATION_BATCH):
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels[start : start + VALIDATION_BATCH]))
        labels = torch.from_numpy(images.labels[start : start + VALIDATION_BATCH]).to(device)
        x = normalise(pixels.to(device), recipe.image.mean, recipe.image.std)
        _, _, logits = model(x, torch.full((len(x),), recipe.finetune.t_end[0], device=device))
        total += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return {"validation_loss": total / len(images), "validation_top1": right / len(images)}
