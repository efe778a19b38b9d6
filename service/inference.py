"""Admit, decode, infer: a request's images to results per image. Owns what an engine must be."""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from entry.config import Entry
from entry.images import ImageError, Limits, load_image
from service.errors import Problem, overloaded
from service.fetch import Fetcher
from service.intake import Item, Remote
from service.limits import Priority
from service.telemetry import Metrics

RATE_WINDOW_S = 10.0
RATE_REQUESTS = 500
"""Over how long, and over how many requests at most, the speed is looked at that Retry-After is made of."""


class EngineError(Exception):
    """Every way an engine can fail: EngineOverloaded | EngineUnavailable | DeadlineExceeded."""


class EngineOverloaded(EngineError):
    """Its queue is full; nothing is broken."""


class EngineUnavailable(EngineError):
    """It is down, failing, or answered with nonsense."""


class DeadlineExceeded(EngineError):
    """The job was dropped because its time was up."""


State = Literal["ready", "loading", "not loaded", "failed"]
"""Ready: it serves. Loading: it does not yet. Not loaded: a Triton has it, but never loaded it. To callers all that
does not serve is failed, and the reason tells these apart; the log has the state itself."""


@dataclass(frozen=True)
class ModelStatus:
    """A model as the engine has it. One that is not ready has a reason, and its entry if that is known."""

    name: str
    entry: Entry | None
    versions: tuple[str, ...] = ()
    """Those served, ascending."""
    reason: str | None = None
    state: State = "ready"

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return self.state == "ready"

    @property
    def default_version(self) -> str:
        """The highest served."""
        return self.versions[-1]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the versions served."""
        return {v: self.entry.fingerprint(v) for v in self.versions} if self.entry else {}


RELOADING = "the repository is being read again; until that is done it is served as it was"


def while_loading(models: Mapping[str, ModelStatus], loading: Collection[str]) -> Mapping[str, ModelStatus]:
    """The models as they are while these are being loaded: what serves goes on, and says that it may change."""
    if not loading:
        return models
    seen = dict(models)
    for name in loading:
        status = models.get(name)
        if status and status.ready:
            seen[name] = replace(status, reason=RELOADING)
        else:
            entry = status.entry if status else None
            seen[name] = ModelStatus(name, entry, reason="it is being loaded", state="loading")
    return dict(sorted(seen.items()))


def shown(models: Mapping[str, ModelStatus]) -> dict[str, tuple[bool, Mapping[str, str]]]:
    """The models as metrics show them."""
    return {name: (status.ready, status.fingerprints) for name, status in models.items()}


@dataclass(frozen=True)
class Job:
    """Rows to compute: an image at a level each."""

    model: str
    version: str
    fingerprint: str
    """Of the weights that are meant: an engine that has others now refuses."""
    images: np.ndarray  # uint8 [N, 3, S, S]
    t_end: np.ndarray  # float32 [N]
    outputs: tuple[str, ...]
    """Names of what is wanted: STATE, HIDDEN, LOGITS."""
    due: float
    """The loop's time after which nobody waits for it."""
    priority: Priority = "interactive"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Passed on to a remote engine: the trace that the request belongs to."""


class Engine(Protocol):
    """The one seam between the gateway and what computes."""

    async def start(self) -> None:
        """Make the models ready; one that can't be is a failed status, not an exception."""

    async def close(self) -> None:
        """Stop; jobs under way are finished or fail."""

    def models(self) -> Mapping[str, ModelStatus]:
        """All models by name, in the order of names."""

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """The wanted outputs, float32 [N, D] each. Raises EngineError; cancelling it drops the job."""

    async def rescan(self) -> None:
        """Look at the repository again."""


@dataclass(frozen=True)
class Work:
    """One request's images and what is wanted of them."""

    items: Sequence[Item]
    model: str
    version: str
    entry: Entry
    levels: tuple[float, ...]
    output: str
    due: float
    priority: Priority
    headers: Mapping[str, str]
    admitted: Callable[[], None]
    """Called once there is room for the request, before anything is spent on it."""


@dataclass(frozen=True)
class Results:
    """What became of each image: its error, or its row of `values`."""

    errors: dict[int, ImageError]
    rows: dict[int, int]
    values: np.ndarray  # float32 [good images, levels, D]


