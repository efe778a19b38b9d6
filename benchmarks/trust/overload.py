"""Above the limit: requests arrive at a fixed rate, whether earlier ones are answered or not.

The service runs on one core; the generator, and Triton, on another. First the limit: as many answers a second as 64
callers get who each wait for theirs. Then arrivals at random (Poisson) at 0.9, 2, 4 and 10 times that. A request goes
out on a connection that waits for none, or on a new one; each answer is checked against its own image. Goodput is right
answers within 2 s, beside that at 0.9 times. A row is skipped where the generator itself was late.

Once with a model that takes no time, so that the gateway is the limit; with Triton also with one that is slow, so that
the engine is.
"""

import asyncio
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.trust.rows import Absent, Row, main
from benchmarks.trust.stage import Stage, staged
from tests.tiny import png

FACTORS = {0.9: 1.0, 2: 0.9, 4: 0.7, 10: 0.4}
"""Times the limit -> the goodput that is wanted, in parts of that at 0.9 times."""
WHERE_SLOW = 0.9
"""The same wherever the engine is the limit."""
SLOW_MS = 400
SECONDS = 8.0
CALLERS = 64
MOST_MB = 50
COLOURS = 64
LATE_S = 0.05
IN_TIME_S = 2.0
"""An answer counts that comes within this time of its planned arrival."""
PATIENCE_S = 30.0
"""How long after the last arrival answers are waited for."""


@dataclass
class Tally:
    """What became of the requests of one row."""

    sent: int = 0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    broken: int = 0
    no_retry_after: int = 0
    late: list[float] = field(default_factory=list)
    connections: int = 0
    most_connections: int = 0

    def facts(self) -> dict[str, object]:
        """Counts, for whoever watches."""
        facts = {"sent": self.sent, "statuses": self.statuses, "broken": self.broken, "wrong": self.wrong}
        return facts | {"connections": self.most_connections, "no_retry_after": self.no_retry_after}


