"""The velocity network v(x, t): a U-Net in the layout of improved-diffusion."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """The shape of one U-Net; `PRESETS` names the ones in use."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    image_size: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int = 3
    """Residual blocks a level."""
    attention: tuple[int, ...] = ()
    """Down-sampling factors (relative to the stem's output) whose blocks are followed by self-attention."""
    middle_attention: bool = True
    """Middle = Res-Attn-Res if true, one residual block if false."""
    heads: int = 4
    groups: int = 32
    patch: int = 1
    """Stride of the stem. 2: a 4x4 convolution of stride 2 in, a pixel shuffle out; 4: an 8x8 one of stride 4."""
    resample_conv: bool = True
    """Whether up-sampling ends in a convolution (at the finer resolution, so it is a costly one)."""
    skip_all: bool = True
    """True (official): every encoder block is skipped to a decoder block of its own, also the stem and the
    down-samplings, which makes the decoder the larger half. False: only the residual blocks are."""
    head_channels: int = 0
    """Channels of an attention head, however many heads that makes; 0: `heads` heads."""
    scale_shift: bool = True
    """True (official): the time embedding scales and shifts a block's second norm. False: it is added before."""
    eps: float = 1e-5
    """Of the group norms."""
    pad_after: bool = False
    """Where down-sampling pads: on the right and below alone, or (official) on all sides."""
    times: int = 0
    """Number of discrete times of a network trained on them (data at 0): its own time is then
    times * (1 - t) - 1, clamped to them. 0: it is t."""
    freq_shift: int = 0
    """Frequencies of the time embedding are exp(-ln(1e4) i / (n - freq_shift)), i from 0 to n - 1."""

    def __post_init__(self) -> None:
        for key in ("image_size", "channels", "blocks", "groups", "patch", "heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: at least 1 is needed")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers = {self.multipliers}: one for each level is needed, none below 1")
        coarsest = self.patch * 2 ** (len(self.multipliers) - 1)
        if self.image_size % coarsest:
            raise ValueError(
                f"image_size = {self.image_size}: with {len(self.multipliers)} levels and patch = {self.patch} "
                f"it must be a multiple of {coarsest}"
            )
        for i, m in enumerate(self.multipliers):
            width = self.channels * m
            attended = 2**i in self.attention or (self.middle_attention and i == len(self.multipliers) - 1)
            heads = ("head_channels" if self.head_channels else "heads",) if attended else ()
            for key in ("groups", *heads):
                if width % (parts := getattr(self, key)):
                    raise ValueError(f"{key} = {parts}: does not divide a level of {width} channels")


LIGHT = UNetConfig(
    32, 64, (1, 2, 4), blocks=1, middle_attention=False, patch=2, resample_conv=False, skip_all=False
)
"""For processors: strided stem, one block a level, no attention, the light decoder."""
PRESETS: dict[str, UNetConfig] = {
    "unet32": UNetConfig(32, 128, (1, 2, 2, 2), attention=(2, 4)),
    "unet64": UNetConfig(64, 128, (1, 2, 3, 4), attention=(4, 8)),
    "small32": LIGHT,
    "base32": replace(LIGHT, patch=1, middle_attention=True),
    "small64": replace(LIGHT, image_size=64, multipliers=(1, 2, 4, 4)),
    "quick64": replace(LIGHT, image_size=64, patch=4, groups=16),
    "fine64": replace(LIGHT, image_size=64, groups=16),
    "tiny16": replace(LIGHT, image_size=16, channels=8, multipliers=(1, 2), groups=4),
}
"""unet32 and unet64 are the official networks; small32, small64 and quick64 are for processors. base32 is small32 with
a stem of stride 1 and attention, almost five times the work. quick64 sees 64 pixels for the work of small32, by a stem
of stride 4; fine64 has one of stride 2, for four times the work. tiny16 is for trying things."""