class Inference:
    """The path of every request, over any engine."""

    def __init__(
        self, engine: Engine, fetcher: Fetcher, limits: Limits, queue_images: int, metrics: Metrics
    ) -> None:
        self.engine = engine
        self._fetcher = fetcher
        self._limits = limits
        self._admission = Admission(queue_images, metrics)
        self._metrics = metrics
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, "decode")

    def close(self) -> None:
        """Free the decoding threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Work) -> Results:
        """Results of one request. Raises Problem where the engine fails or there is no room."""
        with self._admission.admit(len(work.items) * len(work.levels)):
            work.admitted()
            images, errors = await self._decode(work)
            rows = {index: row for row, index in enumerate(images)}
            self._metrics.images(work.model, len(rows), len(errors))
            if not images:
                return Results(errors, rows, np.empty((0, len(work.levels), 0), np.float32))
            values = await self._infer(work, np.stack(list(images.values())))
        return Results(errors, rows, values)

    async def _decode(self, work: Work) -> tuple[dict[int, np.ndarray], dict[int, ImageError]]:
        """Each image by itself, off the event loop: a bad one spoils no other."""
        loop = asyncio.get_running_loop()
        spec = work.entry.prg.image

        def decode(read: Callable[[], bytes]) -> np.ndarray | ImageError:
            with self._metrics.decode_seconds.time():
                try:
                    return load_image(read(), spec, self._limits)
                except ImageError as error:
                    return error

        async def one(item: Item) -> np.ndarray | ImageError:
            if isinstance(item, Remote):
                try:
                    content = await self._fetcher.fetch(item.url)
                except ImageError as error:
                    return error
                return await loop.run_in_executor(self._decoders, decode, lambda: content)
            return await loop.run_in_executor(self._decoders, decode, item)

        tasks = [asyncio.ensure_future(one(item)) for item in work.items]
        try:
            decoded = await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        good = {i: d for i, d in enumerate(decoded) if not isinstance(d, ImageError)}
        return good, {i: d for i, d in enumerate(decoded) if isinstance(d, ImageError)}

    async def _infer(self, work: Work, images: np.ndarray) -> np.ndarray:
        """float32 [N, levels, D]."""
        count, levels = len(images), len(work.levels)
        job = Job(
            model=work.model,
            version=work.version,
            fingerprint=work.entry.fingerprint(work.version),
            images=np.repeat(images, levels, axis=0),
            t_end=np.tile(np.array(work.levels, np.float32), count),
            outputs=(work.output,),
            due=work.due,
            priority=work.priority,
            headers=work.headers,
        )
        try:
            values = (await self.engine.infer(job))[work.output]
        except EngineOverloaded as error:
            self._metrics.rejected("engine queue")
            raise overloaded(str(error), self._admission.retry_after_s()) from None
        except EngineUnavailable as error:
            self._metrics.rejected("engine failure")
            raise overloaded(f"the model can't answer: {error}", 1) from None
        except DeadlineExceeded as error:
            raise Problem(504, "Deadline exceeded", str(error)) from None
        if not np.isfinite(values).all():
            raise overloaded(f"{work.model}: the model answered with numbers that are not finite", 30)
        return values.reshape(count, levels, -1)


class Admission:
    """How many rows (images x levels) are in the house; what does not fit is refused before it costs anything."""

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self.capacity = capacity
        self.held = 0
        self._metrics = metrics
        self._done: deque[tuple[float, float, int]] = deque(maxlen=RATE_REQUESTS)
        """(when it ended, busy seconds when it began, rows) of the last requests."""
        self._busy_s = 0.0
        self._changed = time.monotonic()

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Hold a place for so many rows. Raises Problem 503 with the time that those inside will take."""
        if rows > self.capacity:
            raise Problem(
                422,
                "Too many images",
                f"images x levels = {rows}, at most {self.capacity} fit in this server's queue; send fewer",
            )
        if self.held + rows > self.capacity:
            self._metrics.rejected("queue full")
            raise overloaded(
                f"{self.held} images are waiting, at most {self.capacity} may", self.retry_after_s()
            )
        begun = self._hold(rows)
        try:
            yield
        except BaseException:
            self._hold(-rows)
            raise
        self._hold(-rows)
        self._done.append((time.monotonic(), begun, rows))

    def retry_after_s(self) -> int:
        """Seconds until what waits now will be done, at the speed of the last busy moments; from 1 to 60."""
        now = time.monotonic()
        recent = [(begun, rows) for ended, begun, rows in self._done if ended > now - RATE_WINDOW_S]
        busy_s = self._hold(0) - min((begun for begun, _ in recent), default=0.0)
        if not recent or busy_s <= 0:
            return 1
        rate = sum(rows for _, rows in recent) / busy_s
        return min(60, max(1, math.ceil(self.held / rate)))

    def _hold(self, rows: int) -> float:
        """Count rows in or out; returns for how many seconds there was anything in the house, ever."""
        now = time.monotonic()
        if self.held:
            self._busy_s += now - self._changed
        self._changed = now
        self.held += rows
        self._metrics.queued_images.set(self.held)
        return self._busy_s
