"""What every server runs: the entry's own decoding, and its module or a stand-in that takes 20 ms a batch."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from entry.images import load_image
from entry.runner import Runner

MAX_BATCH = 32
STAND_IN = "20 ms a batch"
BATCH_S = 0.02


class Slow(Runner):
    """Takes 20 ms for a batch of any size and none of this machine's cores, as a GPU would."""

    def run(self, images: np.ndarray, t_end: np.ndarray) -> dict[str, np.ndarray]:
        """An EMBEDDING of the entry's length that shows which image it is of: its first pixels."""
        time.sleep(BATCH_S)
        dim = self.entry.outputs()["EMBEDDING"]
        return {"EMBEDDING": images.reshape(len(images), -1)[:, :dim].astype(np.float32) / 255}


class Engine:
    """An entry, loaded and warm; both come from the environment."""

    def __init__(self) -> None:
        kind = Slow if os.environ["PEERS_ENGINE"] == STAND_IN else Runner
        self._runner = kind(Path(os.environ["PEERS_ENTRY"]))
        self._t_end = self._runner.entry.prg.t_end
        self.spec = self._runner.entry.prg.image
        size = self.spec.size
        # TorchScript compiles in its first calls.
        for batch in (1, MAX_BATCH) * 3:
            self.embed(np.zeros((batch, 3, size, size), np.uint8))

    def decode(self, data: bytes) -> np.ndarray:
        """An image file's bytes to uint8 [3, S, S]."""
        return load_image(data, self.spec)

    def embed(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """float32 [B, D] of decoded images."""
        levels = np.full(len(images), self._t_end, np.float32)
        return self._runner.run(np.stack(images), levels)["EMBEDDING"]
