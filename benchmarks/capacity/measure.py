"""What this machine gives: decoding, the gateway's own work for a request and the model, each by itself, on one core.

Then the embedded service on that core under rising load.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.capacity.simulate import Outcome, Times, summary
from benchmarks.gateway import SIZES, photos, photos_to
from benchmarks.trust.stage import Gateway as Served
from benchmarks.trust.stage import family, machine, processor_s, staged
from entry.config import ImageSpec
from entry.images import load_image
from entry.runner import Runner

CURVE = (0.3, 0.6, 0.8, 0.95, 1.1)
"""Load, in times of what CALLERS get who each wait for their answer."""
CALLERS = 32
BUSY_S = 6.0
"""For how long callers keep the core busy while the gateway's own work is timed; of a core that is mostly idle each
request takes several times as long."""


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread, and those that it begins."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def mean_seconds(function: Any, *arguments: Any, seconds: float) -> float:
    """Of a core, for a call."""
    function(*arguments)
    calls, begin = 0, time.process_time()
    while (elapsed := time.process_time() - begin) < seconds:
        function(*arguments)
        calls += 1
    return elapsed / calls


def pin(gateway: Served, core: int) -> None:
    """With all its threads."""
    for process in family(gateway.process.pid):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})


def decoding(files: list[bytes], spec: ImageSpec) -> tuple[float, ...]:
    """Seconds of a core, for each."""
    return tuple(mean_seconds(load_image, file, spec, seconds=0.2) for file in files)


def computing(runner: Runner) -> tuple[float, float]:
    """(seconds of a batch, more for each image), on one core."""
    size, seconds = runner.entry.prg.image.size, {}
    for n in (1, 4, 16, 32):
        images, levels = np.zeros((n, 3, size, size), np.uint8), np.full(n, 0.8, np.float32)
        # TorchScript compiles in its first calls.
        for _ in range(3):
            runner.run(images, levels)
        seconds[n] = mean_seconds(runner.run, images, levels, seconds=1.5)
    image_s, batch_s = np.polyfit(list(seconds), list(seconds.values()), 1)
    return max(0.0, float(batch_s)), float(image_s)


def overhead(files: list[bytes], core: int, other: int) -> float:
    """Seconds of the gateway's own work for a request: with a model that takes no time, all but decoding."""
    with staged("embedded") as stage:
        with on_core(core):
            tiny = Runner(stage.repository / "tiny")
            rest_s = float(np.mean(decoding(files, tiny.entry.prg.image)))
            rest_s += mean_seconds(
                tiny.run, np.zeros((1, 3, 32, 32), np.uint8), np.zeros(1, np.float32), seconds=0.2
            )
        pin(stage.gateway, core)
        with on_core(other):
            load = photos_to(stage.gateway.port, files)
            load.closed(16, 2)
            pid = stage.gateway.process.pid
            before = processor_s(pid)
            answered = load.closed(16, BUSY_S).rate * BUSY_S
            return (processor_s(pid) - before) / answered - rest_s


def measured(entry: Path, files: list[bytes], seconds: float, core: int, other: int) -> list[dict[str, Any]]:
    """The embedded service on one core under each load."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        gateway = Served(Path(folder), {"model_repository": entry.parent, "models": entry.name})
        try:
            gateway.start()
            pin(gateway, core)
            with on_core(other):
                load = photos_to(gateway.port, files)
                load.closed(16, 4)
                limit = load.closed(CALLERS, seconds).rate
                for factor in CURVE:
                    arrived = load.opened(factor * limit, seconds, 0.0)
                    load.close()
                    failed = len(arrived.answers) - len(arrived.good)
                    found = Outcome([answer.latency_s for answer in arrived.good], failed)
                    rows.append({"load": factor} | summary(factor * limit, found))
        finally:
            gateway.stop()
    return rows


def measure(entry: Path, seconds: float) -> dict[str, Any]:
    """The times, and the curve of the embedded service on one core. The generator has another one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for the load")
    # Of this process, and of the services that it starts.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    files = photos(len(SIZES) * 4)
    with on_core(cores[0]):
        runner = Runner(entry)
        decode_s = decoding(files, runner.entry.prg.image)
        batch_s, image_s = computing(runner)
    times = Times(overhead(files, *cores[:2]), decode_s, batch_s, image_s)
    if min(times.overhead_s, image_s) <= 0:
        raise SystemExit("a time came out below zero: other work disturbed the measurement; run it again")
    by_size = [
        {
            "pixels": list(pixels),
            "bytes": round(float(np.mean([len(file) for file in files[i :: len(SIZES)]]))),
            "decode_ms": round(float(np.mean(decode_s[i :: len(SIZES)])) * 1e3, 2),
        }
        for i, pixels in enumerate(SIZES)
    ]
    rows = measured(entry, files, seconds, *cores[:2])
    facts = {"machine": machine(), "entry": entry.name, "times": asdict(times), "photos": by_size}
    return facts | {"callers": CALLERS, "seconds": seconds, "curve": rows}