def time_embedding(t: Tensor, dim: int, shift: int = 0) -> Tensor:
    """Sinusoidal embedding of t: [B] -> [B, dim], cosines first, frequencies exp(-ln(1e4) i / (dim / 2 - shift))."""
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(i * (-math.log(10000.0) / (half - shift)))[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def zero(conv: nn.Module) -> nn.Module:
    """The same module with all parameters zero, so that its block starts as the identity."""
    for p in conv.parameters():
        nn.init.zeros_(p)
    return conv


class GroupNorm(nn.GroupNorm):
    """Group norm that reads and writes the precision of its input, also under autocast.

    On CUDA autocast would make it, and all until the next convolution, work in fp32: twice the memory traffic,
    which is what this network waits for. Mean and variance are taken in fp32 all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._without_autocast(x)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def _without_autocast(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding: [B, c_in, H, W] -> [B, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, config: UNetConfig) -> None:
        super().__init__()
        groups, eps = config.groups, config.eps
        self.scale_shift = config.scale_shift
        self.in_layers = nn.Sequential(
            GroupNorm(groups, c_in, eps), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, (1 + config.scale_shift) * c_out))
        # The third place is the official network's dropout, kept as a name only: its rate was 0.
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out, eps),
            nn.SiLU(),
            nn.Identity(),
            zero(nn.Conv2d(c_out, c_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        condition = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + condition)
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[1](h))


class Attention(nn.Module):
    """Self-attention over positions, heads in the legacy order (heads split before q, k, v)."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.heads
        self.norm = GroupNorm(config.groups, channels, config.eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, c, height, width = x.shape
        flat = x.reshape(b, c, height * width)  # [B, C, T]
        qkv = self.qkv(self.norm(flat)).reshape(b * self.heads, 3 * c // self.heads, height * width)
        q, k, v = qkv.chunk(3, dim=1)  # [B * heads, C / heads, T]
        scale = (c // self.heads) ** -0.25
        weight = torch.softmax(torch.bmm((q * scale).transpose(1, 2), k * scale).float(), dim=-1).to(v.dtype)
        h = torch.bmm(v, weight.transpose(1, 2)).reshape(b, c, height * width)
        return (flat + self.proj_out(h)).reshape(b, c, height, width)


class Stem(nn.Conv2d):
    """The first convolution, from RGB."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return self._conv_forward(x, self.weight, self.bias)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution."""

    def __init__(self, channels: int, pad_after: bool) -> None:
        super().__init__()
        self.pad_after = pad_after
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_after else 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(F.pad(x, [0, 1, 0, 1]) if self.pad_after else x)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then (where asked for) a convolution."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # F.interpolate, scripted, names every mode's operator, and so one that older PyTorch does not have.
        return self.conv(torch.ops.aten.upsample_nearest2d(x, None, [2.0, 2.0]))


class Block(nn.Sequential):
    """Layers in a row, each called with the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb)
        return x


def pool(h: Tensor, pooling: list[str]) -> list[Tensor]:
    """h [B, C, H, W] -> one [B, C] for each of `pooling`, in float32: "mean" or "std" over space."""
    flat = h.float().flatten(2)
    mean = flat.mean([2])
    pooled: list[Tensor] = []
    for kind in pooling:
        if kind == "mean":
            pooled.append(mean)
        else:
            # By the norm, because var() is many times slower on processors. The small number keeps the gradient finite
            # where a channel is constant.
            norm = torch.linalg.vector_norm(flat - mean.unsqueeze(2), dim=[2])
            pooled.append((norm * norm / flat.shape[2] + 1e-6).sqrt())
    return pooled


class UNet(nn.Module):
    """Velocity network: x [B, 3, S, S] and t [B] (noise 0, data 1, unscaled) -> v [B, 3, S, S].

    Its blocks are numbered in the order they run: input_blocks, middle_block, output_blocks. `activations`
    pools the outputs of chosen blocks over space and runs no block past the last one chosen.

    It computes in the precision of its weights and answers in float32.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.patch = config.patch
        self.times = config.times
        self.freq_shift = config.freq_shift
        emb_dim = 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )

        def level(c_in: int, c_out: int, factor: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(c_in, c_out, emb_dim, config)]
            if factor in config.attention:
                layers.append(Attention(c_out, config))
            return layers

        widths = [config.channels * m for m in config.multipliers]
        width = widths[0]
        inputs = [Block(stem(config.patch, width))]
        pushed, skips = [config.skip_all], [width] if config.skip_all else []
        for i, c_out in enumerate(widths):
            for _ in range(config.blocks):
                inputs.append(Block(*level(width, c_out, 2**i)))
                width = c_out
                pushed.append(True)
                skips.append(width)
            if i < len(widths) - 1:
                inputs.append(Block(Downsample(width, config.pad_after)))
                pushed.append(config.skip_all)
                skips += [width] if config.skip_all else []
        self.input_blocks = nn.ModuleList(inputs)
        self.pushed = pushed

        middle: list[nn.Module] = [ResBlock(width, width, emb_dim, config)]
        if config.middle_attention:
            middle += [Attention(width, config), ResBlock(width, width, emb_dim, config)]
        self.middle_block = Block(*middle)

        outputs = []
        per_level = config.blocks + int(config.skip_all)
        for i, c_out in reversed(list(enumerate(widths))):
            for j in range(per_level):
                layers = level(width + skips.pop(), c_out, 2**i)
                width = c_out
                if i > 0 and j == per_level - 1:
                    layers.append(Upsample(width, config.resample_conv))
                outputs.append(Block(*layers))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(
            GroupNorm(config.groups, width, config.eps),
            nn.SiLU(),
            zero(nn.Conv2d(width, 3 * config.patch**2, 3, padding=1)),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, _ = self.walk(x, t, [], [], len(self.input_blocks) + len(self.output_blocks))
        v = self.out(h).float()
        return F.pixel_shuffle(v, self.patch) if self.patch > 1 else v

    def activations(self, x: Tensor, t: Tensor, blocks: list[int], pooling: list[str]) -> Tensor:
        """Outputs of the numbered blocks in running order, each pooled over space: [B, channels x poolings]."""
        _, pooled = self.walk(x, t, blocks, pooling, max(blocks))
        return torch.cat(pooled, dim=1)

    def walk(
        self, x: Tensor, t: Tensor, taps: list[int], pooling: list[str], last: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks up to number `last`; returns its output, and what is pooled of those in `taps`."""
        precision = self.out[2].weight.dtype
        if self.times > 0:
            t = (self.times * (1 - t) - 1).clamp(0, self.times - 1)
        embedded = time_embedding(t, self.channels, self.freq_shift)
        emb = self.time_embed(embedded.to(precision))  # type: ignore[arg-type]
        h = x.to(precision)  # type: ignore[arg-type]
        number = 0
        pooled: list[Tensor] = []
        skips: list[Tensor] = []
        for block in self.input_blocks:
            if number <= last:
                h = block(h, emb)
                if self.pushed[number]:
                    skips.append(h)
                if number in taps:
                    pooled = pooled + pool(h, pooling)
            number += 1
        if number <= last:
            h = self.middle_block(h, emb)
            if number in taps:
                pooled = pooled + pool(h, pooling)
        number += 1
        for block in self.output_blocks:
            if number <= last:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
                if number in taps:
                    pooled = pooled + pool(h, pooling)
            number += 1
        return h, pooled

    def block_names(self) -> list[str]:
        """Names of the blocks in running order; a block's number is its place here."""
        return [
            *(f"input_blocks.{i}" for i in range(len(self.input_blocks))),
            "middle_block",
            *(f"output_blocks.{i}" for i in range(len(self.output_blocks))),
        ]

    def block_numbers(self, names: tuple[str, ...]) -> list[int]:
        """Numbers of the named blocks; "input_blocks" and "output_blocks" stand for all of theirs.

        Raises ValueError for an unknown name or names out of running order.
        """
        known = self.block_names()
        found = [[k for k in known if name in (k, k.partition(".")[0])] for name in names]
        unknown = [name for name, blocks in zip(names, found, strict=True) if not blocks]
        if unknown or not names:
            raise ValueError(f"unknown layers {unknown}: this network has {', '.join(known)}")
        numbers = [known.index(block) for blocks in found for block in blocks]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers must be named once each, in running order: {', '.join(known)}")
        return numbers


def shapes_of(config: UNetConfig) -> dict[str, torch.Size]:
    """Names and shapes of such a network's weights; nothing is computed."""
    with torch.device("meta"):
        return {k: v.shape for k, v in UNet(config).state_dict().items()}


def fitting_presets(weights: dict[str, Tensor]) -> list[str]:
    """Names of the presets whose networks have weights of these names and shapes."""
    shapes = {k: v.shape for k, v in weights.items()}
    return [name for name, config in PRESETS.items() if shapes_of(config) == shapes]


def stem(patch: int, width: int) -> Stem:
    """RGB to `width` channels: 3x3, or twice the stride wide."""
    return Stem(3, width, 3, padding=1) if patch == 1 else Stem(3, width, 2 * patch, patch, patch // 2)
