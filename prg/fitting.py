"""What is fitted to a trained model: the projection to EMBEDDING, a calibration.

EMBEDDING: HIDDEN standardised and projected on its leading principal directions, each divided by the square root of
its standard deviation. So no single number and no direction decides a cosine, and a prefix is an embedding too.
"""

import numpy as np
import torch
from torch import Tensor

from entry.config import QUANTILES, Calibration
from prg.errors import FittingError
from prg.extractor import Projection

FEWEST = 64
"""Images that a projection can be fitted to."""
LARGEST = 256
"""Numbers of an embedding, at most."""
IMAGES_A_NUMBER = 4
SHARPEST, FLATTEST = 1 / 50, 50.0
"""Temperatures, at least and at most."""
LEAST_VARIANCE = 1e-6
"""Of a direction, beside the first one's: what is below is rounding, and is left out."""


def fit_projection(hidden: Tensor) -> Projection:
    """HIDDEN [N, D_h] of images -> the projection to min(256, D_h, N // 4) numbers.

    Raises FittingError for too few images, features that are constant or not finite.
    """
    n, dim = hidden.shape
    if n < FEWEST:
        raise FittingError(f"an embedding is fitted to at least {FEWEST} images, these are {n}; give more")
    x = hidden.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    if not bool(std.isfinite().all()):
        raise FittingError("the features are not finite numbers, so no embedding can be fitted to them")
    # What rounding alone moves is constant.
    moves = std > 1e-6 * mean.abs().clamp(min=1)
    if not bool(moves.any()):
        raise FittingError("the features of all images are the same: give images that differ")
    inverse_std = torch.where(moves, 1 / std, 0.0)
    directions, variances = principal((x - mean) * inverse_std, min(LARGEST, dim, n // IMAGES_A_NUMBER))
    spread = variances.clamp(min=LEAST_VARIANCE * float(variances[0])).sqrt()
    largest = directions.abs().amax(1, keepdim=True)
    whole = (directions / largest * 127).round().to(torch.int8)
    scale = largest[:, 0] / 127 / spread.sqrt()
    scale[variances <= LEAST_VARIANCE * variances[0]] = 0
    return Projection(mean.float(), inverse_std.float(), whole, scale.float())


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centred x [N, D] -> its leading directions [count, D], the largest component of each positive; variances."""
    n, dim = x.shape
    if dim <= n:
        variances, vectors = torch.linalg.eigh(x.t() @ x / n)  # ascending
        directions = vectors.t().flip(0)[:count]
    else:  # as many as there are images: the smaller matrix has the same
        variances, vectors = torch.linalg.eigh(x @ x.t() / n)
        directions = torch.nn.functional.normalize(vectors.t().flip(0)[:count] @ x, dim=1)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), variances.flip(0)[:count].clamp(min=0)


def calibrate(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """LOGITS [N, K] and labels [N] of images that the model was not trained on -> the calibration."""
    known = logits.astype(np.float64).max(1)
    quantiles = np.quantile(known, np.linspace(0, 1, QUANTILES))
    return Calibration(
        temperature=round(temperature(logits, labels), 6),
        known_quantiles=tuple(round(float(value), 6) for value in quantiles),
        images=len(labels),
    )


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T for which softmax(logits / T) has the least cross-entropy (Guo et al. 2017).

    Cross-entropy is convex in 1 / T, so its slope is followed to its one zero. One more label is counted, that is every
    class in equal parts: a few images that are all right are no reason to be certain (as Platt 1999 has it).
    """
    exact = logits.astype(np.float64)
    centred = exact - exact[np.arange(len(labels)), labels][:, None]
    any_class = centred.mean(1) / (len(labels) + 1)

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * (centred - centred.max(1, keepdims=True)))
        return float(((weights * centred).sum(1) / weights.sum(1) - any_class).mean())

    low, high = np.log(1 / FLATTEST), np.log(1 / SHARPEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(np.exp(middle)) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))
