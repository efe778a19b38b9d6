"""The embedded engine: models in this process, behind dynamic batching."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entry.config import Entry, EntryError, find_entries
from service.inference import (
    DeadlineExceeded,
    EngineOverloaded,
    EngineUnavailable,
    Job,
    ModelStatus,
)
from service.limits import Priority
from service.telemetry import Metrics, log

if TYPE_CHECKING:
    from entry.runner import Runner  # at run time only where a model is loaded: it brings torch

WARM_UP_CALLS = 3
"""TorchScript compiles in its first calls."""


@dataclass
class _Model:
    """A model as it was last seen: its status, and a batcher for each served version."""

    status: ModelStatus
    batchers: dict[str, "Batcher"] = field(default_factory=dict)


class EmbeddedEngine:
    """Implements service.inference.Engine with entry.runner."""

    def __init__(
        self,
        repository: Path,
        chosen: Mapping[str, frozenset[str] | None] | None,
        max_batch: int,
        max_delay_s: float,
        queue_rows: int,
        metrics: Metrics,
    ) -> None:
        self._repository = repository
        self._chosen = chosen
        self._batching = (max_batch, max_delay_s, queue_rows)
        self._metrics = metrics
        self._models: dict[str, _Model] = {}
        self._compute = ThreadPoolExecutor(1, "compute")
        self._rescanning = asyncio.Lock()

    async def start(self) -> None:
        """Load every chosen entry."""
        await self.rescan()

    async def close(self) -> None:
        """Finish the batch under way; whatever waits fails."""
        for model in self._models.values():
            for batcher in model.batchers.values():
                await batcher.close()
        self._compute.shutdown(wait=True, cancel_futures=True)

    def models(self) -> dict[str, ModelStatus]:
        """All models by name."""
        return {name: model.status for name, model in self._models.items()}

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """The wanted outputs of a job. Raises EngineError."""
        model = self._models.get(job.model)
        batcher = model.batchers.get(job.version) if model else None
        if batcher is None:
            raise EngineUnavailable(f"{job.model} version {job.version} is not loaded")
        return await batcher.infer(job)

    async def rescan(self) -> None:
        """Load what is new, keep what is unchanged, drop what is gone.

        Where a model that serves can't be loaded in its new form, the old one goes on serving and its
        status tells why.
        """
        async with self._rescanning:
            found = await asyncio.to_thread(find_entries, self._repository)
            wanted = {n: e for n, e in found.items() if self._chosen is None or n in self._chosen}
            fresh = {name: await self._refreshed(name, entry) for name, entry in wanted.items()}
            kept = {id(b) for m in fresh.values() for b in m.batchers.values()}
            old = [b for m in self._models.values() for b in m.batchers.values() if id(b) not in kept]
            self._models = fresh
        for batcher in old:
            await batcher.drain()
        for name, model in self._models.items():
            self._metrics.model_ready.labels(name).set(bool(model.batchers))

    async def _refreshed(self, name: str, found: Entry | EntryError) -> _Model:
        before = self._models.get(name)
        try:
            if isinstance(found, EntryError):
                raise found
            versions = self._versions(found)
            batchers = {v: await self._batcher(before, found, v) for v in versions}
        except EntryError as error:
            log.error("entry refused", model=name, reason=str(error))
            if before and before.batchers and before.status.entry:
                kept = f"an older state of it is served, because: {error}"
                status = ModelStatus(name, before.status.entry, before.status.versions, kept)
                return _Model(status, before.batchers)
            return _Model(ModelStatus(name, None, reason=str(error)))
        return _Model(ModelStatus(name, found, versions), batchers)

    def _versions(self, entry: Entry) -> tuple[str, ...]:
        """The versions to serve, ascending."""
        chosen = self._chosen.get(entry.name) if self._chosen else None
        missing = set(chosen or ()) - entry.prg.versions.keys()
        if missing:
            raise EntryError(
                f"{self._repository / entry.name}: PRG_MODELS wants version {min(missing)}, "
                f"there are: {', '.join(entry.prg.versions)}"
            )
        return tuple(sorted(chosen or entry.prg.versions, key=int))

    async def _batcher(self, before: _Model | None, entry: Entry, version: str) -> "Batcher":
        """The one that runs already if its weights and facts are the same, or else a new one."""
        old = before.batchers.get(version) if before else None
        if old and _same(old.runner.entry, entry, version):
            return old
        directory = self._repository / entry.name
        runner = await asyncio.to_thread(load, directory, version, self._batching[0])
        log.info("model loaded", model=entry.name, version=version)
        return Batcher(runner, entry.name, *self._batching, self._compute, self._metrics)


def load(directory: Path, version: str, largest_batch: int) -> "Runner":
    """A version loaded and compiled for single images and whole batches. Raises EntryError."""
    from entry.runner import Runner

    runner = Runner(directory, version)
    size = runner.entry.prg.image.size
    for batch in (1, largest_batch):
        for _ in range(WARM_UP_CALLS):
            runner.run(np.zeros((batch, 3, size, size), np.uint8), np.full(batch, 0.5, np.float32))
    return runner


def _same(old: Entry, new: Entry, version: str) -> bool:
    facts = [e.prg.model_dump(exclude={"versions"}) for e in (old, new)]
    return facts[0] == facts[1] and old.fingerprint(version) == new.fingerprint(version)


@dataclass
class _Waiting:
    """A job in a queue, perhaps partly computed."""

    job: Job
    answer: "asyncio.Future[dict[str, np.ndarray]]"
    since: float
    taken: int = 0
    done: int = 0
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Slice:
    """Rows of one job that are part of a batch."""

    waiting: _Waiting
    start: int
    stop: int


class Batcher:
    """Dynamic batching for one version: rows of several jobs are computed together.

    A batch starts when it is full or its oldest row has waited `max_delay_s`; while one is computed the next
    gathers. Interactive rows go before bulk ones. A failing batch fails the jobs in it, and no other.
    """

    def __init__(
        self,
        runner: "Runner",
        model: str,
        max_batch: int,
        max_delay_s: float,
        queue_rows: int,
        compute: ThreadPoolExecutor,
        metrics: Metrics,
    ) -> None:
        self.runner = runner
        self._model = model
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._capacity = queue_rows
        self._compute = compute
        self._metrics = metrics
        self._queues: dict[Priority, deque[_Waiting]] = {"interactive": deque(), "bulk": deque()}
        self._arrival = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._run())

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """Queue the job and await its outputs. Raises EngineError."""
        if self._closing:
            raise EngineUnavailable("the engine is stopping")
        if self._rows() + len(job.images) > self._capacity:
            raise EngineOverloaded(f"{self._rows()} images are waiting, at most {self._capacity} may")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(job, loop.create_future(), loop.time())
        self._queues[job.priority].append(waiting)
        self._arrival.set()
        return await waiting.answer

    async def drain(self) -> None:
        """Take no more, finish what waits, stop."""
        self._closing = True
        self._arrival.set()
        await self._task

    async def close(self) -> None:
        """Stop after the batch under way; what waits is failed."""
        for queue in self._queues.values():
            for waiting in queue:
                _fail(waiting, EngineUnavailable("the engine is stopping"))
        await self.drain()

    def _all(self) -> Iterator[_Waiting]:
        for queue in self._queues.values():
            yield from queue

    def _rows(self) -> int:
        return sum(len(w.job.images) - w.taken for w in self._all() if not w.answer.done())

    async def _run(self) -> None:
        while True:
            await self._gather()
            batch = self._take()
            if batch:
                await self._compute_batch(batch)
            elif self._closing:
                return

    async def _gather(self) -> None:
        """Until there is a full batch, or the oldest row has waited long enough."""
        loop = asyncio.get_running_loop()
        while not self._closing:
            rows = self._rows()
            oldest = min((w.since for w in self._all() if not w.answer.done()), default=None)
            left = self._max_delay_s if oldest is None else oldest + self._max_delay_s - loop.time()
            if rows >= self._max_batch or (rows and left <= 0):
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout(left if rows else None):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Slice]:
        """The next batch: interactive first, in the order of arrival; who gave up or is late is dropped."""
        now = asyncio.get_running_loop().time()
        batch: list[_Slice] = []
        room = self._max_batch
        for queue in self._queues.values():
            while queue and room:
                waiting = queue[0]
                if waiting.job.due <= now:
                    _fail(waiting, DeadlineExceeded("the deadline passed while the request was queued"))
                if waiting.answer.done():
                    queue.popleft()
                    continue
                if not waiting.taken:
                    self._metrics.queue_seconds.labels(self._model).observe(now - waiting.since)
                stop = min(len(waiting.job.images), waiting.taken + room)
                batch.append(_Slice(waiting, waiting.taken, stop))
                room -= stop - waiting.taken
                waiting.taken = stop
                if stop == len(waiting.job.images):
                    queue.popleft()
        return batch

    async def _compute_batch(self, batch: list[_Slice]) -> None:
        images = np.concatenate([s.waiting.job.images[s.start : s.stop] for s in batch])
        t_end = np.concatenate([s.waiting.job.t_end[s.start : s.stop] for s in batch])
        loop = asyncio.get_running_loop()
        try:
            with self._metrics.inference_seconds.labels(self._model).time():
                outputs = await loop.run_in_executor(self._compute, self.runner.run, images, t_end)
        except Exception as error:  # whatever torch raises: these jobs fail, the next batch is tried
            log.exception("inference failed", model=self._model, rows=len(images))
            for part in batch:
                _fail(part.waiting, EngineUnavailable(f"{type(error).__name__} in the model"))
            return
        self._metrics.batch_images.labels(self._model).observe(len(images))
        arrays = {"STATE": outputs.state, "HIDDEN": outputs.hidden, "LOGITS": outputs.logits}
        row = 0
        for part in batch:
            count = part.stop - part.start
            _deliver(part, {name: arrays[name] for name in part.waiting.job.outputs}, row)
            row += count


def _deliver(part: _Slice, arrays: Mapping[str, np.ndarray | None], row: int) -> None:
    """Copy a batch's rows to their job, and answer it if they were the last."""
    waiting = part.waiting
    for name, array in arrays.items():
        assert array is not None, f"{name} was asked of a model without it"
        whole = waiting.outputs.get(name)
        if whole is None:
            whole = waiting.outputs[name] = np.empty((len(waiting.job.images), array.shape[1]), np.float32)
        whole[part.start : part.stop] = array[row : row + part.stop - part.start]
    waiting.done += part.stop - part.start
    if waiting.done == len(waiting.job.images) and not waiting.answer.done():
        waiting.answer.set_result(waiting.outputs)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