class Caller(asyncio.Protocol):
    """One connection: sends a request, reads the answer, and is then free for another."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.buffer = b""
        self.colour = -1
        self.due = 0.0
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.load.tally.connections += 1
        tally = self.load.tally
        tally.most_connections = max(tally.most_connections, tally.connections)

    def send(self, colour: int, due: float) -> None:
        """One request; its latency counts from `due`."""
        self.colour, self.due = colour, due
        self.load.tally.sent += 1
        self.transport.write(self.load.requests[colour])

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:])
        length = int(headers.get(b"content-length", b"0"))
        if len(body) < length:
            return
        self.buffer = body[length:]
        self._answered(int(lines[0][9:12]), headers, body[:length])
        if headers.get(b"connection") == b"close":
            self.transport.close()
        else:
            self.load.free.append(self)

    def _answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        tally = self.load.tally
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
        if status == 200:
            tally.latencies.append(time.perf_counter() - self.due)
            found = json.loads(body)["data"][0]["embedding"][:3]
            tally.wrong += not np.allclose(found, self.load.colours[self.colour] / 255, atol=1e-3)
        elif status in (429, 503) and b"retry-after" not in headers:
            tally.no_retry_after += 1
        self.colour = -1
        if self.done:
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.tally.connections -= 1
        if self.colour >= 0:
            self.load.tally.broken += 1
            if self.done and not self.done.done():
                self.done.set_result(None)


class Load:
    """Requests to one address."""

    def __init__(self, port: int) -> None:
        self.port = port
        rng = np.random.default_rng(0)
        self.colours = rng.integers(0, 256, (COLOURS, 3))
        self.requests = []
        for colour in self.colours:
            body = png(tuple(int(c) for c in colour))
            head = (
                f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {len(body)}"
            )
            self.requests.append(head.encode() + b"\r\n\r\n" + body)
        self.free: deque[Caller] = deque()
        self.tally = Tally()

    async def open(self) -> Caller:
        """A new connection."""
        loop = asyncio.get_running_loop()
        _, caller = await loop.create_connection(lambda: Caller(self), "127.0.0.1", self.port)
        return caller

    def close(self) -> None:
        """Close the connections that wait for nothing."""
        while self.free:
            self.free.pop().transport.close()

    async def closed(self, callers: int, seconds: float) -> float:
        """Answers a second to so many callers."""
        self.tally = Tally()
        loop = asyncio.get_running_loop()
        end = time.perf_counter() + seconds

        async def call(number: int) -> None:
            caller = await self.open()
            while time.perf_counter() < end:
                caller.done = loop.create_future()
                caller.send(number % COLOURS, time.perf_counter())
                await caller.done
            caller.transport.close()

        await asyncio.gather(*map(call, range(callers)))
        self.free.clear()
        return len(self.tally.latencies) / seconds

    async def arrivals(self, rate: float, seconds: float) -> Tally:
        """Requests at random, so many a second."""
        self.tally = tally = Tally()
        rng = np.random.default_rng(1)
        times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
        tasks: set[asyncio.Task[None]] = set()
        begin = time.perf_counter()

        async def fresh(colour: int, due: float) -> None:
            try:
                (await self.open()).send(colour, due)
            except OSError:
                tally.broken += 1

        for i, at in enumerate(times):
            due = begin + at
            while (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(max(left, 0.0005))
            tally.late.append(-left)
            while self.free and self.free[-1].transport.is_closing():
                self.free.pop()
            if self.free:
                self.free.pop().send(i % COLOURS, due)
            else:
                task = asyncio.ensure_future(fresh(i % COLOURS, due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if i % 16 == 0:
                await asyncio.sleep(0)
        end = time.perf_counter() + PATIENCE_S
        while tasks or (
            tally.sent > sum(tally.statuses.values()) + tally.broken and time.perf_counter() < end
        ):
            await asyncio.sleep(0.05)
        return tally


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure(port: int, pid: int, slow: bool) -> list[Row]:
    """All rows against a running service."""
    load = Load(port)
    await load.closed(CALLERS, 2)
    limit = await load.closed(CALLERS, SECONDS)
    idle, usual = resident_mb(pid), 0.0
    rows: list[Row] = []
    for factor, wanted in FACTORS.items():
        peak = idle

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, resident_mb(pid))
                await asyncio.sleep(0.25)

        watching = asyncio.ensure_future(watch())
        tally = await load.arrivals(factor * limit, SECONDS)
        watching.cancel()
        begun = time.perf_counter()
        while (await load.arrivals(20, 0.5)).statuses.keys() != {200}:
            pass
        recovery = time.perf_counter() - begun - 0.5
        load.close()
        goodput = sum(latency <= IN_TIME_S for latency in tally.latencies) / SECONDS
        usual = usual or goodput
        rows.append(
            row(tally, factor, limit, goodput / usual, WHERE_SLOW if slow else wanted, peak - idle, recovery)
        )
        print(json.dumps({"factor": factor, **tally.facts()}), file=sys.stderr)
    return rows


def row(
    tally: Tally, factor: float, limit: float, share: float, wanted: float, more_mb: float, recovery_s: float
) -> Row:
    """What one load came to."""
    late = float(np.percentile(tally.late, 99))
    p50, p99 = np.percentile(tally.latencies or [0.0], (50, 99))
    refused = sum(count for status, count in tally.statuses.items() if status in (429, 503))
    strange = tally.sent - len(tally.latencies) - refused
    figure = (
        f"goodput {share * 100:.0f} %, p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, {tally.wrong} wrong, "
        f"{strange} neither answered nor refused, {more_mb:+.0f} MB, as before after {recovery_s:.1f} s"
    )
    good = share >= wanted and p99 <= IN_TIME_S and more_mb <= MOST_MB and recovery_s <= IN_TIME_S
    clean = not (tally.wrong or strange or tally.no_retry_after)
    if late > LATE_S:
        figure = f"void: the generator was late by {late * 1e3:.0f} ms; {figure}"
    done = f"{factor:g} times its limit of {limit:.0f} images/s, {SECONDS:g} s"
    bounds = f"goodput {wanted * 100:.0f} %, p99 2 s, none wrong or lost, {MOST_MB} MB, 2 s"
    return Row("overload", done, figure, bounds, None if late > LATE_S else good and clean)


@contextmanager
def apart(stage: Stage) -> Iterator[None]:
    """The gateway on the first core, all else on the second. Raises Absent where there is one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Absent("two cores are needed, one for the generator")
    for pid, core in ((stage.gateway.process.pid, cores[0]), *((p, cores[1]) for p in triton_pids(stage))):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
    os.sched_setaffinity(0, {cores[1]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def triton_pids(stage: Stage) -> list[int]:
    """Triton's own and its model processes'."""
    if stage.triton is None or stage.triton.process is None:
        return []
    return [stage.triton.process.pid, *stage.triton.stubs()]


def run(engine: str) -> list[Row]:
    """Rows for a model that takes no time, and with Triton for a slow one."""
    rows: list[Row] = []
    for slow in (False, True) if engine == "triton" else (False,):
        with staged(engine) as stage, apart(stage):
            if slow:
                stage.slow(SLOW_MS)
            rows += uvloop.run(measure(stage.gateway.port, stage.gateway.process.pid, slow))
    return rows


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
