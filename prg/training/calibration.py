"""Calibration: whether a model that is p sure is right a share p of the time."""

from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Of one model on labelled images."""

    nll: float
    """Mean negative log-likelihood of the true class, in nats."""
    ece: float
    """Expected calibration error: the mean gap between confidence and accuracy over bins of confidence."""
    confidence: tuple[float | None, ...]
    """Mean confidence of each bin, None where it is empty."""
    accuracy: tuple[float | None, ...]
    counts: tuple[int, ...]


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """logits [N, K], labels [N] -> calibration over equally wide bins (Guo et al. 2017)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    confidence = np.exp(log_p.max(axis=1))
    right = log_p.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sure = np.bincount(place, confidence, bins)
    correct = np.bincount(place, right, bins)
    return Calibration(
        nll=round(float(-log_p[np.arange(len(labels)), labels].mean()), 6),
        ece=round(float(np.abs(sure - correct).sum() / len(labels)), 6),
        confidence=_means(sure, counts),
        accuracy=_means(correct, counts),
        counts=tuple(int(n) for n in counts),
    )


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(s / n) if n else None for s, n in zip(sums, counts, strict=True))
