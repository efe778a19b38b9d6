"""Above the limit: requests arrive at a fixed rate, whether earlier ones are answered or not.

The service runs on one core; the generator, and Triton, on another. First the limit: as many answers a second as 64
callers get who each wait for theirs, or 256 where the engine is slow. Then arrivals at random (Poisson) at 0.9, 2, 4
and 10 times that. A request goes out on a connection that waits for none, or on a new one; each answer is checked
against its own image. Goodput is right answers within 2 s, a second and beside that at 0.9 times. A row is skipped
where the generator itself was late.

Once with a model that takes no time, so that the gateway is the limit; with Triton also with one that is slow, so that
the engine is.
"""

import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.trust.rows import Absent, Row, main
from benchmarks.trust.stage import Stage, staged
from tests.tiny import png

FACTORS = {0.9: 1.0, 2: 0.9, 4: 0.7, 10: 0.4}
"""Times the limit -> the goodput that is wanted, in parts of that at 0.9 times."""
WHERE_SLOW = 0.9
"""The same wherever the engine is the limit."""
SLOW_MS = 400
SECONDS = 8.0
CALLERS = {False: 64, True: 256}
"""For the limit, by whether the engine is slow: so many that its batches are full."""
MOST_MB = 50
COLOURS = 64
LATE_S = 0.05
IN_TIME_S = 2.0
"""An answer counts that comes within this time of its planned arrival."""
PATIENCE_S = 30.0
"""How long after the last arrival answers are waited for."""


class Answer(NamedTuple):
    """What came of an image."""

    colour: int
    latency_s: float
    body: bytes


@dataclass
class Tally:
    """What became of the requests of one row."""

    sent: int = 0
    answers: list[Answer] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    broken: int = 0
    """Their connection ended before the answer."""
    no_retry_after: int = 0
    late: list[float] = field(default_factory=list)
    most_connections: int = 0

    @property
    def waiting(self) -> int:
        """How many are neither answered nor broken."""
        return self.sent - self.statuses.total() - self.broken

    def facts(self) -> dict[str, object]:
        """Counts, for whoever watches."""
        facts = {"sent": self.sent, "statuses": self.statuses, "broken": self.broken, "wrong": self.wrong}
        return facts | {"connections": self.most_connections, "no_retry_after": self.no_retry_after}


class Line:
    """A connection: one request at a time."""

    __slots__ = ("buffer", "colour", "due", "socket")

    def __init__(self, connection: socket.socket, colour: int, due: float) -> None:
        self.socket = connection
        self.colour, self.due = colour, due
        """Of the image that waits for its answer, -1 if none does; and when it was to be sent."""
        self.buffer = b""


