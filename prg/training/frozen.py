"""Fine-tuning with a frozen encoder: features once, then the head fitted to all of them at once."""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prg.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from prg.classifier import Classifier, Head
from prg.recipe import Recipe
from prg.training.augmentation import normalise
from prg.training.data import Images
from prg.training.loop import Job, device_name, refuse_other_settings
from prg.training.progress import track

FEATURE_BATCH = 128
ITERATIONS = 200
"""Of L-BFGS, at most; it ends earlier where the loss no longer falls."""


View = tuple[float, bool]
"""(level, whether mirrored)."""


@dataclass(frozen=True)
class Labelled:
    """Features of labelled images, as often as there are levels and mirror images."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N]


@dataclass(frozen=True)
class Fit:
    """A head fitted with one penalty, and how good it is on the validation images."""

    penalty: float
    weights: dict[str, Tensor]
    figures: dict[str, float]


def fit_head(job: Job, recipe: Recipe, held_back: Images) -> None:
    """Fit the job's head, the encoder as it is; writes the checkpoint that a training would have written.

    Every penalty of the recipe is tried, and the one of least cross-entropy on the validation images is kept.
    Does nothing where the checkpoint is there. Raises CheckpointError where it is one of other settings.
    """
    if job.checkpoint.exists():
        saved = load_checkpoint(job.checkpoint, "finetune")
        refuse_other_settings(job, saved.facts)
        return
    job.begun()
    job.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = job.model.to(job.device).eval().requires_grad_(False)
    assert isinstance(model, Classifier)
    train = labelled(model, job, recipe, job.images, views(recipe))
    validation = labelled(model, job, recipe, held_back, views(recipe)[:1])
    standardise(model.head, train.features)
    begin = {k: v.clone() for k, v in model.head.state_dict().items()}
    fits = []
    for penalty in recipe.finetune.penalties:
        model.head.load_state_dict(begin)
        fits.append(fit(model.head, penalty, train, validation, recipe.finetune.label_smoothing))
        shown = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in fits[-1].figures.items())
        print(f"penalty {penalty:g}: {shown}", file=sys.stderr)
    best = min(fits, key=lambda f: f.figures["validation_loss"])
    print(f"chosen: penalty {best.penalty:g}, of the least loss on the images held back", file=sys.stderr)
    model.head.load_state_dict(best.weights)
    rows = [{"step": i, "penalty": f.penalty, **f.figures} for i, f in enumerate(fits, 1)]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tensors = {f"{part}.{k}": v for part in ("model", "average") for k, v in model.state_dict().items()}
    facts = {
        "kind": "finetune",
        "settings": job.settings,
        "step": 1,
        "steps": 1,
        "precision": "fp32",
        "seconds": round(time.monotonic() - started, 1),
        "torch": torch.__version__,
        "device": device_name(job.device),
        "penalty": best.penalty,
        **job.facts,
    }
    # Twice the same tensors, which safetensors refuses to write as one.
    copies = {k: v.clone() if k.startswith("average.") else v for k, v in tensors.items()}
    save_checkpoint(job.checkpoint, Checkpoint(copies, facts))


def views(recipe: Recipe) -> list[View]:
    """How the encoder sees each training image: at each level, and there mirrored too; the plain first one first."""
    ways = (False, True) if "flip" in recipe.finetune.augment else (False,)
    return [(level, mirrored) for level in recipe.finetune.t_end for mirrored in ways]


def labelled(model: Classifier, job: Job, recipe: Recipe, images: Images, seen: list[View]) -> Labelled:
    """What the head reads of these images; computed once and kept in the job's folder."""
    assert images.labels is not None
    told = [
        job.facts["init"]["sha256"],
        recipe.network,
        *map(str, (recipe.image, recipe.encoder, model.input)),
    ]
    digest = hashlib.sha256(json.dumps([*told, seen]).encode())
    digest.update(np.ascontiguousarray(images.pixels).data)
    path = job.folder / f"features-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        found = compute(model, recipe, images, seen, job.device)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, found)
        os.replace(temporary, path)
    features = torch.from_numpy(np.load(path)).to(job.device)  # [V, N, D]
    labels = torch.from_numpy(images.labels).to(job.device).repeat(len(features))
    return Labelled(features.flatten(0, 1), labels)


@torch.no_grad()
def compute(
    model: Classifier,
    recipe: Recipe,
    images: Images,
    seen: list[View],
    device: torch.device,
) -> np.ndarray:
    """Features float32 [V, N, D]: one row of images for each view."""
    parts: list[list[np.ndarray]] = [[] for _ in seen]
    with track("features", len(images) * len(seen)) as bar:
        for start in range(0, len(images), FEATURE_BATCH):
            block = np.ascontiguousarray(images.pixels[start : start + FEATURE_BATCH])
            x = normalise(torch.from_numpy(block).to(device), recipe.image.mean, recipe.image.std)
            for part, (level, mirror) in zip(parts, seen, strict=True):
                state, hidden = model.encoder(x.flip(3) if mirror else x, x.new_full((len(x),), level))
                part.append(model.head_input(state, hidden).float().cpu().numpy())
                bar.advance(len(x))
    return np.stack([np.concatenate(part) for part in parts])


def standardise(head: Head, features: Tensor) -> None:
    """Set the head's LayerNorm so that each of its outputs has mean 0 and variance 1 over the training images.

    The fit is then well conditioned, and one penalty means the same for every feature.
    """
    norm = head.classifier[0]
    assert isinstance(norm, nn.LayerNorm)
    plain = F.layer_norm(features, norm.normalized_shape, eps=norm.eps)
    mean, std = plain.mean(0), plain.std(0, correction=0).clamp(min=1e-4)
    norm.weight.copy_(1 / std)
    norm.bias.copy_(-mean / std)


def fit(head: Head, penalty: float, train: Labelled, validation: Labelled, smoothing: float) -> Fit:
    """Minimise cross-entropy + penalty / 2 x squared norm of the head's matrices, by L-BFGS on all images."""
    head.classifier[1:].requires_grad_(True)
    params = [p for p in head.parameters() if p.requires_grad]
    optimiser = torch.optim.LBFGS(
        params, max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(train.features), train.labels, label_smoothing=smoothing)
        loss = loss + penalty / 2 * torch.stack([p.square().sum() for p in params if p.dim() > 1]).sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    with torch.no_grad():
        loss = float(F.cross_entropy(head(train.features), train.labels))
        logits = head(validation.features)
        figures = {
            "loss": loss,
            "validation_loss": float(F.cross_entropy(logits, validation.labels)),
            "validation_top1": float((logits.argmax(1) == validation.labels).float().mean()),
        }
    head.requires_grad_(False)
    if not math.isfinite(loss):
        raise FloatingPointError(f"finetune: the loss is {loss} with penalty {penalty:g}; leave it out")
    return Fit(penalty, {k: v.clone() for k, v in head.state_dict().items()}, figures)
