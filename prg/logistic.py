"""Multinomial logistic regression by L-BFGS: the head of a frozen encoder, and every linear probe."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prg.errors import TrainingError

ITERATIONS = 200
"""Of L-BFGS, at most; it ends earlier where the loss no longer falls."""


def fit_logistic(
    x: Tensor, labels: Tensor, classes: int, penalty: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weight [K, D] and bias [K] for standardised features x [N, D] and labels [N].

    Minimises cross-entropy + penalty / 2 x squared norm of the weight over all rows at once, from zero. That is
    convex: nothing depends on a seed, a learning rate or a number of epochs. Raises TrainingError where it diverges.
    """
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-7,
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=smoothing)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(objective)
    if not bool(weight.isfinite().all()):
        raise TrainingError(
            f"the regression with penalty {penalty:g} diverged: leave that penalty out, or see whether the encoder's "
            "features are finite numbers"
        )
    return weight.detach(), bias.detach()


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> Iterator[np.ndarray]:
    """Which rows each fold leaves out: bool [N], each row once, every class spread over the folds evenly."""
    fold = np.empty(len(labels), np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold[order] = np.arange(len(labels)) % folds  # class after class, so each is dealt round the folds
    yield from (fold == k for k in range(folds))
