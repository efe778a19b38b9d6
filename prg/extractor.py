"""The extractor: all that an entry computes, pixels to features and logits, eager or scripted alike."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entry.config import ImageSpec
from prg.classifier import Head
from prg.encoder import Encoder


class Normalise(nn.Module):
    """uint8 [B, 3, S, S] -> the network's own units."""

    mean: Tensor
    std: Tensor

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(image.mean)[:, None, None] * 255)
        self.register_buffer("std", torch.tensor(image.std)[:, None, None] * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std


class Projection(nn.Module):
    """HIDDEN [B, D_h] -> EMBEDDING [B, D_e]: standardised, projected on directions, each scaled.

    Directions are whole numbers of 8 bits, which keeps an entry small: a cosine moves by less than 1e-3.
    """

    mean: Tensor  # [D_h]
    inverse_std: Tensor  # [D_h], 0 for what is constant
    directions: Tensor  # int8 [D_e, D_h]
    scale: Tensor  # [D_e]

    def __init__(self, mean: Tensor, inverse_std: Tensor, directions: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("inverse_std", inverse_std)
        self.register_buffer("directions", directions)
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        standardised = (hidden - self.mean) * self.inverse_std
        return F.linear(standardised, self.directions.float()) * self.scale


def known(logits: Tensor) -> Tensor:
    """LOGITS [B, K] -> KNOWN [B, 1]: the largest (Hendrycks et al. 2022, MaxLogit)."""
    # By an operator that servers of PyTorch 2.11 were seen to run.
    return -(-logits).amin(1, keepdim=True)


class Extractor(nn.Module):
    """IMAGE uint8 [B, 3, S, S], T_END [B, 1] -> STATE, HIDDEN, EMBEDDING, LOGITS, KNOWN, those that there are.

    KNOWN is there with both the projection and a head. TorchScript compiles the one branch that applies.
    """

    def __init__(
        self,
        encoder: Encoder,
        image: ImageSpec,
        projection: Projection | None = None,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        self.normalise = Normalise(image)
        self.encoder = encoder
        self.projection = projection
        self.head = head

    # Without the type of the answer: TorchScript infers it from the branch that it compiles.
    def forward(self, IMAGE: Tensor, T_END: Tensor):
        state, hidden = self.encoder(self.normalise(IMAGE), T_END.flatten().clamp(0.0, 1.0))
        if self.projection is None:
            if self.head is None:
                return state, hidden
            else:
                return state, hidden, self.head(state, hidden)
        else:
            embedding = self.projection(hidden)
            if self.head is None:
                return state, hidden, embedding
            else:
                logits = self.head(state, hidden)
                return state, hidden, embedding, logits, known(logits)


def outputs(extractor: Any, state: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """All outputs by name from the first two, by the parts of an extractor, eager or scripted."""
    found = {"STATE": state, "HIDDEN": hidden}
    if getattr(extractor, "projection", None) is not None:
        found["EMBEDDING"] = extractor.projection(hidden)
    if getattr(extractor, "head", None) is not None:
        found["LOGITS"] = extractor.head(state, hidden)
    if "EMBEDDING" in found and "LOGITS" in found:
        found["KNOWN"] = known(found["LOGITS"])
    return found
