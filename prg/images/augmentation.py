"""Augmentations of uint8 batches, each image its own, driven by one generator."""

# kornia's augmentations draw from the global generator and take floats alone, so a resumed run could not repeat them.

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prg.images.randaugment import randaugment

ERASED = 0.25
"""Share of images of which a rectangle is erased (official)."""


def flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images left to right: [B, 3, S, S]."""
    mirrored = torch.rand(len(pixels), generator=generator, device=pixels.device) < 0.5
    return torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)


def crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to an eighth of the side (4 of 32, official) after padding with zeros: [B, 3, S, S]."""
    b, _, side, _ = pixels.shape
    pad = side // 8
    padded = F.pad(pixels, (pad, pad, pad, pad))
    shift = torch.randint(0, 2 * pad + 1, (2, b), generator=generator, device=pixels.device)
    line = torch.arange(side, device=pixels.device)
    rows = shift[0][:, None] + line  # [B, S]
    columns = shift[1][:, None] + line
    image = torch.arange(b, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each image, 8 to 100 % of its area and up to 4:3 either way, at the size of the whole."""
    b = len(pixels)
    area, ratio, x, y = torch.rand(4, b, generator=generator, device=pixels.device)
    area = 0.08 + 0.92 * area
    aspect = torch.exp((2 * ratio - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # of the side
    zero = torch.zeros_like(width)
    rows = [width, zero, (2 * x - 1) * (1 - width), zero, height, (2 * y - 1) * (1 - height)]
    theta = torch.stack(rows, 1).reshape(b, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # Never smaller than what is cut from the image, so there is nothing to filter against aliasing.
    whole = F.grid_sample(pixels.float(), grid, "bicubic", "border", align_corners=False)
    return whole.round().clamp(0, 255).byte()


def erase(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a rectangle of a quarter of the images with noise: 2 to 33 % of the area, up to 10:3 either way."""
    b, _, side, _ = pixels.shape
    drawn, area, ratio, x, y = torch.rand(5, b, generator=generator, device=pixels.device)
    area = (0.02 + 0.31 * area) * side * side
    aspect = torch.exp((2 * ratio - 1) * math.log(10 / 3))
    width = (area * aspect).sqrt().round().clamp(1, side)
    height = (area / aspect).sqrt().round().clamp(1, side)
    inside = _inside(side, x * (side - width + 1), y * (side - height + 1), width, height)
    noise = torch.randint(0, 256, pixels.shape, generator=generator, device=pixels.device, dtype=torch.uint8)
    return torch.where((inside & (drawn < ERASED)[:, None, None])[:, None], noise, pixels)


AUGMENTATIONS = {
    "flip": flip,
    "crop": crop,
    "resized_crop": resized_crop,
    "randaugment": randaugment,
    "erase": erase,
}


def augment(pixels: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """The named augmentations in turn.

    Contiguous: strides left over from a crop would make every convolution run channels last, where bf16 group
    norm takes several times as long on processors.
    """
    for name in names:
        pixels = AUGMENTATIONS[name](pixels, generator)
    return pixels.contiguous()


def mix(
    x: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each image with another of the batch, by a share of its own: (x [B, 3, S, S], classes' shares [B, K]).

    mixup, cutmix: parameter of the Beta distribution of that share; 0: not done. Mixup (Zhang et al. 2018)
    averages the two, cutmix (Yun et al. 2019) pastes a rectangle; where both are done, each image gets one.
    """
    b, _, side, _ = x.shape
    seed = int(torch.randint(2**62, (1,), generator=generator, device=x.device))
    rng = np.random.default_rng(seed)  # torch draws no Beta from a generator of one's own
    other = torch.from_numpy(rng.permutation(b)).to(x.device)
    pasted = rng.random(b) < (0.5 if mixup and cutmix else float(cutmix > 0))
    share = np.where(pasted, rng.beta(cutmix or 1, cutmix or 1, b), rng.beta(mixup or 1, mixup or 1, b))
    place = torch.from_numpy(rng.random((2, b)).astype(np.float32)).to(x.device)
    own = torch.from_numpy(share.astype(np.float32)).to(x.device)  # [B]
    cut = torch.from_numpy(pasted).to(x.device)

    length = ((1 - own).sqrt() * side).round()  # of a square of the other image
    corner = (place * (side - length + 1)).floor()
    inside = _inside(side, corner[0], corner[1], length, length) & cut[:, None, None]
    blended = torch.where(cut, torch.ones_like(own), own)[:, None, None, None]
    mixed = blended * x + (1 - blended) * x[other]
    mixed = torch.where(inside[:, None], x[other], mixed)
    own = torch.where(cut, 1 - (length / side).square(), own)[:, None]
    one_hot = F.one_hot(labels, classes).float()
    return mixed, own * one_hot + (1 - own) * one_hot[other]


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 (pixel / 255 - mean) / std."""
    m = torch.tensor(mean, device=pixels.device)[:, None, None]
    s = torch.tensor(std, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - m) / s


def _inside(side: int, x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Which pixels lie in each image's rectangle: bool [B, S, S]."""
    line = torch.arange(side, device=x.device)
    across = (line >= x.floor()[:, None]) & (line < (x.floor() + width)[:, None])  # [B, S]
    down = (line >= y.floor()[:, None]) & (line < (y.floor() + height)[:, None])
    return down[:, :, None] & across[:, None, :]
