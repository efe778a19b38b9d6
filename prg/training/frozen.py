"""A linear head on a frozen encoder: features once, the penalty by cross-validation, then one fit to all images.

On features that are computed once a linear head is a convex problem: L-BFGS on all images needs no learning rate,
schedule or number of epochs. Only the penalty is chosen, and no label is spent on holding out.
"""

import hashlib
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entry.files import atomic_file, write_atomically
from prg.checkpoint import Checkpoint, CrossValidated, Facts, read_facts, save_checkpoint
from prg.classifier import Classifier, Head
from prg.console import track
from prg.errors import DataError
from prg.images.augmentation import normalise
from prg.images.sets import Images
from prg.logistic import fit_logistic, stratified_folds
from prg.recipe import Finetune
from prg.training.loop import check_continues
from prg.training.run import Run

FEATURE_BATCH = 128
FOLDS = 5

View = tuple[float, bool]
"""(level, whether mirrored)."""


def fit_head(run: Run, model: Classifier, images: Images, facts: Facts, device: torch.device) -> None:
    """Fit the head to all images, the encoder as it is; writes the checkpoint that a training would have written.

    Does nothing where the checkpoint is there. Raises CheckpointError where it is one of other settings, DataError
    for a class of one image.
    """
    config, image, path = run.recipe.finetune, run.recipe.image, run.finetuned
    if done := path.exists():
        check_continues(read_facts(path), facts, path)
    _check_counts(images)
    run.remember()
    if done:
        return
    assert images.labels is not None
    # By key, so that the head is the same whatever the order of the files.
    order = np.argsort(images.keys, kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = model.to(device).eval().requires_grad_(False)
    seen = views(config)
    cache = path.parent / f"features-{_digest(facts, images, seen)}.npy"
    if not cache.exists():
        computed = compute(model, image.mean, image.std, images.pixels[order], seen, device)
        with atomic_file(cache) as file:
            np.save(file, computed)
    features = torch.from_numpy(np.load(cache)).to(device)  # [V, N, D]
    standardise(model.head, features.flatten(0, 1))
    labels = torch.from_numpy(images.labels[order]).to(device)
    x = model.head.classifier[0](features)
    found = cross_validate(x, labels, len(images.classes), config, run.recipe.seed)
    lines = (json.dumps({"step": step, **one.model_dump()}) + "\n" for step, one in enumerate(found, 1))
    write_atomically(path.parent / "metrics.jsonl", "".join(lines).encode())
    chosen = min(found, key=lambda one: one.loss)
    print(f"chosen: penalty {chosen.penalty:g}, of the least cross-entropy", file=sys.stderr)
    weight, bias = fit_logistic(
        x.flatten(0, 1), labels.repeat(len(x)), len(images.classes), chosen.penalty, config.label_smoothing
    )
    linear = model.head.classifier[1]
    linear.load_state_dict({"weight": weight, "bias": bias})
    assert facts.trained is not None
    trained = facts.trained.model_copy(update={"step": 1, "seconds": round(time.monotonic() - started, 1)})
    facts = facts.model_copy(update={"trained": trained, "cross_validated": chosen})
    save_checkpoint(path, Checkpoint({f"average.{k}": v for k, v in model.state_dict().items()}, facts))


def views(config: Finetune) -> list[View]:
    """How the encoder sees each training image: at each level, and there mirrored too; the plain first one first."""
    ways = (False, True) if "flip" in config.augment else (False,)
    return [(level, mirrored) for level in config.t_end for mirrored in ways]


def cross_validate(
    x: Tensor, labels: Tensor, classes: int, config: Finetune, seed: int
) -> list[CrossValidated]:
    """Each of the penalties on features x [V, N, D] and labels [N].

    An image's views are all in one fold; the plain view alone is evaluated.
    """
    found = []
    for penalty in config.penalties:
        losses, top1 = [], []
        for held in stratified_folds(labels.cpu().numpy(), FOLDS, seed):
            rest, out = torch.from_numpy(~held).to(x.device), torch.from_numpy(held).to(x.device)
            weight, bias = fit_logistic(
                x[:, rest].flatten(0, 1),
                labels[rest].repeat(len(x)),
                classes,
                penalty,
                config.label_smoothing,
            )
            logits = F.linear(x[0, out], weight, bias)
            losses.append(float(F.cross_entropy(logits, labels[out])))
            top1.append(float((logits.argmax(1) == labels[out]).float().mean()))
        mean, spread = float(np.mean(top1)), float(np.std(top1, ddof=1))
        loss = float(np.mean(losses))
        found.append(CrossValidated(penalty=penalty, folds=FOLDS, loss=loss, top1=mean, spread=spread))
        text = f"penalty {penalty:g}: cross-entropy {loss:.4f}, top-1 {mean:.4f} ± {spread:.4f} over {FOLDS} folds"
        print(text, file=sys.stderr)
    return found


@torch.no_grad()
def compute(
    model: Classifier,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pixels: np.ndarray,
    seen: list[View],
    device: torch.device,
) -> np.ndarray:
    """What the head reads of pixels uint8 [N, 3, S, S], float32 [V, N, D]: one row of images for each view."""
    parts: list[list[np.ndarray]] = [[] for _ in seen]
    with track("features", len(pixels) * len(seen)) as bar:
        for start in range(0, len(pixels), FEATURE_BATCH):
            block = np.ascontiguousarray(pixels[start : start + FEATURE_BATCH])
            x = normalise(torch.from_numpy(block).to(device), mean, std)
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


def _check_counts(images: Images) -> None:
    """Raise DataError for images that cross-validation can't be made on."""
    counts = np.bincount(images.labels, minlength=len(images.classes))  # type: ignore[arg-type]
    single = [name for name, count in zip(images.classes, counts, strict=True) if count == 1]
    if single or len(images) < FOLDS:
        few = f"one image alone of {', '.join(single)}" if single else f"{len(images)} images in all"
        raise DataError(f"{few}: cross-validation needs two of each class, and {FOLDS} in all; add images")


def _digest(facts: Facts, images: Images, seen: list[View]) -> str:
    """Of everything that the features depend on."""
    identity = facts.identity()
    parts = [identity[k] for k in ("network", "image", "encoder", "init")]
    content = json.dumps([*parts, facts.recipe.finetune.head_input, seen, images.unlabelled().digest])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
