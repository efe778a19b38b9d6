"""Every path: ends, velocity as a time derivative, and a closed form recovered by training."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from prg.paths import PATHS, VelocityField, flow_matching_loss, vp_beta, vp_sigma


def pair(count: int, side: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 3, side, side, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", PATHS)
def test_from_noise_to_data_with_the_time_derivative_as_velocity(name: str) -> None:
    path, (noise, data), h = PATHS[name], pair(5), 1e-5
    far = path.point(torch.zeros(5), noise, data)
    # vp never quite forgets
    torch.testing.assert_close(far, noise, atol=0.05 if name == "vp" else 1e-5, rtol=0)
    near = path.point(torch.full((5,), path.t_start), noise, data)
    torch.testing.assert_close(near, data, atol=0.05, rtol=0)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    slope = (path.point(t + h, noise, data) - path.point(t - h, noise, data)) / (2 * h)
    torch.testing.assert_close(path.velocity(t, noise, data), slope, atol=1e-8, rtol=1e-8)


class Affine(nn.Module):
    """v(x, t) = a(t) x + b(t), a and b free in each of a few bins of t: enough for a Gaussian."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.a, self.b = nn.Parameter(torch.zeros(bins)), nn.Parameter(torch.zeros(bins))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        i = (t * self.bins).long().clamp(max=self.bins - 1)
        return self.a[i][:, None, None, None] * x + self.b[i][:, None, None, None]


@pytest.mark.parametrize("name", PATHS)
def test_trained_on_a_gaussian_it_recovers_the_closed_form_velocity(name: str) -> None:
    path, mean, std, bins = PATHS[name], 2.0, 0.5, 5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50_000, 1, 1, 1, generator=generator)
    data = mean + std * torch.randn(50_000, 1, 1, 1, generator=generator)
    # times in the middle of the bins, where the bin's own closed form is exact
    t = (torch.randint(bins, (50_000,), generator=generator) + 0.5) / bins
    model = Affine(bins)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = flow_matching_loss(model, path, data, noise, t)
        loss.backward()
        return loss

    optimiser.step(closure)
    middle = (torch.arange(bins) + 0.5) / bins
    scales = (path.data_scale, path.noise_scale, path.data_speed, path.noise_speed)
    a, b, a_speed, b_speed = (scale(middle) for scale in scales)
    # x_t ~ N(a mean, a^2 std^2 + b^2), and E[dx_t/dt | x_t] is linear in x_t
    slope = (a * a_speed * std**2 + b * b_speed) / (a**2 * std**2 + b**2)
    field = VelocityField(model, predicts_noise=path.predicts_noise)  # type: ignore[arg-type]
    for place in (-1.0, 0.0, 1.0):
        x = a * mean + place * (a**2 * std**2 + b**2).sqrt()
        expected = a_speed * mean + slope * (x - a * mean)
        with torch.no_grad():
            found = field(x[:, None, None, None], middle).flatten()
        scale = 1 + (0.5 * vp_beta(middle) / vp_sigma(middle) if path.predicts_noise else 0)
        assert ((found - expected).abs() / scale).max() < 0.1


def test_the_noise_of_a_pair_gives_its_velocity() -> None:
    path, (noise, data) = PATHS["vp"], pair(3)
    t = torch.tensor([0.05, 0.5, path.t_start], dtype=torch.float64)
    field = VelocityField(lambda x, t: noise, predicts_noise=True)  # type: ignore[arg-type]
    torch.testing.assert_close(field(path.point(t, noise, data), t), path.velocity(t, noise, data))


def test_loss_is_half_the_squared_error_summed_over_channels() -> None:
    data, noise = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    loss = flow_matching_loss(Affine(1), PATHS["icfm"], data, noise, torch.rand(2))
    assert loss.item() == pytest.approx(1.5)  # the velocity is 1 everywhere, the prediction 0


def test_the_optimal_coupling_is_a_permutation_of_least_cost() -> None:
    noise, data = pair(6)
    paired = PATHS["otcfm"].couple(noise, data)
    orders = map(list, itertools.permutations(range(6)))
    assert (paired - data).square().sum() == min((noise[o] - data).square().sum() for o in orders)
    assert torch.equal(PATHS["icfm"].couple(noise, data), noise)
