"""Dynamic batching: rows of several jobs computed together, each caller given its own."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from service.inference import DeadlineExceeded, EngineOverloaded, EngineUnavailable, Job
from service.limits import Priority
from service.telemetry import Metrics, log

if TYPE_CHECKING:
    from entry.runner import Runner  # for its type alone: at run time it brings torch


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
        size = self.runner.entry.prg.image.size
        if job.images.shape[1:] != (3, size, size):
            raise EngineUnavailable("the model was replaced while the request was under way")
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
            if not batch and self._closing:
                return
            if batch:
                try:
                    await self._compute_batch(batch)
                except Exception as error:  # whatever happened: these jobs fail, the next batch is tried
                    log.exception("inference failed", model=self._model, jobs=len(batch))
                    for part in batch:
                        _fail(part.waiting, EngineUnavailable(f"{type(error).__name__} in the model"))

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
        with self._metrics.inference_seconds.labels(self._model).time():
            outputs = await loop.run_in_executor(self._compute, self.runner.run, images, t_end)
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
