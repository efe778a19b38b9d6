"""Probability paths between noise and data as rows, the flow-matching loss, and the time convention.

t = 0 is noise and t = 1 is data on every path and in every function of this package.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prg.unet import UNet


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

    def point(self, t: Tensor, noise: Tensor, data: Tensor) -> Tensor:
        """x_t for t [B]; noise and data [B, C, H, W]."""
        t = t[:, None, None, None]
        return self.data_scale(t) * data + self.noise_scale(t) * noise

    def velocity(self, t: Tensor, noise: Tensor, data: Tensor) -> Tensor:
        """dx_t/dt of a fixed pair, the regression target; shapes as in `point`."""
        t = t[:, None, None, None]
        return self.data_speed(t) * data + self.noise_speed(t) * noise


PATHS: dict[str, Path] = {
    # independent coupling, sigma = 0 (Lipman et al. 2022; Tong et al. 2023)
    "icfm": Path(lambda t: t, lambda t: 1 - t, lambda t: torch.ones_like(t), lambda t: -torch.ones_like(t)),
}


class VelocityField(nn.Module):
    """A network under this package's time convention.

    reversed_time: the network was trained on s = 1 - t with output dx/ds (the official GVP weights), so
    v(x, t) = -net(x, 1 - t).
    """

    def __init__(self, net: UNet, reversed_time: bool = False) -> None:
        super().__init__()
        self.net = net
        self.reversed_time = reversed_time

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, 3, S, S], t [B] -> v [B, 3, S, S]."""
        if self.reversed_time:
            return -self.net(x, 1 - t)
        return self.net(x, t)

    def activations(self, x: Tensor, t: Tensor, blocks: list[int]) -> Tensor:
        """Spatial averages of the numbered blocks of one evaluation at (x, t): [B, D_h]."""
        return self.net.activations(x, 1 - t if self.reversed_time else t, blocks)


def flow_matching_loss(field: nn.Module, path: Path, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean over batch and pixels of the sum over channels of (v - dx_t/dt)^2 / 2, the official loss."""
    predicted = field(path.point(t, noise, data), t)
    return 0.5 * (predicted - path.velocity(t, noise, data)).square().sum(dim=1).mean()
