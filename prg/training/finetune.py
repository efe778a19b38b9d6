"""Fine-tuning: encoder and head together, through the reverse ODE."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prg.checkpoint import CheckpointError, load_checkpoint, load_strictly, read_facts
from prg.classifier import Classifier
from prg.encoder import Encoder
from prg.paths import PATHS, flow_matching_loss
from prg.recipe import Recipe
from prg.training import figures, processes
from prg.training.augmentation import augment, mix, normalise
from prg.training.compiled import compile_network
from prg.training.data import Images, check_held_back
from prg.training.frozen import fit_head
from prg.training.initial import load_initial
from prg.training.loop import Batch, Job, Loss, Prepare, train
from prg.training.pretrain import draw
from prg.training.run import Run, choose_device
from prg.unet import UNet

VALIDATION_BATCH = 256
SHOWN = 10
"""Classes that are named when a training begins."""


def finetune(run: Run, init: Path | None = None) -> None:
    """Train the run's classifier, or go on with it.

    init: the checkpoint or entry to begin from; by default the run's own pretraining.
    """
    run.check_trained_here(run.finetuned)
    images, held_back = run.training_images()
    job = finetuning_job(run, init or run.pretrained, images, held_back)
    run.check_test_images()
    if processes.writes():
        print(described(images, held_back), file=sys.stderr)
    if run.recipe.finetune.freeze:
        processes.told(lambda: fit_head(job, run.recipe, held_back))  # minutes, for one alone
        return
    train(job)
    if processes.writes():
        figures.loss_curve(job.folder)


def check(run: Run, init: Path | None) -> None:
    """Raise what would stand against the fine-tuning, as far as it is known without decoding an image."""
    if run.recipe.data.source:
        run.check_classes()
    if init or run.pretrained.exists():
        load_initial(UNet(run.recipe.unet), run.recipe, init or run.pretrained)


def described(images: Images, held_back: Images) -> str:
    """What is trained on, for a person to see before hours are spent."""
    names = [*images.classes[:SHOWN], *(["…"] if len(images.classes) > SHOWN else [])]
    return (
        f"{len(images):,} images to train on and {len(held_back):,} held back to choose by; "
        f"{len(images.classes)} classes: {', '.join(names)}"
    )


def finetuning_job(run: Run, init: Path, images: Images, held_back: Images) -> Job:
    """Everything that defines the fine-tuning of a run. Raises CheckpointError, EntryError, DataError."""
    recipe = run.recipe
    run.check_classes()
    check_held_back(images, held_back)
    torch.manual_seed(recipe.seed)
    model = build_classifier(recipe, len(images.classes))
    if not init.exists() and run.finetuned.is_file():
        if init != run.pretrained:
            raise CheckpointError(
                f"{init}: no such checkpoint; what was begun from it goes on without --init"
            )
        begun = read_facts(run.finetuned)
        origin: dict[str, Any] = {k: begun[k] for k in ("init", "pretraining") if k in begun}
    else:
        origin = load_initial(model.encoder.net, recipe, init)
        run.check_held_back_before(origin["init"]["seen"], init)
    if recipe.finetune.compile:
        compile_network(model.encoder.net)
    return Job(
        kind="finetune",
        model=model,
        prepare=finetuning_batch(recipe, len(images.classes)),
        loss=finetuning_loss(recipe),
        validate=lambda m: validation_figures(m, recipe, held_back),
        images=images,
        config=recipe.finetune,
        seed=recipe.seed + 1,
        settings=run.settings(images, "encoder", "finetune") | {"init": origin["init"]["sha256"]},
        folder=run.folder / "finetune",
        device=choose_device(),
        begun=run.remember,
        facts={"classes": list(images.classes), **origin},
    )


def build_classifier(recipe: Recipe, classes: int) -> Classifier:
    """The recipe's classifier with fresh weights."""
    encoder = Encoder(UNet(recipe.unet), recipe.encoder, save_memory=recipe.finetune.save_memory)
    return Classifier(encoder, recipe.head(classes))


def load_finetuned(run: Run) -> tuple[Classifier, dict[str, Any]]:
    """The run's fine-tuned classifier (averaged weights) and the facts of its checkpoint."""
    saved = load_checkpoint(run.finetuned, "finetune")
    run.check(saved.facts, run.finetuned, "network", "image", "encoder", "finetune")
    model = build_classifier(run.recipe, len(saved.facts["classes"]))
    load_strictly(model, saved.part("average"), run.finetuned)
    return model, saved.facts


def finetuning_batch(recipe: Recipe, classes: int) -> Prepare:
    """(images, targets, levels), one of the recipe's levels for each image; with beta, then (data, noise, t).

    Targets are class numbers [B], or each class's share [B, K] where images are mixed.
    """
    config, path = recipe.finetune, PATHS[recipe.encoder.path]

    def prepare(pixels: Tensor, labels: Tensor | None, generator: torch.Generator) -> Batch:
        assert labels is not None
        pixels = augment(pixels, config.augment, generator)
        x = normalise(pixels, recipe.image.mean, recipe.image.std)
        levels = torch.tensor(config.t_end, device=x.device)
        drawn = torch.randint(len(levels), (len(x),), generator=generator, device=x.device)
        flow = draw(pixels, recipe, path, generator) if config.beta else ()
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
    """Cross-entropy and top-1 on images held back, at the default level."""
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
