"""Fine-tuning: encoder and head together, through the reverse ODE."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entry.config import sha256
from prg.checkpoint import CheckpointError, differences, load_checkpoint, load_strictly
from prg.classifier import Classifier
from prg.encoder import Encoder
from prg.recipe import Recipe, recipe_table
from prg.training import figures
from prg.training.augmentation import augment, normalise
from prg.training.data import DataError, Images
from prg.training.loop import Batch, Job, Loss, Prepare, train
from prg.training.run import Run, choose_device
from prg.unet import UNet

VALIDATION_BATCH = 256
PRETRAINED_FOR = ("network", "image")
"""Sections in which a fine-tuning must agree with the pretraining it begins from."""


def finetune(run: Run, init: Path | None = None) -> None:
    """Train the run's classifier, or go on with it.

    init: the pretraining checkpoint to begin from; by default the run's own.
    """
    job = finetuning_job(run, init or run.pretrained)
    train(job)
    figures.loss_curve(job.folder)


def finetuning_job(run: Run, init: Path) -> Job:
    """Everything that defines the fine-tuning of a run. Raises CheckpointError, DataError."""
    recipe = run.recipe
    run.check_trained_here(run.finetuned)
    images, held_back = run.training_images()
    if images.labels is None:
        raise DataError(
            f"{recipe.data.source}: no labels; fine-tuning needs one sub-folder of images a class"
        )
    run.check_classes(images, held_back)
    torch.manual_seed(recipe.seed)
    model = build_classifier(recipe, len(images.classes))
    pretrained = load_pretrained(model.encoder.net, recipe, init)
    return Job(
        kind="finetune",
        model=model,
        prepare=finetuning_batch(recipe),
        loss=finetuning_loss(recipe),
        validate=lambda m: validation_figures(m, recipe, held_back),
        images=images,
        config=recipe.finetune,
        seed=recipe.seed + 1,
        settings=run.settings(images, "encoder", "finetune") | {"init": pretrained["sha256"]},
        folder=run.folder / "finetune",
        device=choose_device(),
        begun=run.remember,
        facts={"classes": list(images.classes), "pretraining": pretrained},
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


def load_pretrained(net: UNet, recipe: Recipe, init: Path) -> dict[str, Any]:
    """The averaged pretrained weights into `net`; returns where they came from, for the record."""
    saved = load_checkpoint(init, "pretrain")
    table, then = recipe_table(recipe), saved.facts["settings"]
    changed = differences({k: then[k] for k in PRETRAINED_FOR}, {k: table[k] for k in PRETRAINED_FOR})
    if then["encoder"]["path"] != recipe.encoder.path:
        changed.append(f"encoder.path was {then['encoder']['path']!r}, is {recipe.encoder.path!r}")
    if changed:
        raise CheckpointError(f"{init}: pretrained with other settings ({'; '.join(changed)})")
    if saved.facts["step"] < saved.facts["steps"]:
        print(
            f"note: {init} is unfinished, step {saved.facts['step']} of {saved.facts['steps']}",
            file=sys.stderr,
        )
    load_strictly(net, saved.part("average"), init)
    told = ("step", "steps", "seconds", "precision", "device", "settings")
    return {k: saved.facts[k] for k in told} | {"sha256": sha256(init)}


def finetuning_batch(recipe: Recipe) -> Prepare:
    """(images, labels, levels): one of the recipe's levels is drawn for each image."""
    config = recipe.finetune

    def prepare(pixels: Tensor, labels: Tensor | None, generator: torch.Generator) -> Batch:
        assert labels is not None
        x = normalise(augment(pixels, config.augment, generator), recipe.image.mean, recipe.image.std)
        levels = torch.tensor(config.t_end, device=x.device)
        drawn = torch.randint(len(levels), (len(x),), generator=generator, device=x.device)
        return x, labels, levels[drawn]

    return prepare


def finetuning_loss(recipe: Recipe) -> Loss:
    """Label-smoothed cross-entropy of the logits."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, labels, levels = batch
        _, _, logits = model(x, levels)
        return F.cross_entropy(logits.float(), labels, label_smoothing=recipe.finetune.label_smoothing)

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