class Load:
    """Requests to one address, by one thread that does nothing else."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        rng = np.random.default_rng(0)
        self.colours = rng.integers(0, 256, (COLOURS, 3))
        self._requests = []
        for colour in self.colours:
            body = png(tuple(int(c) for c in colour))
            head = (
                f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {len(body)}"
            )
            self._requests.append(head.encode() + b"\r\n\r\n" + body)
        self._lines: dict[int, Line] = {}
        self._free: list[Line] = []
        self._poll = select.epoll()
        self._tally = Tally()

    def closed(self, callers: int, seconds: float) -> float:
        """Answers a second to so many callers who each wait for theirs."""
        self._tally = tally = Tally()
        begin = time.perf_counter()
        for number in range(callers):
            self._send(number % COLOURS, begin)
        while (now := time.perf_counter()) < begin + seconds:
            self._read(0.1)
            while self._free:
                self._send(tally.sent % COLOURS, now)
        self.close()
        return len(tally.answers) / seconds

    def arrivals(self, rate: float, seconds: float, watch: Callable[[], None]) -> Tally:
        """Requests at random, so many a second; `watch` is called every quarter of a second."""
        self._tally = tally = Tally()
        gaps = np.random.default_rng(1).exponential(1 / rate, int(rate * seconds))
        times = np.cumsum(gaps).tolist()
        begin = time.perf_counter()
        until, watched = begin + times[-1] + PATIENCE_S, begin
        sent = 0
        while (now := time.perf_counter()) < until and (sent < len(times) or tally.waiting):
            while sent < len(times) and begin + times[sent] <= now:
                tally.late.append(now - begin - times[sent])
                self._send(sent % COLOURS, begin + times[sent])
                sent += 1
                if sent % 16 == 0:
                    break
            self._read(0.0 if sent < len(times) and begin + times[sent] <= now else 0.001)
            if now > watched + 0.25:
                watch()
                watched = now
        for line in [line for line in self._lines.values() if line.colour >= 0]:
            self._drop(line)
        for answer in tally.answers:
            found = json.loads(answer.body)["data"][0]["embedding"][:3]
            tally.wrong += not np.allclose(found, self.colours[answer.colour] / 255, atol=1e-3)
        return tally

    def close(self) -> None:
        """Close all connections."""
        for line in list(self._lines.values()):
            self._drop(line)

    def _send(self, colour: int, due: float) -> None:
        """On a connection that waits for none, or on a new one."""
        self._tally.sent += 1
        if self._free:
            line = self._free.pop()
            line.colour, line.due = colour, due
            line.socket.send(self._requests[colour])
            return
        connection = socket.socket()
        connection.setblocking(False)
        # Closed without a TIME_WAIT, which would keep its port from the next ones.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.connect_ex(self._address)
        self._lines[connection.fileno()] = Line(connection, colour, due)
        self._poll.register(connection.fileno(), select.EPOLLOUT)
        self._tally.most_connections = max(self._tally.most_connections, len(self._lines))

    def _read(self, wait_s: float) -> None:
        for number, event in self._poll.poll(wait_s):
            line = self._lines[number]
            try:
                if event & select.EPOLLOUT:
                    line.socket.send(self._requests[line.colour])
                    self._poll.modify(number, select.EPOLLIN)
                elif data := line.socket.recv(1 << 16):
                    line.buffer += data
                    self._answered(line)
                else:
                    self._drop(line)
            except OSError:
                self._drop(line)

    def _answered(self, line: Line) -> None:
        head, found, body = line.buffer.partition(b"\r\n\r\n")
        head = head.lower()
        if not found or len(body) < int(head.partition(b"content-length: ")[2].partition(b"\r")[0]):
            return
        tally, status = self._tally, int(head[9:12])
        tally.statuses[status] += 1
        if status == 200:
            tally.answers.append(Answer(line.colour, time.perf_counter() - line.due, body))
        else:
            tally.no_retry_after += status in (429, 503) and b"\r\nretry-after: " not in head
        line.buffer, line.colour = b"", -1
        if b"\r\nconnection: close" in head:
            self._drop(line)
        else:
            self._free.append(line)

    def _drop(self, line: Line) -> None:
        self._tally.broken += line.colour >= 0
        if line.colour < 0 and line in self._free:
            self._free.remove(line)
        del self._lines[line.socket.fileno()]
        line.socket.close()


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(port: int, pid: int, slow: bool) -> list[Row]:
    """All rows against a running service."""
    load = Load(port)
    load.closed(CALLERS[slow], 2)
    limit = load.closed(CALLERS[slow], SECONDS)
    idle, usual = resident_mb(pid), 0.0
    rows: list[Row] = []
    for factor, wanted in FACTORS.items():
        memory = [idle]
        tally = load.arrivals(factor * limit, SECONDS, lambda: memory.append(resident_mb(pid)))  # noqa: B023
        begun = time.perf_counter()
        while load.arrivals(20, 0.5, lambda: None).statuses.keys() != {200}:
            pass
        recovery = time.perf_counter() - begun - 0.5
        load.close()
        goodput = sum(answer.latency_s <= IN_TIME_S for answer in tally.answers) / SECONDS
        usual = usual or goodput
        bound = WHERE_SLOW if slow else wanted
        rows.append(row(tally, factor, limit, goodput, goodput / usual, bound, max(memory) - idle, recovery))
        print(json.dumps({"factor": factor, **tally.facts()}), file=sys.stderr)
    return rows


def row(
    tally: Tally,
    factor: float,
    limit: float,
    goodput: float,
    share: float,
    wanted: float,
    more_mb: float,
    recovery_s: float,
) -> Row:
    """What one load came to."""
    late = float(np.percentile(tally.late, 99))
    p50, p99 = np.percentile([a.latency_s for a in tally.answers] or [0.0], (50, 99))
    refused = sum(count for status, count in tally.statuses.items() if status in (429, 503))
    strange = tally.sent - len(tally.answers) - refused
    figure = (
        f"goodput {goodput:.0f}/s, {share * 100:.0f} %, p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, "
        f"{tally.wrong} wrong, "
        f"{strange} neither answered nor refused, {more_mb:+.0f} MB, as before after {recovery_s:.1f} s"
    )
    good = share >= wanted and p99 <= IN_TIME_S and more_mb <= MOST_MB and recovery_s <= IN_TIME_S
    clean = not (tally.wrong or strange or tally.no_retry_after)
    if late > LATE_S:
        figure = f"void: the generator was late by {late * 1e3:.0f} ms; {figure}"
    done = f"{factor:g} times its limit of {limit:.0f} images/s, {SECONDS:g} s"
    bounds = f"goodput {wanted * 100:.0f} %, p99 2 s, none wrong or lost, {MOST_MB} MB, 2 s"
    return Row("overload", done, figure, bounds, None if late > LATE_S else bool(good and clean))


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
            rows += measure(stage.gateway.port, stage.gateway.process.pid, slow)
    return rows


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
