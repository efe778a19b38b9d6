"""Augmentations of uint8 batches, each image its own, driven by one generator."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


AUGMENTATIONS = {"flip": flip, "crop": crop}


def augment(pixels: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """The named augmentations in turn."""
    for name in names:
        pixels = AUGMENTATIONS[name](pixels, generator)
    return pixels


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 (pixel / 255 - mean) / std."""
    m = torch.tensor(mean, device=pixels.device)[:, None, None]
    s = torch.tensor(std, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - m) / s
