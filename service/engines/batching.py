"""Dynamic batching: rows of several jobs are computed together, and each caller gets its own."""

import asyncio
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from opentelemetry.context import Context
from opentelemetry.trace import Span

from service import tracing
from service.engines.contract import DeadlineExceeded, EngineOverloaded, EngineUnavailable, Job
from service.schemas import Priority
from service.settings import Settings
from service.telemetry import Metrics, log

if TYPE_CHECKING:
    # For its type alone: at run time it would import torch.
    from entry.runner import Runner


@dataclass(eq=False)
class _Waiting:
    """A job that is not answered yet, with the outputs of its rows computed so far."""

    job: Job
    answer: "asyncio.Future[dict[str, np.ndarray]]"
    since: float
    left: int
    trace: Context | None = field(default_factory=tracing.place)
    """Where in its request's trace it was queued."""
    queued: Span | None = field(default_factory=partial(tracing.begin, "queue"))
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


_Row = tuple[_Waiting, int]
"""One row of a job: what a batch is made of."""


class Batcher:
    """Dynamic batching for one version: rows of several jobs are computed together.

    A batch starts when it is full, or at `max_delay_s` after its oldest row came and the last batch ended: those that
    have been answered then are back, and a row that came meanwhile does not go without them. A job that nothing else is
    in work with waits for nobody. While a batch is computed the next gathers. Interactive rows go before bulk ones. A
    failing batch fails the jobs in it, and no other.
    """

    def __init__(
        self,
        runner: "Runner",
        model: str,
        settings: Settings,
        compute: ThreadPoolExecutor,
        metrics: Metrics,
    ) -> None:
        self.runner = runner
        self._model = model
        self._max_batch = settings.max_batch
        self._max_delay_s = settings.max_delay_ms / 1e3
        self._capacity = settings.queue_images
        self._compute = compute
        self._metrics = metrics
        self._queues: dict[Priority, deque[_Row]] = {"interactive": deque(), "bulk": deque()}
        self._arrival = asyncio.Event()
        self._closing = False
        self._ended = -math.inf
        """When the last batch did."""
        self._task = asyncio.create_task(self._run())

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """Queue the job and await its outputs. Raises EngineError."""
        if self._closing:
            raise EngineUnavailable("the engine is stopping")
        size = self.runner.entry.prg.image.size
        if job.images.shape[1:] != (3, size, size):
            raise EngineUnavailable("the model was replaced while the request was under way")
        count, queued = len(job.images), self._queued()
        if queued + count > self._capacity:
            raise EngineOverloaded(f"{queued} images are waiting, at most {self._capacity} may")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(job, loop.create_future(), loop.time(), count)
        self._queues[job.priority].extend((waiting, row) for row in range(count))
        # Between the first row and a full batch nobody need look.
        if not queued or queued + count >= self._max_batch:
            self._arrival.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._forget(waiting)
            raise

    async def drain(self) -> None:
        """Take no more, finish what waits, stop."""
        self._closing = True
        self._arrival.set()
        await self._task

    async def close(self) -> None:
        """Stop after the batch in progress; what waits fails."""
        for queue in self._queues.values():
            for waiting, _ in queue:
                waiting.fail(EngineUnavailable("the engine is stopping"))
        await self.drain()

    def _queued(self) -> int:
        """How many rows wait."""
        return sum(map(len, self._queues.values()))

    def _forget(self, waiting: _Waiting) -> None:
        """Take the rows of a job that gave up out of its queue."""
        queue = self._queues[waiting.job.priority]
        left = [row for row in queue if row[0] is not waiting]
        queue.clear()
        queue.extend(left)

    async def _run(self) -> None:
        while True:
            await self._gather()
            batch = self._take()
            if not batch and self._closing:
                return
            if batch:
                try:
                    await self._compute_batch(batch)
                # Whatever happened: these jobs fail, and the next batch is tried.
                except Exception as error:
                    jobs = {waiting for waiting, _ in batch}
                    log.exception("inference failed", model=self._model, jobs=len(jobs))
                    for waiting in jobs:
                        waiting.fail(EngineUnavailable(f"{type(error).__name__} in the model"))

    async def _gather(self) -> None:
        """Until a batch is to start."""
        loop = asyncio.get_running_loop()
        while not self._closing:
            first = [queue[0][0] for queue in self._queues.values() if queue]
            start = max(min((w.since for w in first), default=math.inf), self._ended) + self._max_delay_s
            if self._queued() >= self._max_batch or start <= loop.time() or any(w.job.alone for w in first):
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout_at(start):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Row]:
        """The next batch: interactive first, in the order of arrival; who gave up or is late is dropped."""
        now = asyncio.get_running_loop().time()
        batch: list[_Row] = []
        for queue in self._queues.values():
            while queue and len(batch) < self._max_batch:
                waiting, row = queue.popleft()
                if waiting.job.due <= now:
                    waiting.fail(DeadlineExceeded("the deadline passed while the request was queued"))
                if waiting.answer.done():
                    continue
                if row == 0:
                    self._metrics.queue_seconds.labels(self._model).observe(now - waiting.since)
                    if waiting.queued:
                        waiting.queued.end()
                batch.append((waiting, row))
        return batch

    async def _compute_batch(self, batch: list[_Row]) -> None:
        images = np.stack([waiting.job.images[row] for waiting, row in batch])
        t_end = np.stack([waiting.job.t_end[row] for waiting, row in batch])
        loop = asyncio.get_running_loop()
        traces = [waiting.trace for waiting in {waiting: None for waiting, _ in batch}]
        with (
            tracing.shared("inference", traces, model=self._model, batch=len(batch)),
            self._metrics.inference_seconds.labels(self._model).time(),
        ):
            outputs = await loop.run_in_executor(self._compute, self.runner.run, images, t_end)
        self._ended = loop.time()
        self._metrics.batch_images.labels(self._model).observe(len(batch))
        for index, (waiting, row) in enumerate(batch):
            for name in waiting.job.outputs:
                array = outputs[name]
                if name not in waiting.outputs:
                    waiting.outputs[name] = np.empty((len(waiting.job.images), array.shape[1]), np.float32)
                waiting.outputs[name][row] = array[index]
            waiting.left -= 1
            if not waiting.left and not waiting.answer.done():
                waiting.answer.set_result(waiting.outputs)
