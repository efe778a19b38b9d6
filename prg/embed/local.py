"""Embeddings by an entry in this process."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from entry.errors import EntryError
from entry.images import ImageError, load_image
from entry.runner import Runner
from entry.vectors import unit_length
from prg.embed.engines import Rows
from prg.images.decoded import LIMITS

BATCH = 32


class Local:
    """An entry in this process."""

    def __init__(
        self,
        directory: Path,
        t_end: float | None = None,
        feature: Literal["embedding", "hidden", "state"] | None = None,
        normalize: bool = False,
    ) -> None:
        self._runner = Runner(directory)
        entry, prg = self._runner.entry, self._runner.entry.prg
        self._t_end = prg.t_end if t_end is None else t_end
        self._feature = feature or prg.feature
        if self._feature.upper() not in entry.outputs():
            raise EntryError(f"{directory}: has no {self._feature}; there are: hidden, state")
        self._normalize = normalize
        self._pool = ThreadPoolExecutor()
        self.identity = {
            "fingerprint": entry.fingerprints(self._runner.version).encoder,
            "t_end": self._t_end,
            "feature": self._feature,
            "normalize": normalize,
        }

    def embed(self, files: list[Path]) -> Rows:
        """Embeddings of these files."""
        decoded = list(self._pool.map(self._decode, files))
        good = {i: image for i, image in enumerate(decoded) if isinstance(image, np.ndarray)}
        dim = self._runner.entry.outputs()[self._feature.upper()]
        vectors = np.full((len(files), dim), np.nan, np.float32)
        for start in range(0, len(good), BATCH):
            rows = list(good)[start : start + BATCH]
            images = np.stack([good[i] for i in rows])
            outputs = self._runner.run(images, np.full(len(rows), self._t_end, np.float32))
            vectors[rows] = outputs[self._feature.upper()]
        if self._normalize:
            vectors = unit_length(vectors)
        errors = {i: str(d) for i, d in enumerate(decoded) if not isinstance(d, np.ndarray)}
        return Rows(vectors, errors, str(self.identity["fingerprint"]))

    def close(self) -> None:
        """End the decoding threads."""
        self._pool.shutdown()

    def _decode(self, file: Path) -> np.ndarray | Exception:
        try:
            return load_image(file.read_bytes(), self._runner.entry.prg.image, LIMITS)
        except (ImageError, OSError) as error:
            return error
