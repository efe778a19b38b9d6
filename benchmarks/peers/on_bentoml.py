"""BentoML: images by multipart, decoded and computed in one batchable call."""

from __future__ import annotations

import bentoml
import numpy as np
from PIL.Image import Image

from benchmarks.peers.engine import MAX_BATCH, Engine
from entry.images import image_array


@bentoml.service
class Embed:
    def __init__(self) -> None:
        self.engine = Engine()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def embed(self, images: list[Image]) -> np.ndarray:
        spec = self.engine.spec
        return self.engine.embed([image_array(image, spec) for image in images])
