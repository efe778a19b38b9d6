"""Accuracy and calibration of an exported entry: the very module that is served, on preprocessing that is served."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entry.config import Accuracy, Entry, EntryError, read_entry, write_entry
from entry.runner import Runner
from prg.console import track
from prg.export import BY_CLASS, write_card
from prg.images.sets import Images, Pixels, same_classes
from prg.machine import choose_device

BATCH = 64
BINS = 15
FEW_CLASSES = 20
ENDS = 5
"""Worst and best classes that are shown where there are more than a few."""


@dataclass(frozen=True)
class Reliability:
    """Whether a model that is p sure is right a share p of the time."""

    nll: float
    """Mean negative log-likelihood of the true class, in nats."""
    ece: float
    """Expected calibration error: the mean gap between confidence and accuracy over bins of confidence."""
    confidence: tuple[float | None, ...]
    """Mean confidence of each bin, None where it is empty."""
    accuracy: tuple[float | None, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one version on one split."""

    entry: Entry
    version: str
    accuracy: Accuracy
    confusion: np.ndarray  # [K, K] counts, rows the true class
    reliability: Reliability

    @property
    def by_class(self) -> list[tuple[str, int, float | None]]:
        """(class, images, top-1) of each class; None without images."""
        counts, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        labels = self.entry.prg.labels or ()
        return [
            (name, n, round(r / n, 6) if n else None)
            for name, n, r in zip(labels, counts, right, strict=True)
        ]

    @property
    def telling_classes(self) -> list[tuple[str, int, float | None]]:
        """All of `by_class` where they are few, else the worst and the best of them."""
        if len(self.by_class) <= FEW_CLASSES:
            return self.by_class
        ranked = sorted((row for row in self.by_class if row[1]), key=lambda row: row[2] or 0.0)
        return ranked[:ENDS] + ranked[ENDS:][-ENDS:]


def evaluate(
    directory: Path, images: Images, name: str, version: str | None = None, device: str = ""
) -> Evaluation:
    """Classify labelled images with the entry's model.pt; `name` says what they are.

    Raises EntryError for an entry without head, DataError for images without labels or of other classes.
    """
    runner = Runner(directory, version, device or str(choose_device()))
    prg = runner.entry.prg
    if prg.labels is None or prg.classify_t_end is None:
        raise EntryError(
            f"{directory}: was exported without a head, so it has no accuracy; fine-tune it first"
        )
    images = same_classes(images, prg.labels, name)
    logits = classify(runner, images.pixels, prg.classify_t_end[0])
    assert images.labels is not None
    top5 = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    confusion = np.zeros((len(prg.labels),) * 2, np.int64)
    np.add.at(confusion, (images.labels, top5[:, 0]), 1)
    accuracy = Accuracy(
        data=name,
        images=len(images),
        top1=round(float((top5[:, 0] == images.labels).mean()), 6),
        top5=round(float((top5 == images.labels[:, None]).any(1).mean()), 6),
    )
    # As probabilities are served.
    served = logits / prg.versions[runner.version].temperature
    return Evaluation(runner.entry, runner.version, accuracy, confusion, reliability(served, images.labels))


def classify(runner: Runner, pixels: Pixels, t_end: float) -> np.ndarray:
    """Logits float32 [N, K] of pixels uint8 [N, 3, S, S]."""
    parts = []
    with track(f"evaluating {runner.entry.name}", len(pixels)) as bar:
        for start in range(0, len(pixels), BATCH):
            batch = pixels[start : start + BATCH]
            parts.append(runner.run(batch, np.full(len(batch), t_end, np.float32))["LOGITS"])
            bar.advance(len(batch))
    return np.concatenate(parts)


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """logits [N, K], labels [N] -> reliability over equally wide bins (Guo et al. 2017)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    confidence = np.exp(log_p.max(axis=1))
    right = log_p.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sure = np.bincount(place, confidence, bins)
    correct = np.bincount(place, right, bins)
    return Reliability(
        nll=round(float(-log_p[np.arange(len(labels)), labels].mean()), 6),
        ece=round(float(np.abs(sure - correct).sum() / len(labels)), 6),
        confidence=_means(sure, counts),
        accuracy=_means(correct, counts),
        counts=tuple(int(n) for n in counts),
    )


def record(directory: Path, evaluation: Evaluation) -> None:
    """Write the figures into the entry's parameter and model card, in place of older ones on the same data."""
    entry = read_entry(directory)  # again: it may have got versions while this one was evaluated
    version = entry.prg.versions.get(evaluation.version)
    if version is None or version.sha256 != evaluation.entry.prg.versions[evaluation.version].sha256:
        raise EntryError(f"{directory}: version {evaluation.version} was replaced meanwhile; evaluate again")
    others = tuple(a for a in version.accuracy if a.data != evaluation.accuracy.data)
    # Into the part of an entry that is free: its other keys are fixed.
    by_class = version.training.get(BY_CLASS, {}) | {evaluation.accuracy.data: evaluation.telling_classes}
    training = version.training | {BY_CLASS: by_class}
    updated = version.model_copy(update={"accuracy": (*others, evaluation.accuracy), "training": training})
    versions = entry.prg.versions | {evaluation.version: updated}
    entry = Entry(entry.name, entry.prg.model_copy(update={"versions": versions}))
    write_entry(directory, entry)
    write_card(directory, entry)


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(s / n) if n else None for s, n in zip(sums, counts, strict=True))
