"""Deterministic weights for the golden vectors: the same numbers on every machine.

`fill(state, salt)` overwrites each tensor of a state dict in place. Keys must be the plain
ones: `unet.<key>` as in unet32_keys.txt / unet64_keys.txt, and `head.classifier.<i>.<name>`.
The salt of the golden files in this folder is "public". `image_batch` gives their x.
"""

import math
import zlib

import torch


def fill(state: dict[str, torch.Tensor], salt: str = "public") -> None:
    with torch.no_grad():
        for key, tensor in state.items():
            n = tensor.numel()
            i = torch.arange(n, dtype=torch.float64)
            w = torch.sin(i * 0.7310585 + zlib.crc32((salt + key).encode()) % 10007)
            if tensor.dim() > 1:
                w = w * math.sqrt(2.0 / (n / tensor.shape[0])) * 0.9
            elif key.endswith("weight"):
                w = 1 + 0.1 * w
            else:
                w = 0.05 * w
            tensor.copy_(w.reshape(tensor.shape).float())


def image_batch(size: int, salt: str = "public") -> torch.Tensor:
    """x of the golden files, shape [2, 3, size, size]."""
    i = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return torch.sin(i * 0.1234567 + zlib.crc32(salt.encode()) % 1000).reshape(2, 3, size, size).float()
