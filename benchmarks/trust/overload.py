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
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.generator import Answer, Load, Measured, post
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


def colours() -> np.ndarray:
    """Of the images that are sent."""
    return np.random.default_rng(0).integers(0, 256, (COLOURS, 3))


def coloured(port: int) -> Load:
    """Images of these colours, in turn."""
    images = [png(tuple(int(c) for c in colour)) for colour in colours()]
    return Load(port, [post("/embed", "image/png", image) for image in images])


def wrong(answers: list[Answer]) -> int:
    """How many are not of their own image."""
    found = [json.loads(answer.body)["data"][0]["embedding"][:3] for answer in answers]
    own = colours()[[answer.request for answer in answers]] / 255
    return int((~np.isclose(np.array(found), own, atol=1e-3).all(1)).sum()) if answers else 0


def limit_of(load: Load, slow: bool) -> float:
    """Answers a second to callers who each wait for theirs."""
    load.closed(CALLERS[slow], 1)
    rate = load.closed(CALLERS[slow], SECONDS).rate
    load.close()
    return rate


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(port: int, pid: int, slow: bool) -> list[Row]:
    """All rows against a running service."""
    load = coloured(port)
    limit = limit_of(load, slow)
    idle, usual = resident_mb(pid), 0.0
    rows: list[Row] = []
    for factor, wanted in FACTORS.items():
        memory = [idle]
        measured = load.opened(factor * limit, SECONDS, 0.0, lambda: memory.append(resident_mb(pid)))  # noqa: B023
        begun = time.perf_counter()
        while any(answer.status != 200 for answer in load.opened(20, 0.5, 0.0).answers):
            pass
        recovery = time.perf_counter() - begun - 0.5
        load.close()
        goodput = sum(answer.latency_s <= IN_TIME_S for answer in measured.good) / SECONDS
        usual = usual or goodput
        bound = WHERE_SLOW if slow else wanted
        more_mb = max(memory) - idle
        rows.append(row(measured, factor, limit, goodput, goodput / usual, bound, more_mb, recovery))
        statuses = Counter(answer.status for answer in measured.answers)
        print(json.dumps({"factor": factor, "statuses": statuses}), file=sys.stderr)
    return rows


def row(
    measured: Measured,
    factor: float,
    limit: float,
    goodput: float,
    share: float,
    wanted: float,
    more_mb: float,
    recovery_s: float,
) -> Row:
    """What one load came to."""
    p50, p99 = np.percentile([answer.latency_s for answer in measured.good] or [0.0], (50, 99))
    refused = [answer for answer in measured.answers if answer.status in (429, 503)]
    strange = len(measured.answers) - len(measured.good) - len(refused)
    no_retry_after = any(b"\r\nretry-after: " not in answer.head for answer in refused)
    mistaken = wrong(measured.good)
    figure = (
        f"goodput {goodput:.0f}/s, {share * 100:.0f} %, p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, "
        f"{mistaken} wrong, "
        f"{strange} neither answered nor refused, {more_mb:+.0f} MB, as before after {recovery_s:.1f} s"
    )
    good = share >= wanted and p99 <= IN_TIME_S and more_mb <= MOST_MB and recovery_s <= IN_TIME_S
    clean = not (mistaken or strange or no_retry_after)
    late = measured.late_s > LATE_S
    if late:
        figure = f"void: the generator was late by {measured.late_s * 1e3:.0f} ms; {figure}"
    done = f"{factor:g} times its limit of {limit:.0f} images/s, {SECONDS:g} s"
    bounds = f"goodput {wanted * 100:.0f} %, p99 2 s, none wrong or lost, {MOST_MB} MB, 2 s"
    return Row("overload", done, figure, bounds, None if late else bool(good and clean))


@contextmanager
def apart(engine: str) -> Iterator[Stage]:
    """The gateway on the first core, all else on the second. Raises Absent where there is one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Absent("two cores are needed, one for the generator")
    try:
        # Else PyTorch would have a thread for each core of the machine, which wait for each other on one by spinning.
        with patch.dict(os.environ, OMP_NUM_THREADS="1"), staged(engine) as stage:
            gateway = stage.gateway.process.pid
            for pid, core in ((gateway, cores[0]), *((pid, cores[1]) for pid in triton_pids(stage))):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), {core})
            os.sched_setaffinity(0, {cores[1]})
            yield stage
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
        with apart(engine) as stage:
            if slow:
                stage.slow(SLOW_MS)
            rows += measure(stage.gateway.port, stage.gateway.process.pid, slow)
    return rows


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
