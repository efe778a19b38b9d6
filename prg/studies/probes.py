"""Linear probe and nearest neighbours: how much frozen features say about classes."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    penalty: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, K]."""
        x = (torch.from_numpy(features) - self.mean) / self.scale
        return F.linear(x, self.weight, self.bias).numpy()


def linear_probe(features: np.ndarray, labels: np.ndarray, classes: int) -> LinearProbe:
    """Fit on features [N, D]; the penalty is the best of PENALTIES on a part held out from these, then refitted."""
    order = np.random.default_rng(0).permutation(len(labels))
    held = max(1, round(INNER * len(labels)))
    inner, rest = order[:held], order[held:]
    scores = []
    for penalty in PENALTIES:
        fitted = fit(features[rest], labels[rest], classes, penalty)
        scores.append(top1(fitted.logits(features[inner]), labels[inner]))
    best = PENALTIES[int(np.argmax(scores))]
    return fit(features, labels, classes, best)


def fit(features: np.ndarray, labels: np.ndarray, classes: int, penalty: float) -> LinearProbe:
    """One regression on standardised features."""
    x = torch.from_numpy(features)
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    weight, bias = fit_logistic((x - mean) / scale, torch.from_numpy(labels), classes, penalty)
    return LinearProbe(mean, scale, weight, bias, penalty)


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
