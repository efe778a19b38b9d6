"""What computes embeddings: an entry in this process (`local`), or a running service (`remote`)."""

from typing import Any, Protocol

import numpy as np


class Embedder(Protocol):
    """What computes."""

    identity: dict[str, Any]
    """fingerprint (of the encoder), feature, t_end, dim and normalize: vectors of another identity can't be compared
    with these."""
    batch: int
    """How many images to give it at once."""

    def prepare(self, content: bytes) -> Any:
        """What `embed` takes, from a file's bytes; called by several threads. Raises ImageError."""

    def embed(self, prepared: list[Any]) -> list[np.ndarray | str]:
        """For each image its embedding, float32 [D], or why it has none."""

    def close(self) -> None:
        """Free what it holds."""
