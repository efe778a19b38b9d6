"""A linear head on a frozen encoder: features once, the penalty by cross-validation, then one fit to all images.

On features that are computed once a linear head is a convex problem: L-BFGS on all images needs no learning rate,
schedule or number of epochs. Only the penalty is chosen, and no label is spent on holding out.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entry.files import atomic_file, write_atomically
from prg.checkpoint import Checkpoint, CrossValidated, Facts, read_facts, save_checkpoint
from prg.classifier import Classifier, Head
from prg.encoder import STATE_DIM
from prg.errors import DataError
from prg.fitting import calibrate
from prg.images.sets import Images
from prg.logistic import fit_logistic, stratified_folds
from prg.recipe import Finetune
from prg.trained import fitted_tensors
from prg.training.fitted import Fitted, features, fit_if_enough, labels_of
from prg.training.loop import check_continues
from prg.training.run import Run

FOLDS = 5

View = tuple[float, bool]
"""(level, whether mirrored)."""


def fit_head(
    run: Run,
    model: Classifier,
    images: Images,
    facts: Facts,
    device: torch.device,
    inherited: Fitted | None = None,
) -> None:
    """Fit the head to all images, the encoder as it is; writes the checkpoint that a training would have written.

    inherited: the projection that was fitted to this very encoder; without one it is fitted to these images.
    Does nothing where the checkpoint is there. Raises CheckpointError where it is one of other settings, DataError
    for a class of one image.
    """
    recipe, path = run.recipe, run.finetuned
    config = recipe.finetune
    if done := path.exists():
        check_continues(read_facts(path), facts, path)
    _check_counts(images)
    run.remember()
    if done:
        return
    assert images.labels is not None
    # By key, so that the head is the same whatever the order of the files.
    images = images.subset(np.argsort(images.keys, kind="stable"))
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = model.to(device).eval().requires_grad_(False)
    both = _features(run, model, images, facts, device)
    state, hidden = both.split([STATE_DIM, model.encoder.hidden_dim], dim=2)
    read = model.head.read(state.flatten(0, 1), hidden.flatten(0, 1))
    standardise(model.head, read)
    x = model.head.classifier[0](read).unflatten(0, both.shape[:2])  # [V, N, D]
    labels, classes = labels_of(images, x), len(images.classes)
    chosen, logits = _choose(cross_validate(x, labels, classes, config, recipe.seed), path.parent)
    weight, bias = fit_logistic(
        x.flatten(0, 1), labels.repeat(len(x)), classes, chosen.penalty, config.label_smoothing
    )
    model.head.classifier[1].load_state_dict({"weight": weight, "bias": bias})
    fitted = inherited or fit_if_enough(model.encoder, recipe, images)
    if fitted.projection:
        # By cross-validation: logits of each image are by the fold that left it out.
        fitted = replace(fitted, calibration=calibrate(logits.cpu().numpy(), labels.cpu().numpy()))
    assert facts.trained is not None
    trained = facts.trained.model_copy(update={"step": 1, "seconds": round(time.monotonic() - started, 1)})
    found = {"trained": trained, "cross_validated": chosen}
    facts = facts.model_copy(update=found | {"fitted_on": fitted.on, "calibration": fitted.calibration})
    tensors = {f"average.{k}": v for k, v in model.state_dict().items()}
    tensors |= fitted_tensors(fitted.projection)
    save_checkpoint(path, Checkpoint(tensors, facts))


def _features(run: Run, model: Classifier, images: Images, facts: Facts, device: torch.device) -> Tensor:
    """STATE and HIDDEN of each view of the images, [V, N, 768 + D_h]; kept in the run's folder for the next time."""
    seen = views(run.recipe.finetune)
    cache = run.finetuned.parent / f"features-{_digest(facts, images, seen)}.npy"
    if not cache.exists():
        computed = []
        for level, mirrored in seen:
            title = f"features at {level:g}{', mirrored' if mirrored else ''}"
            view = features(model.encoder, run.recipe.image.spec, images.pixels, level, title, mirrored)
            computed.append(torch.cat(view, 1).cpu().numpy())
        with atomic_file(cache) as file:
            np.save(file, np.stack(computed))
    return torch.from_numpy(np.load(cache)).to(device)


def _choose(found: list[tuple[CrossValidated, Tensor]], folder: Path) -> tuple[CrossValidated, Tensor]:
    """The one of least cross-entropy; all of them go to metrics.jsonl."""
    lines = (json.dumps({"step": step, **one.model_dump()}) + "\n" for step, (one, _) in enumerate(found, 1))
    write_atomically(folder / "metrics.jsonl", "".join(lines).encode())
    chosen, logits = min(found, key=lambda pair: pair[0].loss)
    print(f"chosen: penalty {chosen.penalty:g}, of the least cross-entropy", file=sys.stderr)
    return chosen, logits


def views(config: Finetune) -> list[View]:
    """How the encoder sees each training image: at each level, and there mirrored too; the plain first one first."""
    ways = (False, True) if "flip" in config.augment else (False,)
    return [(level, mirrored) for level in config.t_end for mirrored in ways]


def cross_validate(
    x: Tensor, labels: Tensor, classes: int, config: Finetune, seed: int
) -> list[tuple[CrossValidated, Tensor]]:
    """Each of the penalties on features x [V, N, D] and labels [N], with the logits [N, K] of the images left out.

    An image's views are all in one fold; the plain view alone is evaluated.
    """
    found = []
    for penalty in config.penalties:
        losses, top1 = [], []
        logits = x.new_empty(len(labels), classes)
        for out in folds_of(labels, seed):
            weight, bias = fit_logistic(
                x[:, ~out].flatten(0, 1),
                labels[~out].repeat(len(x)),
                classes,
                penalty,
                config.label_smoothing,
            )
            logits[out] = F.linear(x[0, out], weight, bias)
            losses.append(float(F.cross_entropy(logits[out], labels[out])))
            top1.append(float((logits[out].argmax(1) == labels[out]).float().mean()))
        mean, spread = float(np.mean(top1)), float(np.std(top1, ddof=1))
        loss = float(np.mean(losses))
        one = CrossValidated(penalty=penalty, folds=FOLDS, loss=loss, top1=mean, spread=spread)
        found.append((one, logits))
        text = f"penalty {penalty:g}: cross-entropy {loss:.4f}, top-1 {mean:.4f} ± {spread:.4f} over {FOLDS} folds"
        print(text, file=sys.stderr)
    return found


def folds_of(labels: Tensor, seed: int) -> Iterator[Tensor]:
    """Which rows each fold leaves out, bool [N]."""
    for out in stratified_folds(labels.cpu().numpy(), FOLDS, seed):
        yield torch.from_numpy(out).to(labels.device)


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
    content = json.dumps([*parts, seen, images.unlabelled().digest])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
