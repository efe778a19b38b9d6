"""Linear probe and nearest neighbours: how much frozen features say about classes."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from entry.vectors import unit_length
from prg.logistic import fit_logistic

NEIGHBOURS = 20
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of half the squared weights, beside the mean cross-entropy of standardised features."""
INNER = 0.2
"""Share of the probe's training features on which the penalty is chosen."""


def linear_probe(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int) -> np.ndarray:
    """Logits [N, K] of queries [N, D] by logistic regression on standardised features [M, D].

    The penalty is the one of PENALTIES that is best on a part held out from the features; then all are fitted.
    """
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    order = np.random.default_rng(0).permutation(len(labels))
    held = max(1, round(INNER * len(labels)))
    inner, rest = torch.from_numpy(order[:held]), torch.from_numpy(order[held:])
    scores = [
        top1(_fit(x[rest], y[rest], x[inner], classes, penalty), labels[inner]) for penalty in PENALTIES
    ]
    return _fit(x, y, torch.from_numpy(queries), classes, PENALTIES[int(np.argmax(scores))])


def _fit(x: Tensor, y: Tensor, queries: Tensor, classes: int, penalty: float) -> np.ndarray:
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    weight, bias = fit_logistic((x - mean) / scale, y, classes, penalty)
    return F.linear((queries - mean) / scale, weight, bias).numpy()


def nearest_neighbours(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, k: int = NEIGHBOURS
) -> np.ndarray:
    """Votes [N, K] of each query's k nearest by cosine, weighted by exp(cosine / 0.07) (Wu et al. 2018)."""
    mean = features.mean(0)
    bank, asked = unit_length(features - mean), unit_length(queries - mean)
    cosine = asked @ bank.T
    near = np.argpartition(-cosine, min(k, len(labels)) - 1, axis=1)[:, :k]
    weight = np.exp((np.take_along_axis(cosine, near, 1) - 1) / 0.07)
    votes = np.zeros((len(queries), classes))
    for c in range(classes):
        votes[:, c] = (weight * (labels[near] == c)).sum(1)
    return votes


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest score is at their label."""
    return float((scores.argmax(1) == labels).mean())
