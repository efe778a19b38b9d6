"""What a training ends with: the projection and a calibration, fitted on its own images."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entry.config import Calibration, ImageSpec
from prg.checkpoint import FittedOn
from prg.classifier import Head
from prg.console import note, track
from prg.encoder import Encoder
from prg.errors import FittingError
from prg.extractor import Projection
from prg.fitting import calibrate, fit_projection
from prg.images.augmentation import normalise
from prg.images.sets import Images, Pixels, sample_evenly
from prg.recipe import Recipe

BATCH = 128
MOST = 4000
"""Images that the projection is fitted to, at most."""


@dataclass(frozen=True)
class Fitted:
    """What was fitted, and to what; all None where there are too few images."""

    projection: Projection | None = None
    on: FittedOn | None = None
    calibration: Calibration | None = None


@torch.no_grad()
def fit(
    encoder: Encoder,
    image: ImageSpec,
    t_end: float,
    images: Images,
    head: Head | None = None,
    level: float = 1.0,
    held_out: Images | None = None,
) -> Fitted:
    """The projection at t_end; for a head that is asked at `level` a calibration, on images held out.

    Raises FittingError.
    """
    some = sample_evenly(images, MOST)
    _, hidden = features(encoder, image, some.pixels, t_end, "fitting the embedding")
    projection = fit_projection(hidden).to(hidden.device)
    on = FittedOn(images=len(some), t_end=t_end)
    if head is None or held_out is None:
        return Fitted(projection, on)
    logits = head(*features(encoder, image, held_out.pixels, level, "calibrating"))
    assert held_out.labels is not None
    return Fitted(projection, on, calibrate(logits.cpu().numpy(), held_out.labels))


def fit_if_enough(
    encoder: Encoder, recipe: Recipe, images: Images, head: Head | None = None, held_out: Images | None = None
) -> Fitted:
    """The same for a training, which nothing is lost of where there are too few images: a note says so."""
    try:
        return fit(
            encoder,
            recipe.image.spec,
            recipe.serve.t_end,
            images,
            head,
            recipe.finetune.t_end[0],
            held_out,
        )
    except FittingError as error:
        note(f"no embedding: {error}")
        return Fitted()


def labels_of(images: Images, like: Tensor) -> Tensor:
    """Labels as a tensor, on the device of another."""
    assert images.labels is not None
    return torch.from_numpy(images.labels).to(like.device)


@torch.no_grad()
def features(
    encoder: Encoder, image: ImageSpec, pixels: Pixels, level: float, title: str, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """STATE [N, 768] and HIDDEN [N, D_h] of pixels uint8 [N, 3, S, S], on the encoder's device."""
    device = next(encoder.parameters()).device
    parts = []
    with track(title, len(pixels)) as bar:
        for start in range(0, len(pixels), BATCH):
            block = np.ascontiguousarray(pixels[start : start + BATCH])
            x = normalise(torch.from_numpy(block).to(device), image.mean, image.std)
            parts.append(encoder(x.flip(3) if mirrored else x, x.new_full((len(x),), level)))
            bar.advance(len(x))
    states, hiddens = zip(*parts, strict=True)
    return torch.cat(states), torch.cat(hiddens)
