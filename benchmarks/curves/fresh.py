"""A measurement in a process of its own, whose peak memory is then the measurement's alone."""

import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median

WARM_CALLS = 3
"""TorchScript compiles in its first two; others need one."""
SECONDS = 1.5


def fresh(work: Callable[..., float], *args: object) -> tuple[float, float]:
    """What `work` returns in a new process, and the most memory that the process took, in MB."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result(), pool.submit(own_peak_mb).result()


def own_peak_mb() -> float:
    """Of this process."""
    return peak_mb([os.getpid()])


def peak_mb(pids: Iterable[int]) -> float:
    """The most that each of the processes has had in memory so far, added up; Linux alone says it."""
    found = []
    for pid in pids:
        # It may have ended meanwhile.
        with suppress(OSError):
            found += re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return sum(map(int, found)) * 1024 / 1e6


def call_s(call: Callable[[], object], warm: int = WARM_CALLS) -> float:
    """Seconds of a call: the median of those of a second and a half, and of two at least."""
    for _ in range(warm):
        call()
    times: list[float] = []
    while len(times) < 2 or sum(times) < SECONDS:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)
