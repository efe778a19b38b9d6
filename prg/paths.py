"""Probability paths between noise and data as rows, the flow-matching loss, and the time convention.

t = 0 is noise and t = 1 is data on every path and in every function of this package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prg.unet import UNet


def independent(noise: Tensor, data: Tensor) -> Tensor:
    """Pairs as they were drawn."""
    return noise


def optimal(noise: Tensor, data: Tensor) -> Tensor:
    """Pairs of least total squared distance within the batch, exactly (Pooladian et al. 2023; Tong et al. 2023)."""
    import ot  # here: only training on this path needs it

    cost = torch.cdist(noise.flatten(1).double(), data.flatten(1).double()).square()
    plan = ot.emd([], [], cost.cpu().numpy())  # between uniform weights of one size it is a permutation
    return noise[torch.from_numpy(plan.argmax(axis=0)).to(noise.device)]


@dataclass(frozen=True)
class Path:
    """One path x_t = data_scale(t) * data + noise_scale(t) * noise."""

    data_scale: Callable[[Tensor], Tensor]
    noise_scale: Callable[[Tensor], Tensor]
    data_speed: Callable[[Tensor], Tensor]
    """d data_scale / dt."""
    noise_speed: Callable[[Tensor], Tensor]
    """d noise_scale / dt."""
    t_start: float = 1.0
    """Where a reverse solve begins; below 1 where the velocity is infinite at the data."""
    predicts_noise: bool = False
    """The network's output is the noise of x_t, not the velocity."""
    couple: Callable[[Tensor, Tensor], Tensor] = independent
    """couple(noise, data) -> noise in the order in which it is paired with the data; any device."""

    def point(self, t: Tensor, noise: Tensor, data: Tensor) -> Tensor:
        """x_t for t [B]; noise and data [B, C, H, W]."""
        t = t[:, None, None, None]
        return self.data_scale(t) * data + self.noise_scale(t) * noise

    def velocity(self, t: Tensor, noise: Tensor, data: Tensor) -> Tensor:
        """dx_t/dt of a fixed pair; shapes as in `point`."""
        t = t[:, None, None, None]
        return self.data_speed(t) * data + self.noise_speed(t) * noise

    def target(self, t: Tensor, noise: Tensor, data: Tensor) -> Tensor:
        """What the network is to answer at (x_t, t)."""
        return noise if self.predicts_noise else self.velocity(t, noise, data)


BETA_0, BETA_1 = 0.1, 20.0
"""Ends of DDPM's linear schedule in continuous time s = 1 - t: beta(s) = BETA_0 + (BETA_1 - BETA_0) s.

TorchScript sees no globals, hence the functions' defaults.
"""


def vp_beta(t: Tensor, beta_0: float = BETA_0, beta_1: float = BETA_1) -> Tensor:
    """The VP-SDE's beta at t."""
    return beta_0 + (beta_1 - beta_0) * (1 - t)


def vp_integral(t: Tensor, beta_0: float = BETA_0, beta_1: float = BETA_1) -> Tensor:
    """The integral of beta from the data to t."""
    s = 1 - t
    return beta_0 * s + 0.5 * (beta_1 - beta_0) * s * s


def vp_alpha(t: Tensor) -> Tensor:
    """The data's share in x_t."""
    return torch.exp(-0.5 * vp_integral(t))


def vp_sigma(t: Tensor) -> Tensor:
    """The noise's share in x_t."""
    return torch.sqrt(-torch.expm1(-vp_integral(t)))


LINE = Path(lambda t: t, lambda t: 1 - t, lambda t: torch.ones_like(t), lambda t: -torch.ones_like(t))
# A new row needs its name in prg.encoder.EncoderConfig.path too.
PATHS: dict[str, Path] = {
    # independent coupling, sigma = 0 (Lipman et al. 2022; Tong et al. 2023)
    "icfm": LINE,
    # the same line between pairs of an optimal coupling
    "otcfm": replace(LINE, couple=optimal),
    # "generalised variance preserving" (Albergo et al. 2023): the shares are sine and cosine
    "gvp": Path(
        lambda t: torch.sin(math.pi / 2 * t),
        lambda t: torch.cos(math.pi / 2 * t),
        lambda t: math.pi / 2 * torch.cos(math.pi / 2 * t),
        lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    ),
    # the VP-SDE's probability flow (Song et al. 2021), with a noise-predicting network (Ho et al. 2020)
    "vp": Path(
        vp_alpha,
        vp_sigma,
        lambda t: 0.5 * vp_beta(t) * vp_alpha(t),
        lambda t: -0.5 * vp_beta(t) * vp_alpha(t) ** 2 / vp_sigma(t),
        t_start=1 - 1e-3,
        predicts_noise=True,
    ),
}


class VelocityField(nn.Module):
    """A network as the velocity dx/dt under this package's time convention.

    predicts_noise: it answers with the noise of the VP path, so v = beta/2 * (x - noise/sigma), the
    probability flow.
    """

    def __init__(self, net: UNet, predicts_noise: bool = False) -> None:
        super().__init__()
        self.net = net
        self.predicts_noise = predicts_noise

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, 3, S, S], t [B] -> v [B, 3, S, S]."""
        if self.predicts_noise:
            at = t[:, None, None, None]
            return 0.5 * vp_beta(at) * (x - self.net(x, t) / vp_sigma(at))
        return self.net(x, t)

    def activations(self, x: Tensor, t: Tensor, blocks: list[int], pooling: list[str]) -> Tensor:
        """The numbered blocks of one evaluation at (x, t), pooled over space: [B, D_h]."""
        return self.net.activations(x, t, blocks, pooling)


def flow_matching_loss(net: nn.Module, path: Path, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean over batch and pixels of the sum over channels of (v - dx_t/dt)^2 / 2, the official loss.

    On a path whose network predicts noise, noise stands for both. t must be below the path's t_start.
    """
    predicted = net(path.point(t, noise, data), t)
    return 0.5 * (predicted - path.target(t, noise, data)).square().sum(dim=1).mean()
