"""A plain residual network for small images (He et al. 2016): what PRG is compared with."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prg.training.costs import count_flops

BLOCKS = 2
WIDTHS = range(8, 257, 4)


class Norm(nn.Module):
    """Batch norm; torch's own counts its batches, an integer that can't be averaged with the weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)


class Block(nn.Module):
    """Two convolutions and a shortcut: [B, c_in, H, W] -> [B, c_out, H / stride, W / stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            Norm(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            Norm(c_out),
        )
        same = stride == 1 and c_in == c_out
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), Norm(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages of width, 2 x width and 4 x width, mean over space, linear: [B, 3, S, S] -> [B, K]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), Norm(width), nn.ReLU()]
        channels = width
        for stage, factor in enumerate((1, 2, 4)):
            for i in range(BLOCKS):
                layers.append(Block(channels, width * factor, 2 if stage and not i else 1))
                channels = width * factor
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def width_of_flops(wanted: int, size: int, classes: int) -> int:
    """The width with which an image of size x size costs nearest to so many FLOPs."""

    def cost(width: int) -> int:
        with torch.device("meta"), torch.no_grad():
            return count_flops(ResNet(width, classes).eval(), torch.zeros(1, 3, size, size))

    return min(WIDTHS, key=lambda width: abs(cost(width) - wanted))
