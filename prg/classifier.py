"""Heads, and the classifier: encoder and head together."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from prg.encoder import STATE_DIM, Encoder

HeadKind = Literal["mlp", "linear"]
"""Forms of a head; `finetune.head` of a recipe. prg.reopen, prg.training.frozen and prg.importers.official know their
layers too."""


@dataclass(frozen=True)
class HeadConfig:
    """What the head reads, its form, and its number of classes."""

    classes: int
    reads: tuple[str, ...] = ("state",)
    """Features in order: "state", "hidden" (all of it), or a part of it such as "middle_block.mean"."""
    kind: HeadKind = "mlp"
    """mlp: the official head, LayerNorm, Linear, Tanh, Linear without bias. linear: LayerNorm, Linear."""


class Head(nn.Module):
    """Features to logits; the parameter names of the mlp are the official ones."""

    def __init__(self, encoder: Encoder, config: HeadConfig) -> None:
        super().__init__()
        self.columns = columns(encoder, config.reads)
        dim = sum(end - start for start, end in self.columns)
        layers: list[nn.Module] = [nn.LayerNorm(dim)]
        if config.kind == "mlp":
            layers += [nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.classes, bias=False)]
        else:
            layers += [nn.Linear(dim, config.classes)]
        self.classifier = nn.Sequential(*layers)

    def forward(self, state: Tensor, hidden: Tensor) -> Tensor:
        """STATE [B, 768], HIDDEN [B, D_h] -> LOGITS [B, K]."""
        return self.classifier(self.read(state, hidden))

    def read(self, state: Tensor, hidden: Tensor) -> Tensor:
        """What it reads of them, [B, D]."""
        both = torch.cat([state, hidden], dim=1)
        parts: list[Tensor] = []
        for start, end in self.columns:
            parts.append(both[:, start:end])
        return torch.cat(parts, dim=1)


def columns(encoder: Encoder, reads: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where each of `reads` begins and ends in STATE followed by HIDDEN. Raises ValueError for an unknown one."""
    widths = {"state": STATE_DIM} | encoder.widths
    places = dict(zip(widths, pairwise(accumulate(widths.values(), initial=0)), strict=True))
    places["hidden"] = (STATE_DIM, STATE_DIM + encoder.hidden_dim)
    unknown = [name for name in reads if name not in places]
    if unknown or not reads:
        raise ValueError(f"a head can't read {unknown}; there are: {', '.join(places)}")
    return [places[name] for name in reads]


class Classifier(nn.Module):
    """Encoder and head, trained together through the ODE."""

    def __init__(self, encoder: Encoder, config: HeadConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Head(encoder, config)

    def forward(self, x: Tensor, t_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, 3, S, S] normalised, t_end [B] -> STATE [B, 768], HIDDEN [B, D_h], LOGITS [B, K]."""
        state, hidden = self.encoder(x, t_end)
        return state, hidden, self.head(state, hidden)
