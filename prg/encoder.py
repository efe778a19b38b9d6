"""The reverse solve as an encoder: an image to its state at t_end and the activations there."""

from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from entry.config import Pooling
from prg.paths import PATHS, VelocityField
from prg.solver import TABLEAUS, Solver
from prg.unet import UNet

STATE_SIDE = 16
"""The state is average-pooled to 3 x 16 x 16 before it is used as a feature (official)."""
STATE_DIM = 3 * STATE_SIDE**2


@dataclass(frozen=True)
class EncoderConfig:
    """How to reverse: path, solver, its steps, and the blocks whose activations are HIDDEN, and how they are pooled."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    path: Literal["icfm", "otcfm", "gvp", "vp"] = "icfm"
    solver: Literal["euler", "midpoint", "heun", "rk4"] = "euler"
    steps: Annotated[int, Field(ge=1)] = 1
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("input_blocks", "middle_block")
    """In running order; "input_blocks" and "output_blocks" stand for all of theirs."""
    pooling: Annotated[tuple[Pooling, ...], Field(min_length=1)] = ("mean", "std")

    @property
    def nfe(self) -> int:
        """Network evaluations for both features, the further one for HIDDEN included."""
        return self.steps * TABLEAUS[self.solver].stages + 1


class Encoder(nn.Module):
    """Images to features by the reverse ODE; every image has a t_end of its own.

    STATE: x at t_end, pooled to 16 x 16, flattened channel first, [B, 768]. HIDDEN: activations of one further
    evaluation v(x at t_end, t_end), pooled over space, [B, D_h]: layer by layer, of each the poolings in their order.
    """

    __jit_unused_properties__: ClassVar = ["field", "net", "hidden_dim"]

    def __init__(self, net: UNet, config: EncoderConfig, save_memory: bool = True) -> None:
        super().__init__()
        self.config = config
        path = PATHS[config.path]
        field = VelocityField(net, path.predicts_noise)
        self.solver = Solver(field, config.solver, config.steps, save_memory)
        self.t_start = path.t_start
        self.blocks = net.block_numbers(config.layers)
        self.pooling: list[str] = list(config.pooling)
        names = net.block_names()
        self.layers = tuple(names[number] for number in self.blocks)
        """Their full names."""
        with torch.no_grad():
            side = net.config.image_size
            zero = torch.zeros(1, device=next(net.parameters()).device)
            _, pooled = net.walk(
                zero.expand(1, 3, side, side), zero, self.blocks, self.pooling, max(self.blocks)
            )
        self.widths = {
            f"{layer}.{kind}": values.shape[1]
            for (layer, kind), values in zip(product(self.layers, self.pooling), pooled, strict=True)
        }
        """How many numbers of HIDDEN each part is, in order: "middle_block.mean" and so on."""

    @property
    def hidden_dim(self) -> int:
        """D_h."""
        return sum(self.widths.values())

    @property
    def field(self) -> VelocityField:
        """v(x, t); held by the solver alone, so that its weights have one name."""
        assert isinstance(self.solver.velocity, VelocityField)
        return self.solver.velocity

    @property
    def net(self) -> UNet:
        """The network inside."""
        return self.field.net

    def forward(self, x: Tensor, t_end: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, S, S] normalised, t_end [B] -> STATE [B, 768], HIDDEN [B, D_h]."""
        z, t = self.reverse(x, t_end)
        return pooled_state(z), self.hidden(z, t)

    def hidden(self, z: Tensor, t: Tensor) -> Tensor:
        """HIDDEN of the state z [B, 3, S, S] at the times t [B]."""
        return self.solver.velocity.activations(z, t, self.blocks, self.pooling)  # type: ignore[attr-defined]

    def reverse(self, x: Tensor, t_end: Tensor) -> tuple[Tensor, Tensor]:
        """The full state at t_end, [B, 3, S, S], and the time reached, [B]: t_end, but at most t_start."""
        start = torch.full_like(t_end, self.t_start)
        t = torch.minimum(t_end, start)
        return self.solver(x, start, t), t


def pooled_state(z: Tensor, side: int = STATE_SIDE) -> Tensor:
    """[B, 3, S, S] -> [B, 3 * side^2]."""
    return F.adaptive_avg_pool2d(z, (side, side)).flatten(1)
