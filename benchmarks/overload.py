"""The gateway above its limit: requests arrive at a fixed rate, whether earlier ones are answered or not.

The service runs on one core; the generator and Triton on another. First the limit: as many answers a second as
callers get who each wait for theirs. Then arrivals at random (Poisson) at 0.9, 2, 4 and 10 times that. A request goes
out on a connection that waits for none, or on a new one. Each answer is checked against its own image.

A row is void where the generator itself was late (99 % of requests within 50 ms of their time). Prints one JSON line
last.

python -m benchmarks.overload [--engine triton|embedded] [--slow-ms N] [--seconds N]
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import uvloop

from prg.machine import device_name
from tests.real_triton.server import TritonServer, free_ports
from tests.tiny import png, write_tiny_entry

COLOURS = 64
FACTORS = (0.9, 2, 4, 10)
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


def row(name: str, tally: Tally, rate: float, seconds: float, peak_mb: float) -> dict[str, object]:
    """The figures of one row."""
    times = tally.latencies or [0.0]
    p50, p99 = np.percentile(times, (50, 99))
    late = float(np.percentile(tally.late, 99))
    return {
        "load": name,
        "arrivals_per_s": round(rate),
        "goodput_per_s": round(sum(latency <= IN_TIME_S for latency in tally.latencies) / seconds, 1),
        "p50_ms": round(p50 * 1e3),
        "p99_ms": round(p99 * 1e3),
        "statuses": tally.statuses,
        "wrong": tally.wrong,
        "broken": tally.broken,
        "unanswered": tally.sent - sum(tally.statuses.values()) - tally.broken,
        "no_retry_after": tally.no_retry_after,
        "connections": tally.most_connections,
        "late_p99_ms": round(late * 1e3, 1),
        "void": late > LATE_S,
        "resident_mb": round(peak_mb),
    }


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure(port: int, pid: int, seconds: float, callers: int) -> dict[str, object]:
    """All rows against a running service."""
    load = Load(port)
    await load.closed(callers, 2)
    limit = await load.closed(callers, seconds)
    idle = resident_mb(pid)
    rows = []
    for factor in FACTORS:
        peak = idle

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, resident_mb(pid))
                await asyncio.sleep(0.25)

        watching = asyncio.ensure_future(watch())
        tally = await load.arrivals(factor * limit, seconds)
        watching.cancel()
        rows.append(row(f"{factor:g} x", tally, factor * limit, seconds, peak))
        print(json.dumps(rows[-1]), file=sys.stderr)
        start = time.perf_counter()
        while (await load.arrivals(20, 0.5)).statuses.keys() != {200}:
            pass
        rows[-1]["recovery_s"] = round(time.perf_counter() - start - 0.5, 2)
        load.close()
    return {"limit_per_s": round(limit, 1), "idle_mb": round(idle), "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Start the service, and Triton if asked; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("triton", "embedded"), default="triton")
    parser.add_argument(
        "--slow-ms", type=int, default=0, help="that a batch takes; 0: the gateway is the limit"
    )
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--callers", type=int, default=64)
    arguments = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:2] or cores)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        entry = write_tiny_entry(work / "models")
        if arguments.slow_ms:
            (entry / "slow-ms").write_text(str(arguments.slow_ms))
        environment = os.environ | {
            "PRG_ENGINE": arguments.engine,
            "PRG_MODEL_REPOSITORY": str(work / "models"),
        }
        triton = None
        if arguments.engine == "triton":
            triton = TritonServer(work / "models", work).start()
            environment["PRG_TRITON_URL"] = triton.url
        port = free_ports(1)[0]
        environment["PRG_PORT"] = str(port)
        service = subprocess.Popen(
            [sys.executable, "-m", "service.app"],
            env=environment,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]),
        )
        try:
            facts = uvloop.run(ready_then(port, service.pid, arguments))
        finally:
            service.terminate()
            service.wait(60)
            if triton:
                triton.stop()
    facts |= {"benchmark": "overload", "engine": arguments.engine, "slow_ms": arguments.slow_ms}
    print(json.dumps(facts | {"processor": device_name(torch.device("cpu"))}))
    return 0


async def ready_then(port: int, pid: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Measure once the service is ready."""
    for _ in range(600):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if answer.startswith(b"HTTP/1.1 200"):
                break
        except OSError:
            pass
        await asyncio.sleep(0.1)
    else:
        raise SystemExit("the service did not become ready within 60 s")
    return await measure(port, pid, arguments.seconds, arguments.callers)


if __name__ == "__main__":
    sys.exit(main())
