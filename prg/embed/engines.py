"""What computes embeddings: an entry in this process (`local`), or a running service (`remote`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Vectors float32 [N, D] of N files, a row of NaN for each that has an error."""

    vectors: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    fingerprint: str = ""
    """Of the weights: only vectors with the same may be compared."""


class Embedder(Protocol):
    """What computes."""

    identity: dict[str, Any]
    """Weights and options: rows of another identity must not stand in one file."""

    def embed(self, files: list[Path]) -> Rows:
        """Embeddings of these files."""

    def close(self) -> None:
        """Free what it holds."""
