"""Embeddings by an entry in this process."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from entry.errors import DeviceError, EntryError
from entry.images import load_image
from entry.runner import Runner
from entry.vectors import unit_length
from prg.images.decoded import LIMITS
from prg.machine import choose_device


class Local:
    """An entry in this process, on PRG_DEVICE and in PRG_PRECISION as the service takes them.

    Raises EntryError, DeviceError.
    """

    batch = 32

    def __init__(
        self,
        directory: Path,
        t_end: float | None = None,
        feature: Literal["embedding", "hidden", "state"] | None = None,
        normalize: bool = False,
    ) -> None:
        precision = os.environ.get("PRG_PRECISION") or "entry"
        if precision not in ("entry", "bf16"):
            raise DeviceError(f"PRG_PRECISION={precision}: must be entry or bf16")
        self._runner = Runner(directory, None, str(choose_device()), precision)  # type: ignore[arg-type]
        entry, prg = self._runner.entry, self._runner.entry.prg
        self._t_end = prg.t_end if t_end is None else t_end
        feature = feature or prg.feature
        self._output = feature.upper()
        if self._output not in entry.outputs():
            raise EntryError(f"{directory}: has no {feature}; there are: hidden, state")
        self._normalize = normalize
        self.identity = {
            "fingerprint": entry.fingerprints(self._runner.version).encoder,
            "feature": feature,
            "t_end": self._t_end,
            "dim": entry.outputs()[self._output],
            "normalize": normalize,
        }

    def prepare(self, content: bytes) -> np.ndarray:
        """Pixels, uint8 [3, S, S]. Raises ImageError."""
        return load_image(content, self._runner.entry.prg.image, LIMITS)

    def embed(self, prepared: list[np.ndarray]) -> list[np.ndarray | str]:
        """For each image its embedding, float32 [D]."""
        levels = np.full(len(prepared), self._t_end, np.float32)
        vectors = self._runner.run(np.stack(prepared), levels)[self._output]
        return list(unit_length(vectors) if self._normalize else vectors)

    def close(self) -> None:
        """Nothing is held."""
