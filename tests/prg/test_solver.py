"""Order, gradient and memory of the reverse solve."""

import math

import pytest
import torch
from networks import random_net
from torch import Tensor

from prg.paths import VelocityField
from prg.solver import TABLEAUS, Solver, integrate


def spiral(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that is nonlinear in x and depends on t, one time an image."""
    return torch.sin(x.flip(1)) + x * torch.cos(3 * t)[:, None]


@pytest.mark.parametrize("method", TABLEAUS)
def test_error_falls_with_the_order(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64)
    # Times in double precision too, or rk4 would meet float32's floor.
    start, end = (torch.full((5,), t, dtype=torch.float64) for t in (1.0, 0.1))
    exact = Solver(spiral, "rk4", 2000)(x, start, end)
    errors = [(Solver(spiral, method, n)(x, start, end) - exact).norm().item() for n in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(TABLEAUS[method].order, abs=0.15)


def test_unusable_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="'rk5'.*euler"):
        integrate(spiral, torch.zeros(1, 2), 1.0, 0.0, 1, "rk5")
    with pytest.raises(ValueError):
        integrate(spiral, torch.zeros(1, 2), 1.0, 0.0, 0)


@pytest.mark.parametrize("method", TABLEAUS)
def test_gradient_is_that_of_the_unrolled_solve(method: str) -> None:
    field = VelocityField(random_net()).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t_end = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)

    def unrolled(x: Tensor) -> Tensor:
        table, n = TABLEAUS[method], 3
        for k in range(n):
            h = (t_end - 1) / n
            t, size = 1 + k * h, h[:, None, None, None]
            slopes: list[Tensor] = []
            for row, c in zip(table.a, table.c, strict=True):
                at = x + sum((size * w * s for w, s in zip(row, slopes, strict=True)), torch.zeros(()))
                slopes.append(field(at, t + c * h))
            x = x + sum((size * w * s for w, s in zip(table.b, slopes, strict=True)), torch.zeros(()))
        return x

    start, weights = torch.ones(3, dtype=torch.float64), torch.randn_like(x)
    kept, freed = (Solver(field, method, 3, save_memory) for save_memory in (False, True))
    gradients = []
    for solve in (unrolled, lambda x: kept(x, start, t_end), lambda x: freed(x, start, t_end)):
        field.zero_grad()
        leaf = x.clone().requires_grad_()
        (solve(leaf) * weights).sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in field.parameters())])
    for mine in gradients[1:]:
        for a, b in zip(mine, gradients[0], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def saved_bytes(steps: int) -> int:
    """Bytes of distinct storages that autograd keeps for one solve, the weights among them."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    field = VelocityField(random_net("small32"))
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        integrate(field, x, 1.0, 0.0, steps)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_memory_grows_by_the_states_alone() -> None:
    state = 4 * 3 * 32 * 32 * 4
    assert 0 < saved_bytes(32) - saved_bytes(8) <= 24.1 * state
