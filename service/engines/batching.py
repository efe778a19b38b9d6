"""Dynamic batching: rows of several jobs are computed together, and each caller gets its own."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from opentelemetry.context import Context as Place
from opentelemetry.trace import Span

from service import tracing
from service.engines.contract import DeadlineExceeded, EngineError, EngineUnavailable, Job
from service.schemas import Priority
from service.telemetry import Metrics, log

Compute = Callable[[Job], Awaitable[dict[str, np.ndarray]]]
"""A batch, as a job made of all of them: due when the last of them is, with every output that any of them wants."""


@dataclass(frozen=True)
class Rules:
    """When a batch starts and what goes into it."""

    max_batch: int
    """Rows at most."""
    full: int
    """With so many it waits no longer."""
    max_delay_s: float = 0.0
    """How long it waits for company."""
    in_work: int = 1
    """While so many rows are computed, the next batch gathers."""
    eager: int = 0
    """While fewer batches are in work, nobody waits for company."""
    ahead_s: float = 0.0
    """Where a batch takes less, a full one is handed over before the last one ended, so that the engine need not wait
    for it. Longer ones are not worth that an interactive row waits for one more."""
    mixed: bool = True
    """Whether rows of any jobs fill it; else jobs of one priority join as a whole, up to `full`."""


@dataclass(eq=False)
class _Waiting:
    """A job that is not answered yet, with the outputs of its rows computed so far."""

    job: Job
    answer: "asyncio.Future[dict[str, np.ndarray]]"
    since: float
    left: int
    trace: Place | None = field(default_factory=tracing.place)
    """Where in its request's trace it was queued."""
    queued: Span | None = field(default_factory=partial(tracing.begin, "queue"))
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def take(self, row: int, outputs: dict[str, np.ndarray], index: int) -> None:
        """One row's outputs; with the last of them the job is answered."""
        for name in self.job.outputs:
            if name not in self.outputs:
                shape = len(self.job.images), outputs[name].shape[1]
                self.outputs[name] = np.empty(shape, np.float32)
            self.outputs[name][row] = outputs[name][index]
        self.left -= 1
        if not self.left and not self.answer.done():
            self.answer.set_result(self.outputs)


_Row = tuple[_Waiting, int]
"""One row of a job: what a batch is made of."""


