"""The optimiser for kernels: orthogonal updates of AdamW's size."""

import pytest
import torch
from torch import nn

from prg.recipe import Pretrain
from prg.training.loop import optimisers
from prg.training.optimisers import RMS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(32, 32), (16, 144), (144, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    matrix = left @ torch.diag(torch.logspace(0, -1, min(shape))) @ right.T
    found = torch.linalg.svdvals(orthogonal(matrix))
    assert found.min() > 0.6
    assert found.max() < 1.25


def test_an_update_has_the_size_of_adamws_whatever_the_gradients_and_weights_decay_apart() -> None:
    for scale in (0, 1e-4, 1.0, 1e4):
        p = nn.Parameter(torch.ones(32, 16, 3, 3))
        p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        Muon([p], lr=0.1, weight_decay=0.5).step()
        size = (p.detach() - 0.95).square().mean().sqrt()
        assert size == pytest.approx(0.1 * RMS if scale else 0, rel=0.3, abs=1e-6)


def test_kernels_between_features_go_to_muon_and_everything_else_to_adamw() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32), nn.Linear(32, 32))
    adamw, muon = optimisers(model, Pretrain(epochs=1, optimiser="muon"))
    held = [[id(p) for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert held[1] == [id(model[1].weight)]
    assert sorted(held[0] + held[1]) == sorted(id(p) for p in model.parameters())
    assert len(optimisers(model, Pretrain(epochs=1))) == 1
