"""Optimisers: AdamW, and Muon, whose update of each matrix is orthogonal."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prg.recipe import Optimisation

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan 2024): steep at 0, and within 0.7 to 1.2 once it has got there."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at learning rate 1, as AdamW's typically is, so that both share learning rates
and weight decays (Liu et al. 2025)."""


def optimisers(model: nn.Module, config: Optimisation) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the kernels between feature maps and AdamW for the rest.

    Matrices and kernels decay, biases and norms do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in params if config.optimiser == "muon" and is_kernel(p)]
    chosen = {id(p) for p in kernels}
    rest = [p for p in params if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
    )
    return [adamw, Muon(kernels, config.lr, config.weight_decay)] if kernels else [adamw]


def is_kernel(p: nn.Parameter) -> bool:
    """A convolution's kernel, [out, in, ...], from many channels to many.

    Those from and to RGB are not, nor the head's matrices: orthogonalising one of 1,024 x 1,024 would cost more
    than all kernels together.
    """
    return p.dim() > 2 and min(p.shape[:2]) >= 16


def learning_rate(config: Optimisation, step: int, steps: int) -> float:
    """Linear warm-up, then constant or half a cosine to lr_min."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * done))


def orthogonal(update: Tensor) -> Tensor:
    """Nearly the closest matrix with orthonormal rows (or columns, if those are fewer): [M, N] -> [M, N].

    Newton-Schulz, the iteration carried out on the smaller Gram matrix alone: every iterate is a polynomial in
    it times the first, so that the large side is multiplied with twice, not ten times.
    """
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.T
    product = torch.eye(len(x), device=x.device, dtype=x.dtype)
    for _ in range(ITERATIONS):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        step.diagonal().add_(a)
        product = step @ product
        gram = step @ gram @ step
    x = product @ x
    return x.T if update.shape[0] > update.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, with decoupled weight decay; kernels count as matrices [out, rest]."""

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the gradients at hand."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = RMS * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(update).reshape(p.shape), alpha=-group["lr"] * scale)


MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
"""What each optimiser remembers of a parameter."""
