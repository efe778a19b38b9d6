"""Decoding: a request's images to arrays, each by itself, and but for a small one off the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from entry.config import ImageSpec
from entry.images import LIGHT, Effort, Heavy, ImageError, load_image
from service import tracing
from service.aside import Aside
from service.cores import cores
from service.fetch import Fetcher
from service.intake import Item, Remote
from service.settings import Settings
from service.telemetry import Metrics

SMALL = Effort(pixels=1 << 16, scans=12)
SMALL_BYTES = 16 << 10
"""A small image that comes alone is decoded on the event loop: it takes less than the way to a thread and back."""


class Decoder:
    """Fetches and decodes images. Nothing in a file reaches the image beside it, the event loop or a batch."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._limits = settings.image_limits
        self._fetcher = Fetcher(settings.allow_urls, settings.max_image_bytes)
        self._metrics = metrics
        self._count = cores()
        self._threads = ThreadPoolExecutor(self._count, "decode")
        self._aside = Aside(self._limits, max(1, self._count // 2))

    async def close(self) -> None:
        """Free the threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._aside.close()
        await self._fetcher.close()

    async def decode(self, items: Sequence[Item], spec: ImageSpec) -> list[np.ndarray | ImageError]:
        """Of each image uint8 [3, S, S], or what is wrong with it."""
        # A request has no more images in the threads' queue than there are threads: the next request's come in between.
        places = asyncio.Semaphore(self._count)
        with tracing.span("decode", images=len(items)):
            if len(items) == 1 and (small := self._decode_small(items[0], spec)) is not None:
                return [small]
            return await asyncio.gather(*(self._decode(item, spec, places) for item in items))

    def _decode_small(self, item: Item, spec: ImageSpec) -> np.ndarray | ImageError | None:
        """A small image; None for any other."""
        if isinstance(item, Remote) or len(item.args[0]) > SMALL_BYTES:
            return None
        try:
            with self._metrics.decode_seconds.time():
                return load_image(item(), spec, self._limits, SMALL)
        except Heavy:
            return None
        except ImageError as error:
            return error

    async def _decode(
        self, item: Item, spec: ImageSpec, places: asyncio.Semaphore
    ) -> np.ndarray | ImageError:
        loop = asyncio.get_running_loop()
        try:
            # bytes() of bytes is the object itself.
            read = partial(bytes, await self._fetch(item)) if isinstance(item, Remote) else item
            async with places:
                image = await loop.run_in_executor(self._threads, self._load, read, spec)
                if isinstance(image, bytes):
                    with self._metrics.decode_seconds.time():
                        image = await self._aside.load(image, spec)
            return image
        except ImageError as error:
            return error

    async def _fetch(self, item: Remote) -> bytes:
        with tracing.span("fetch"):
            return await self._fetcher.fetch(item.url)

    def _load(self, read: Callable[[], bytes], spec: ImageSpec) -> np.ndarray | bytes:
        """The image; of one that is to be decoded aside, its bytes."""
        data = read()
        try:
            with self._metrics.decode_seconds.time():
                return load_image(data, spec, self._limits, LIGHT)
        except Heavy:
            return data
