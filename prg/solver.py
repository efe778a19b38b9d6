"""Fixed-grid Runge-Kutta solvers: tableaus as data, one step, and `integrate` with its exact gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x [B, ...], t [B]) -> dx/dt [B, ...]."""


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method in Butcher's notation."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        assert len(self.a) == len(self.b), "one row of a for each stage"
        assert all(len(row) == i for i, row in enumerate(self.a)), "explicit: row i has i entries"
        assert abs(sum(self.b) - 1) < 1e-12, "consistent: b sums to 1"

    @property
    def c(self) -> tuple[float, ...]:
        """Times of the stages within a step: the row sums of a."""
        return tuple(float(sum(row)) for row in self.a)

    @property
    def stages(self) -> int:
        """Network evaluations a step."""
        return len(self.b)


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(a=((),), b=(1.0,), order=1),
    "midpoint": Tableau(a=((), (0.5,)), b=(0.0, 1.0), order=2),
    "heun": Tableau(a=((), (1.0,)), b=(0.5, 0.5), order=2),
    "rk4": Tableau(a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4),
}


class Solver(nn.Module):
    """`steps` equal steps of one method along `velocity`, from one time to another, both per image.

    The gradient is that of the discrete solve itself, exact: with `save_memory` every network evaluation is
    checkpointed, so that autograd keeps the states alone and evaluates the network once more in the backward pass.
    (The continuous adjoint, which costs the same, is biased for solvers of this kind.) TorchScript compiles
    the very same loop, without checkpoints; `velocity` must then be a module.
    """

    a: list[list[float]]

    def __init__(self, velocity: Velocity, method: str, steps: int, save_memory: bool = True) -> None:
        super().__init__()
        if method not in TABLEAUS:
            raise ValueError(f"unknown solver {method!r}: choose one of {', '.join(TABLEAUS)}")
        if steps < 1:
            raise ValueError(f"steps = {steps}: at least one step is needed")
        tableau = TABLEAUS[method]
        self.velocity = velocity
        self.steps = steps
        self.save_memory = save_memory
        self.a = [list(row) for row in tableau.a]
        self.b = list(tableau.b)
        self.c = list(tableau.c)

    def forward(self, x: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """x [B, ...] at times t_from [B] -> the state at times t_to [B]."""
        h = (t_to - t_from) / self.steps  # [B]
        for k in range(self.steps):
            x = self.step(x, t_from + k * h, h)
        return x

    def step(self, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """One step of size h [B] from time t [B]."""
        size = h.reshape([-1] + [1] * (x.dim() - 1))
        slopes: list[Tensor] = []
        for i in range(len(self.b)):
            slopes.append(self.evaluate(combine(x, size, self.a[i], slopes), t + self.c[i] * h))
        return combine(x, size, self.b, slopes)

    def evaluate(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at one point."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.velocity(x, t)
        if self.save_memory and torch.is_grad_enabled():
            return self._checkpointed(x, t)
        return self.velocity(x, t)

    @torch.jit.unused
    def _checkpointed(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.velocity, x, t, use_reentrant=False)
        return out


def combine(x: Tensor, size: Tensor, weights: list[float], slopes: list[Tensor]) -> Tensor:
    """x + size * sum(weights * slopes), terms of weight 0 left out."""
    total = x
    for i in range(len(weights)):
        if weights[i] != 0.0:
            total = total + (size * weights[i]) * slopes[i]
    return total


def integrate(
    velocity: Velocity,
    x: Tensor,
    t_from: float | Tensor,
    t_to: float | Tensor,
    steps: int,
    method: str = "euler",
    save_memory: bool = True,
) -> Tensor:
    """Solve dx/dt = velocity(x, t) from t_from to t_to; times are numbers or one a image [B]."""
    times = [torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x)) for t in (t_from, t_to)]
    out: Tensor = Solver(velocity, method, steps, save_memory)(x, times[0], times[1])
    return out
