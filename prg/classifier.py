"""Heads, and the classifier: encoder and head together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prg.encoder import STATE_DIM, Encoder

HeadInput = Literal["state", "hidden", "both"]
HeadKind = Literal["mlp", "linear"]


@dataclass(frozen=True)
class HeadConfig:
    """What the head reads, its form, and how many classes it tells apart."""

    classes: int
    input: HeadInput = "state"
    kind: HeadKind = "mlp"
    """mlp: the official head, LayerNorm, Linear, Tanh, Linear without bias. linear: LayerNorm, Linear."""


class Head(nn.Module):
    """Features to logits; the parameter names of the mlp are the official ones."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(dim)]
        if config.kind == "mlp":
            layers += [nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.classes, bias=False)]
        else:
            layers += [nn.Linear(dim, config.classes)]
        self.classifier = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, K]."""
        return self.classifier(features)


class Classifier(nn.Module):
    """Encoder and head, trained together through the ODE."""

    def __init__(self, encoder: Encoder, config: HeadConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.input: str = config.input
        dims = {"state": STATE_DIM, "hidden": encoder.hidden_dim, "both": STATE_DIM + encoder.hidden_dim}
        self.head = Head(dims[config.input], config)

    def forward(self, x: Tensor, t_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, 3, S, S] normalised, t_end [B] -> STATE [B, 768], HIDDEN [B, D_h], LOGITS [B, K]."""
        state, hidden = self.encoder(x, t_end)
        return state, hidden, self.head(self.head_input(state, hidden))

    def head_input(self, state: Tensor, hidden: Tensor) -> Tensor:
        """What the head reads: [B, D]."""
        if self.input == "state":
            return state
        if self.input == "hidden":
            return hidden
        return torch.cat([state, hidden], dim=1)
