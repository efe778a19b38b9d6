"""RandAugment in torch: two random operations an image, of random strength, on uint8 batches.

In the form known as rand-m9-mstd0.5-inc1 (Cubuk et al. 2020): fifteen operations, each of the two done with
probability a half, its magnitude normal around 9 of 10. Every operation takes and gives uint8 [N, 3, S, S]
and magnitudes [N] in [0, 1]; where there are two directions, the magnitude's sign picks one.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, PROBABILITY, MAGNITUDE, SPREAD = 2, 0.5, 0.9, 0.05
FILL = 128.0
"""Grey, for what an operation moves into the image."""

Operation = Callable[[Tensor, Tensor], Tensor]


def randaugment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Two operations for each image, drawn with their magnitudes and directions."""
    b, device = len(pixels), pixels.device
    for _ in range(LAYERS):
        chosen = torch.randint(len(OPERATIONS), (b,), generator=generator, device=device)
        done = torch.rand(b, generator=generator, device=device) < PROBABILITY
        strength = torch.randn(b, generator=generator, device=device) * SPREAD + MAGNITUDE
        direction = torch.randint(0, 2, (b,), generator=generator, device=device) * 2 - 1
        magnitude = strength.clamp(0, 1) * direction
        pixels = pixels.clone()
        for number, operation in enumerate(OPERATIONS.values()):
            rows = torch.nonzero(done & (chosen == number))[:, 0]
            if len(rows):
                pixels[rows] = operation(pixels[rows], magnitude[rows])
    return pixels


def grey(pixels: Tensor) -> Tensor:
    """Luma (ITU-R 601) [N, 1, S, S] in float32."""
    weights = torch.tensor((0.299, 0.587, 0.114), device=pixels.device)[:, None, None]
    return (pixels.float() * weights).sum(1, keepdim=True)


def blend(plain: Tensor, pixels: Tensor, magnitude: Tensor) -> Tensor:
    """From `plain` (0) by way of the image itself (1) and beyond, at 1 + 0.9 magnitude."""
    factor = 1 + 0.9 * magnitude[:, None, None, None]
    return as_bytes(plain + factor * (pixels.float() - plain))


def as_bytes(values: Tensor) -> Tensor:
    """Rounded and clipped."""
    return values.round().clamp(0, 255).byte()


def autocontrast(pixels: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    x = pixels.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, as_bytes((x - low) * 255 / (high - low).clamp(min=1)), pixels)


def equalize(pixels: Tensor, _: Tensor) -> Tensor:
    """Flatten each channel's histogram."""
    n, c, h, w = pixels.shape
    values = pixels.reshape(n * c, h * w).long()
    ones = torch.ones_like(values)
    counts = torch.zeros(n * c, 256, dtype=torch.int64, device=pixels.device).scatter_add_(1, values, ones)
    last = counts.gather(1, values.amax(1, keepdim=True))  # of the brightest value there is
    step = (h * w - last) // 255  # pixels a level
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(0, 255)
    return torch.where(step > 0, table.gather(1, values), values).byte().reshape(n, c, h, w)


def invert(pixels: Tensor, _: Tensor) -> Tensor:
    """The negative."""
    return 255 - pixels


def posterize(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the 4 to 0 highest bits of each value."""
    bits = 4 - (magnitude.abs() * 4).floor().long()
    return pixels & (256 - 2 ** (8 - bits)).byte()[:, None, None, None]


def solarize(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """Invert what is brighter than a threshold."""
    threshold = 256 - (magnitude.abs() * 256).floor()
    return torch.where(pixels < threshold[:, None, None, None], pixels, 255 - pixels)


def solarize_add(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """Brighten the darker half."""
    added = as_bytes(pixels + (magnitude.abs() * 110).floor()[:, None, None, None])
    return torch.where(pixels < 128, added, pixels)


def colour(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """More or less saturated."""
    return blend(grey(pixels), pixels, magnitude)


def contrast(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """More or less contrast around the mean."""
    return blend(grey(pixels).mean((2, 3), keepdim=True), pixels, magnitude)


def brightness(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """Brighter or darker."""
    return blend(torch.zeros_like(pixels, dtype=torch.float32), pixels, magnitude)


def sharpness(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """Sharper or smoother; the border stays as it is."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    smooth = pixels.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels.float(), kernel / 13, groups=3)
    return blend(smooth, pixels, magnitude)


def affine(pixels: Tensor, rows: list[Tensor | float]) -> Tensor:
    """Each image under its own map, whose six entries are `rows`, a number or one an image; grey from outside."""
    entries = [
        torch.as_tensor(r, dtype=torch.float32, device=pixels.device).expand(len(pixels)) for r in rows
    ]
    theta = torch.stack(entries, 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels.float() - FILL, grid, "bilinear", "zeros", align_corners=False)
    return as_bytes(moved + FILL)


def rotate(pixels: Tensor, magnitude: Tensor) -> Tensor:
    """Turn by up to 30 degrees."""
    angle = magnitude * math.pi / 6
    return affine(pixels, [angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0])


OPERATIONS: dict[str, Operation] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "colour": colour,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "rotate": rotate,
    # By up to 0.3 of the side, and by up to 0.45 of it; the side is 2 long.
    "shear_x": lambda pixels, m: affine(pixels, [1, 0.3 * m, 0, 0, 1, 0]),
    "shear_y": lambda pixels, m: affine(pixels, [1, 0, 0, 0.3 * m, 1, 0]),
    "translate_x": lambda pixels, m: affine(pixels, [1, 0, 0.9 * m, 0, 1, 0]),
    "translate_y": lambda pixels, m: affine(pixels, [1, 0, 0, 0, 1, 0.9 * m]),
}
