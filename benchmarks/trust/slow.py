"""A thousand callers who send a byte a second, in their heads or their bodies, beside one honest caller."""

import asyncio
import contextlib
import sys
import time

import numpy as np

from benchmarks.trust.rows import Row, main
from benchmarks.trust.stage import staged
from tests.tiny import png

SLOW = 1000
SECONDS = 20.0
HEAD = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"


async def slow_caller(port: int, in_body: bool, counts: dict[str, int]) -> None:
    """Sends a byte a second; when it is closed, begins again."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            counts["opened"] += 1
            if in_body:
                writer.write(HEAD + b"content-length: 5000\r\n\r\n")
            closed = asyncio.ensure_future(reader.read())
            for byte in HEAD * 100:
                writer.write(bytes([byte]))
                done, _ = await asyncio.wait({closed}, timeout=1)
                if done or time.monotonic() > end:
                    counts["closed"] += bool(done)
                    break
            writer.close()
            closed.cancel()


async def honest_caller(port: int, seconds: float) -> tuple[list[float], int]:
    """(milliseconds of each answer, failures) of one who opens a connection for each image."""
    times, failed = [], 0
    body = png()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            answer = await reader.read()
            writer.close()
            failed += not answer.startswith(b"HTTP/1.1 200")
        except OSError:
            failed += 1
        times.append((time.perf_counter() - begun) * 1e3)
        await asyncio.sleep(0.02)
    return times, failed


async def measure(port: int) -> Row:
    """The honest caller alone, then beside the slow ones."""
    alone, _ = await honest_caller(port, 5)
    counts = {"opened": 0, "closed": 0}
    callers = [asyncio.ensure_future(slow_caller(port, i % 2 == 0, counts)) for i in range(SLOW)]
    await asyncio.sleep(3)
    beside, failed = await honest_caller(port, SECONDS - 5)
    await asyncio.gather(*callers)
    before, after = np.median(alone), np.median(beside)
    figure = (
        f"median {before:.1f} ms alone, {after:.1f} ms beside them (p99 {np.percentile(beside, 99):.1f} ms); "
        f"{failed} of {len(beside)} failed; {counts['closed']:,} of {counts['opened']:,} slow connections were closed"
    )
    done = f"{SLOW:,} callers send a byte a second, {SECONDS:g} s"
    good = not failed and after <= before + 20 and counts["closed"] > 0
    return Row("slow callers", done, figure, "none failed, median at most 20 ms more", bool(good))


def run(engine: str) -> list[Row]:
    """One row."""
    with staged(engine) as stage:
        return [asyncio.run(measure(stage.gateway.port))]


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
