"""Corruptions of pictures at five severities (Hendrycks and Dietterich 2019), a row each.

The severities are those of CIFAR-10-C for 32 pixels and of Tiny-ImageNet-C for 64. `frost` is left out, because it
needs photographs of frost, and the four that are published as a validation set of their own.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prg.studies import filters

SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED = {32: "CIFAR-10-C", 64: "Tiny-ImageNet-C"}
"""Whose severities they are, by the side of the pictures."""

Corrupt = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
"""corrupt(picture float64 [S, S, 3] in [0, 1], one of the severities' constants, generator) -> the same shape."""


@dataclass(frozen=True)
class Corruption:
    """One way in which pictures go bad."""

    group: str
    """noise, blur, weather or digital."""
    corrupt: Corrupt
    constants: dict[int, tuple[Any, ...]]
    """What `corrupt` is given at severity 1 to 5, by the side of the pictures."""


def corrupted(pixels: np.ndarray, name: str, severity: int, first: int = 0) -> np.ndarray:
    """uint8 [N, 3, S, S], corrupted; each image by a generator of its own, seeded by its number from `first`.

    Raises ValueError for an unknown name or severity, and for a side without published severities.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}: choose one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity = {severity}: choose one from {SEVERITIES[0]} to {SEVERITIES[-1]}")
    if pixels.shape[-1] not in PUBLISHED:
        sides = " and ".join(map(str, PUBLISHED))
        raise ValueError(f"pictures of {pixels.shape[-1]} pixels: there are severities for {sides}")
    row = CORRUPTIONS[name]
    constants = row.constants[pixels.shape[-1]][severity - 1]
    out = np.empty_like(pixels)
    for i, image in enumerate(pixels):
        generator = np.random.default_rng([zlib.crc32(name.encode()), severity, first + i])
        picture = row.corrupt(image.transpose(1, 2, 0) / 255, constants, generator)
        out[i] = (picture.clip(0, 1) * 255).astype(np.uint8).transpose(2, 0, 1)
    return out


ZOOMS = (1.06, 1.11, 1.16, 1.21, 1.26)
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        "noise",
        filters.gaussian_noise,
        {32: (0.04, 0.06, 0.08, 0.09, 0.10), 64: (0.04, 0.08, 0.12, 0.15, 0.18)},
    ),
    "shot_noise": Corruption(
        "noise", filters.shot_noise, {32: (500, 250, 100, 75, 50), 64: (250, 100, 50, 30, 15)}
    ),
    "impulse_noise": Corruption(
        "noise",
        filters.impulse_noise,
        {32: (0.01, 0.02, 0.03, 0.05, 0.07), 64: (0.01, 0.02, 0.05, 0.08, 0.14)},
    ),
    "defocus_blur": Corruption(
        "blur",
        filters.defocus_blur,
        {
            32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        },
    ),
    "glass_blur": Corruption(
        "blur",
        filters.glass_blur,
        {
            32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        },
    ),
    "motion_blur": Corruption(
        "blur",
        filters.motion_blur,
        {
            32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        },
    ),
    "zoom_blur": Corruption("blur", filters.zoom_blur, {32: ZOOMS, 64: ZOOMS}),
    "snow": Corruption(
        "weather",
        filters.snow,
        {
            32: (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            64: (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
            ),
        },
    ),
    "fog": Corruption(
        "weather",
        filters.fog,
        {
            32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        },
    ),
    "brightness": Corruption(
        "weather", filters.brightness, {32: (0.05, 0.1, 0.15, 0.2, 0.3), 64: (0.1, 0.2, 0.3, 0.4, 0.5)}
    ),
    "contrast": Corruption(
        "digital", filters.contrast, {32: (0.75, 0.5, 0.4, 0.3, 0.15), 64: (0.4, 0.3, 0.2, 0.1, 0.05)}
    ),
    "elastic_transform": Corruption(
        "digital",
        filters.elastic_transform,
        {
            32: ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
            64: ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
        },
    ),
    "pixelate": Corruption(
        "digital", filters.pixelate, {32: (0.95, 0.9, 0.85, 0.75, 0.65), 64: (0.9, 0.8, 0.7, 0.6, 0.5)}
    ),
    "jpeg_compression": Corruption(
        "digital", filters.jpeg_compression, {32: (80, 65, 58, 50, 40), 64: (65, 58, 50, 40, 25)}
    ),
}