class Batcher:
    """Dynamic batching for one version: rows of several jobs are computed together.

    A batch starts when it is full, or at `max_delay_s` after its oldest row came; where none is in work, also after the
    last one ended: those that have been answered then are back, and a row that came meanwhile does not go without
    them. A job that nothing else is in work with waits for nobody. Interactive rows go before bulk ones. A failing
    batch fails the jobs in it, and no other. Who has given up is left out.
    """

    def __init__(self, compute: Compute, rules: Rules, metrics: Metrics) -> None:
        self._compute = compute
        self._rules = rules
        self._metrics = metrics
        self._queues: dict[Priority, deque[_Row]] = {"interactive": deque(), "bulk": deque()}
        self._batches: dict[asyncio.Task[dict[str, np.ndarray]], list[_Row]] = {}
        """Those in work."""
        self._next_look: asyncio.Handle | None = None
        self._closing = False
        self._ended = -math.inf
        """When the last batch did."""
        self._took = math.inf
        """Seconds of the last batch."""

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        """Queue the job and await its outputs. Raises EngineError."""
        if self._closing:
            raise EngineUnavailable("the engine is stopping")
        loop, count, queued = asyncio.get_running_loop(), len(job.images), self._queued()
        waiting = _Waiting(job, loop.create_future(), loop.time(), count)
        self._queues[job.priority].extend((waiting, row) for row in range(count))
        # Between the first row and a full batch nobody need look. Soon, not now: others may come in the same turn.
        if not queued or queued + count >= self._rules.full:
            self._look_at(loop.call_soon)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._forget(waiting)
            raise

    async def drain(self) -> None:
        """Take no more, finish what waits, stop."""
        self._closing = True
        self._start()
        while self._batches:
            await asyncio.wait(self._batches)

    async def close(self) -> None:
        """Stop after the batches in work; what waits fails."""
        for queue in self._queues.values():
            for waiting, _ in queue:
                waiting.fail(EngineUnavailable("the engine is stopping"))
        await self.drain()

    def _queued(self) -> int:
        """How many rows wait."""
        return sum(map(len, self._queues.values()))

    def _forget(self, waiting: _Waiting) -> None:
        """Take the rows of a job that gave up out of its queue, and stop the batches that nobody waits for."""
        queue = self._queues[waiting.job.priority]
        left = [row for row in queue if row[0] is not waiting]
        queue.clear()
        queue.extend(left)
        for batch, rows in self._batches.items():
            if all(one.answer.done() for one, _ in rows):
                batch.cancel()

    def _look_at(self, call: Callable[[Callable[[], None]], asyncio.Handle]) -> None:
        """Have `_start` called then, and at no other time that was arranged before."""
        if self._next_look:
            self._next_look.cancel()
        self._next_look = call(self._start)

    def _start(self) -> None:
        """Start the batches that are due, and look again when the next one is."""
        loop = asyncio.get_running_loop()
        while self._queued() and self._has_room():
            if (due := self._due()) > loop.time():
                self._look_at(partial(loop.call_at, due))
                return
            if rows := self._take():
                # Not in the context of the request that happens to be there.
                batch = loop.create_task(self._run(rows), context=Context())
                self._batches[batch] = rows
                batch.add_done_callback(self._end)

    def _end(self, batch: "asyncio.Task[dict[str, np.ndarray]]") -> None:
        rows = self._batches.pop(batch)
        self._ended = asyncio.get_running_loop().time()
        # First, because to answer takes a while.
        self._start()
        if batch.cancelled():
            return
        try:
            outputs = batch.result()
            for index, (waiting, row) in enumerate(rows):
                waiting.take(row, outputs, index)
        except EngineError as error:
            failure: EngineError = error
        # Whatever happened: these jobs fail, and no other.
        except Exception as error:
            log.exception("inference failed", model=rows[0][0].job.model)
            failure = EngineUnavailable(f"{type(error).__name__} in the model")
        else:
            return
        for waiting in _jobs(rows):
            waiting.fail(failure)

    def _has_room(self) -> bool:
        """Whether one more batch may be in work."""
        ahead = len(self._batches) == 1 and self._queued() >= self._rules.full
        rows = sum(map(len, self._batches.values()))
        return rows < self._rules.in_work or (ahead and self._took < self._rules.ahead_s)

    def _due(self) -> float:
        """The loop's time at which the next batch is to start."""
        first = [queue[0][0] for queue in self._queues.values() if queue]
        eager = len(self._batches) < self._rules.eager or any(waiting.job.alone for waiting in first)
        if eager or self._closing or self._queued() >= self._rules.full:
            return -math.inf
        since = min(waiting.since for waiting in first)
        return (since if self._batches else max(since, self._ended)) + self._rules.max_delay_s

    def _take(self) -> list[_Row]:
        """The next batch: interactive first, in the order of arrival; who gave up or is late is dropped."""
        now = asyncio.get_running_loop().time()
        rows: list[_Row] = []
        for queue in self._queues.values():
            if rows and not self._rules.mixed:
                break
            while queue and len(rows) < self._rules.max_batch:
                waiting, row = queue[0]
                joins = len(rows) + len(waiting.job.images) <= self._rules.full
                if rows and row == 0 and not (joins or self._rules.mixed):
                    break
                queue.popleft()
                if waiting.job.due <= now:
                    waiting.fail(DeadlineExceeded("the deadline passed while the request was queued"))
                if waiting.answer.done():
                    continue
                if row == 0:
                    self._metrics.queue_seconds.labels(waiting.job.model).observe(now - waiting.since)
                    if waiting.queued:
                        waiting.queued.end()
                rows.append((waiting, row))
        return rows

    async def _run(self, rows: list[_Row]) -> dict[str, np.ndarray]:
        model, traces = rows[0][0].job.model, [waiting.trace for waiting in _jobs(rows)]
        self._metrics.batch_images.labels(model).observe(len(rows))
        time = asyncio.get_running_loop().time
        begun = time()
        with tracing.shared("inference", traces, model=model, batch=len(rows)):
            try:
                return await self._compute(_merged(rows))
            finally:
                # What was handed over ahead began when the one before it ended.
                self._took = time() - (max(begun, self._ended) if self._rules.ahead_s else begun)
                self._metrics.inference_seconds.labels(model).observe(self._took)


def _jobs(rows: list[_Row]) -> list[_Waiting]:
    """Each once."""
    return list(dict.fromkeys(waiting for waiting, _ in rows))


def _merged(rows: list[_Row]) -> Job:
    jobs = [waiting.job for waiting in _jobs(rows)]
    return replace(
        jobs[0],
        images=np.stack([waiting.job.images[row] for waiting, row in rows]),
        t_end=np.stack([waiting.job.t_end[row] for waiting, row in rows]),
        outputs=tuple(dict.fromkeys(name for job in jobs for name in job.outputs)),
        due=max(job.due for job in jobs),
    )
