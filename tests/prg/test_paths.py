"""Every path: ends, velocity as a time derivative, and a closed form recovered by training."""

import pytest
import torch
from torch import nn

from prg.paths import PATHS, flow_matching_loss


@pytest.mark.parametrize("name", PATHS)
def test_noise_at_0_and_data_where_the_solve_starts(name: str) -> None:
    noise, data = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PATHS[name].point(torch.zeros(4), noise, data), noise)
    near = PATHS[name].point(torch.full((4,), PATHS[name].t_start), noise, data)
    torch.testing.assert_close(near, data, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_time_derivative(name: str) -> None:
    noise, data = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    h = 1e-5
    slope = (PATHS[name].point(t + h, noise, data) - PATHS[name].point(t - h, noise, data)) / (2 * h)
    torch.testing.assert_close(PATHS[name].velocity(t, noise, data), slope, atol=1e-8, rtol=1e-8)


class Affine(nn.Module):
    """v(x, t) = a(t) x + b(t), a and b free in each of a few bins of t: enough for a Gaussian."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.a, self.b = nn.Parameter(torch.zeros(bins)), nn.Parameter(torch.zeros(bins))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        i = (t * self.bins).long().clamp(max=self.bins - 1)
        return self.a[i][:, None, None, None] * x + self.b[i][:, None, None, None]


def test_trained_on_a_gaussian_icfm_recovers_the_closed_form() -> None:
    mean, std, bins = 2.0, 0.5, 5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50_000, 1, 1, 1, generator=generator)
    data = mean + std * torch.randn(50_000, 1, 1, 1, generator=generator)
    # times in the middle of the bins, where the bin's own closed form is exact
    t = (torch.randint(bins, (50_000,), generator=generator) + 0.5) / bins
    model = Affine(bins)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = flow_matching_loss(model, PATHS["icfm"], data, noise, t)
        loss.backward()
        return loss

    optimiser.step(closure)
    t = (torch.arange(bins) + 0.5) / bins
    # x_t ~ N(t mean, t^2 std^2 + (1-t)^2); E[data - noise | x_t] is linear in x_t with this slope
    slope = (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)
    torch.testing.assert_close(model.a.detach(), slope, atol=0.05, rtol=0)
    torch.testing.assert_close(model.b.detach(), mean - slope * t * mean, atol=0.1, rtol=0)


def test_loss_is_half_the_squared_error_summed_over_channels() -> None:
    data, noise = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    loss = flow_matching_loss(Affine(1), PATHS["icfm"], data, noise, torch.rand(2))
    assert loss.item() == pytest.approx(1.5)  # the velocity is 1 everywhere, the prediction 0
