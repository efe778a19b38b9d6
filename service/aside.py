"""Decoding in processes of their own: what may take long, much memory, or crash its decoder."""

import asyncio
import multiprocessing
import resource
import sys
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from pebble import ProcessExpired, ProcessPool

from entry.config import ImageSpec
from entry.images import Limits, load_image
from service.errors import IMAGE_NOT_DECODABLE, image_error

SECONDS = 10.0
"""One image may take, from when its process begins with it."""
MEMORY_BYTES = 1200 << 20
"""A process may take so much beside what it takes when idle. Of the pictures allowed a WebP with alpha needs most, 960
MB at 49 megapixels."""
IMAGES = 100
"""After so many a process is replaced, and gives back the memory that it has kept."""


class Aside:
    """Processes that decode. One that takes too long is killed, and only its own image is an error."""

    def __init__(self, limits: Limits, count: int) -> None:
        self._limits = limits
        self._count = count
        self._pool = self._new()

    async def load(self, data: bytes, spec: ImageSpec) -> np.ndarray:
        """The image, uint8 [3, S, S]; cancelled, its process is killed. Raises ImageError."""
        # One whose process is killed while it starts is broken for good.
        if not self._pool.active:
            self._pool = self._new()
        task = self._pool.schedule(load_image, (data, spec, self._limits), timeout=SECONDS)
        try:
            image: np.ndarray = await asyncio.wrap_future(task)
        except TookTooLong:
            raise image_error(IMAGE_NOT_DECODABLE, f"decoding it takes over {SECONDS:g} s") from None
        except (ProcessExpired, BrokenProcessPool):
            raise image_error(IMAGE_NOT_DECODABLE, "its decoder failed on it") from None
        return image

    async def close(self) -> None:
        """End the processes."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        await asyncio.to_thread(self._pool.join)

    def _new(self) -> ProcessPool:
        # Its processes start with the first image. A fork would copy the locks of our threads.
        spawn = multiprocessing.get_context("spawn")
        return ProcessPool(self._count, max_tasks=IMAGES, initializer=_bound_memory, context=spawn)


def _bound_memory() -> None:
    # Other systems neither say what is taken nor keep to such a bound.
    if sys.platform != "linux":
        return
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))
