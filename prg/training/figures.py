"""Pictures beside a checkpoint: loss curve, generated samples, reverse trajectory."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prg.console import note
from prg.encoder import Encoder
from prg.images.augmentation import normalise
from prg.recipe import Image
from prg.solver import integrate

LEVELS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)


def loss_curve(folder: Path) -> None:
    """metrics.jsonl -> curves.png: training loss, and every figure measured on the validation images."""
    try:
        import matplotlib
    except ModuleNotFoundError:  # on a rented machine, a training is worth more than its picture
        note(f"{folder / 'curves.png'}: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = sorted({k for r in rows for k in r} - {"step", "epoch", "seconds", "lr"})
    losses = [n for n in names if n.endswith("loss")]
    others = [n for n in names if n not in losses]
    panels = [losses] + ([others] if others else [])
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in panel:
            points = [(r["epoch"], r[name]) for r in rows if name in r]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=name)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


@torch.no_grad()
def samples(encoder: Encoder, image: Image, seed: int, path: Path, count: int = 64, steps: int = 25) -> None:
    """Images generated from noise (Heun's method) in a square grid."""
    device = next(encoder.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(count, 3, image.size, image.size, generator=generator, device=device)
    x = integrate(encoder.field, noise, 0.0, encoder.t_start, steps, "heun")
    save_grid(to_pixels(x, image.mean, image.std), round(count**0.5), path)


@torch.no_grad()
def trajectory(encoder: Encoder, image: Image, pixels: np.ndarray, path: Path) -> None:
    """Each image (uint8 [N, 3, S, S]) on its way from data (left) to noise (right), a row each."""
    device = next(encoder.parameters()).device
    x = normalise(torch.from_numpy(np.ascontiguousarray(pixels)).to(device), image.mean, image.std)
    states = []
    for level in LEVELS:
        steps = max(1, round((1 - level) * 20))
        z = integrate(encoder.field, x, encoder.t_start, min(level, encoder.t_start), steps)
        states.append(to_pixels(z, image.mean, image.std))
    rows = np.stack(states, axis=1).reshape(-1, *states[0].shape[1:])
    save_grid(rows, len(LEVELS), path)


def to_pixels(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Network units [B, 3, S, S] -> uint8 of the same shape, clipped."""
    m, s = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    pixels: np.ndarray = ((x * s + m).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return pixels


def save_grid(pixels: np.ndarray, columns: int, path: Path, zoom: int = 3, gap: int = 2) -> None:
    """uint8 [N, 3, S, S] as one PNG, row by row, enlarged."""
    from PIL import Image as Picture

    count, _, side, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (side + gap) + gap, columns * (side + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = (gap + place * (side + gap) for place in divmod(i, columns))
        sheet[y : y + side, x : x + side] = image.transpose(1, 2, 0)
    picture = Picture.fromarray(sheet)
    picture.resize((picture.width * zoom, picture.height * zoom), Picture.Resampling.NEAREST).save(path)
