"""How many gateways, GPUs, cores and how much network a load needs: a simulation, first held against this machine.

One image a request, arriving at random (Poisson). A gateway has one event loop and decodes in as many threads as it
has cores, which it shares in slices; an engine computes whatever waits, a batch at a time. No network delay, no proxy.

--measure  times decoding, the gateway's own work for a request and the model, each by itself, on one core; then the
           embedded service on that core under rising load, beside what the simulation makes of those times. Writes the
           file of times, some three minutes.
Without it, the tables are made from that file. What is assumed is an option: prices, the GPU, how busy things may be.

PYTHONPATH=. python benchmarks/capacity.py [--measure]
"""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simpy
import torch

from benchmarks.gateway import SIZES, photos, photos_to
from benchmarks.trust.stage import Gateway as Served
from benchmarks.trust.stage import family, machine, processor_s, staged
from entry.config import ImageSpec
from entry.images import load_image
from entry.runner import Runner

TIMES = Path("docs/results/capacity.json")
SLICE_S = 0.003
"""For which a thread has a core while others want it."""
CURVE = (0.3, 0.6, 0.8, 0.95, 1.1)
"""Load, in times of what 32 callers get who each wait for their answer."""
SECONDS = 12.0
USUAL_RATE = 50.0
"""Requests a second while the gateway's own work is timed. Under more of them each takes less."""
LOADS = (10_000, 100_000)
SIMULATED_S = 1.0
BACKFILL = 1_000_000_000


@dataclass(frozen=True)
class Times:
    """Seconds of one core, but for the model's."""

    overhead_s: float
    """The gateway's own work for a request: HTTP, the form, JSON, the log."""
    decode_s: tuple[float, ...]
    """Of each photo in turn."""
    batch_s: float
    image_s: float
    """A batch of n takes batch_s + n x image_s."""

    def of_batch(self, images: int) -> float:
        return self.batch_s + images * self.image_s


@dataclass(frozen=True)
class Site:
    """What runs."""

    gateways: int = 1
    cores: int = 1
    """Of each gateway."""
    engines: int = 0
    """GPUs; without one the gateway's own cores compute the model, one thread."""
    max_batch: int = 32
    max_delay_s: float = 0.003
    queue: int = 512
    """Images that a gateway admits."""


@dataclass
class Outcome:
    """What became of the requests."""

    latencies: list[float] = field(default_factory=list)
    refused: int = 0

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies or [math.nan], q))


Steps = Generator[simpy.Event, Any, None]


class Waiting(NamedTuple):
    """An image before an engine."""

    since: float
    answered: simpy.Event


class Engine:
    """Computes what waits, a batch at a time."""

    def __init__(
        self, env: simpy.Environment, site: Site, times: Times, cores: simpy.Resource | None
    ) -> None:
        self.waiting = simpy.Store(env)
        self.in_flight = 0
        self._site, self._times, self._cores = site, times, cores
        env.process(self._run(env))

    def _run(self, env: simpy.Environment) -> Steps:
        while True:
            batch: list[Waiting] = [(yield self.waiting.get())]
            if self._cores and (delay := batch[0].since + self._site.max_delay_s - env.now) > 0:
                yield env.timeout(delay)
            while self.waiting.items and len(batch) < self._site.max_batch:
                batch.append((yield self.waiting.get()))
            seconds = self._times.of_batch(len(batch))
            yield from work(env, self._cores, seconds) if self._cores else wait(env, seconds)
            self.in_flight -= len(batch)
            for image in batch:
                image.answered.succeed()


class Gateway:
    """One event loop, and threads that decode."""

    def __init__(self, env: simpy.Environment, site: Site) -> None:
        self.loop = simpy.Resource(env)
        self.threads = simpy.Resource(env, site.cores)
        self.cores = simpy.Resource(env, site.cores)
        self.held = 0


def wait(env: simpy.Environment, seconds: float) -> Steps:
    """Somewhere else."""
    yield env.timeout(seconds)


def work(env: simpy.Environment, cores: simpy.Resource, seconds: float) -> Steps:
    """On one of the cores, in turns with whoever else works there."""
    while seconds > 1e-9:
        with cores.request() as turn:
            yield turn
            part = min(SLICE_S, seconds)
            yield env.timeout(part)
            seconds -= part


def simulate(times: Times, site: Site, rate: float, seconds: float, warm_s: float = 0.0) -> Outcome:
    """So many requests a second for so long; those of the first `warm_s` are not counted."""
    env, outcome, rng = simpy.Environment(), Outcome(), np.random.default_rng(1)
    gateways = [Gateway(env, site) for _ in range(site.gateways)]
    shared = [Engine(env, site, times, None) for _ in range(site.engines)]
    own = {id(g): [Engine(env, site, times, g.cores)] for g in gateways if not shared}

    def request(gateway: Gateway, decode_s: float) -> Steps:
        begun = env.now
        if gateway.held >= site.queue:
            outcome.refused += begun >= warm_s
            return
        gateway.held += 1
        with gateway.loop.request() as turn:
            yield turn
            yield from work(env, gateway.cores, times.overhead_s / 2)
        with gateway.threads.request() as turn:
            yield turn
            yield from work(env, gateway.cores, decode_s)
        engine = min(shared or own[id(gateway)], key=lambda e: e.in_flight)
        engine.in_flight += 1
        image = Waiting(env.now, env.event())
        engine.waiting.put(image)
        yield image.answered
        with gateway.loop.request() as turn:
            yield turn
            yield from work(env, gateway.cores, times.overhead_s / 2)
        gateway.held -= 1
        if begun >= warm_s:
            outcome.latencies.append(env.now - begun)

    def arrivals() -> Steps:
        for i, gap in enumerate(rng.exponential(1 / rate, int(rate * seconds))):
            yield env.timeout(gap)
            gateway = gateways[i % len(gateways)]
            env.process(request(gateway, times.decode_s[i % len(times.decode_s)]))

    env.process(arrivals())
    env.run()
    return outcome


# What this machine gives.


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
            answered = len(load.opened(USUAL_RATE, 6, 0.0).good)
            return (processor_s(pid) - before) / answered - rest_s


def measured(
    entry: Path, times: Times, files: list[bytes], seconds: float, core: int, other: int
) -> list[dict[str, Any]]:
    """The embedded service on one core under each load, beside the simulation."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        gateway = Served(Path(folder), {"model_repository": entry.parent, "models": entry.name})
        try:
            gateway.start()
            pin(gateway, core)
            with on_core(other):
                load = photos_to(gateway.port, files)
                load.closed(16, 4)
                limit = load.closed(32, seconds).rate
                for factor in CURVE:
                    rate = factor * limit
                    arrived = load.opened(rate, seconds, 0.0)
                    load.close()
                    failed = len(arrived.answers) - len(arrived.good)
                    found = Outcome([answer.latency_s for answer in arrived.good], failed)
                    both = {
                        "measured": summary(found),
                        "simulated": summary(simulate(times, Site(), rate, seconds)),
                    }
                    rows.append({"load": factor, "arrivals_per_s": round(rate, 1)} | both)
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
    rows = measured(entry, times, files, seconds, *cores[:2])
    facts = {"machine": machine(), "entry": entry.name, "times": asdict(times), "photos": by_size}
    return facts | {"curve": rows}


def summary(outcome: Outcome) -> dict[str, float]:
    """Milliseconds, and the share that was refused."""
    total = len(outcome.latencies) + outcome.refused
    figures = {f"p{q}_ms": round(outcome.percentile(q) * 1e3) for q in (50, 95)}
    return figures | {"refused": round(outcome.refused / total, 2)}


# The tables.


@dataclass(frozen=True)
class Assumed:
    """What is not measured here."""

    gpu_batch_ms: float
    gpu_image_ms: float
    max_batch: int
    cores: int
    machine_cores: int
    busy: float
    gpu_hour: float
    core_hour: float


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Markdown; all but the first column to the right."""
    lines = [header, ("---", *("---:",) * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def curve(facts: dict[str, Any]) -> str:
    """Measured beside simulated."""
    rows = [
        (
            f"{row['load']:g}",
            f"{row['arrivals_per_s']:.0f}",
            *(f"{row['measured'][key]:g} / {row['simulated'][key]:g}" for key in ("p50_ms", "p95_ms")),
        )
        for row in facts["curve"]
    ]
    return table(("load", "arrivals/s", "p50, ms: measured / simulated", "p95, ms"), rows)


def sized(load: float, photo: dict[str, Any], overhead_s: float, assumed: Assumed) -> tuple[Times, Site]:
    """As few gateways and GPUs as keep each of them no busier than assumed."""
    times = Times(
        overhead_s, (photo["decode_ms"] / 1e3,), assumed.gpu_batch_ms / 1e3, assumed.gpu_image_ms / 1e3
    )
    of_a_gpu = assumed.max_batch / times.of_batch(assumed.max_batch)
    # One event loop a gateway; and its cores.
    of_a_gateway = min(1 / overhead_s, assumed.cores / (overhead_s + times.decode_s[0]))
    gateways, gpus = (math.ceil(load / (assumed.busy * each)) for each in (of_a_gateway, of_a_gpu))
    return times, Site(gateways, assumed.cores, gpus, assumed.max_batch)


def online(facts: dict[str, Any], assumed: Assumed) -> str:
    """Photos of each size, at each of the loads."""
    rows = []
    for load in LOADS:
        for photo in facts["photos"][1:4]:
            times, site = sized(load, photo, facts["times"]["overhead_s"], assumed)
            latencies = ("as above", "as above")
            # Ten times as many of each wait no longer: only the smaller one is simulated.
            if load == min(LOADS):
                usual, less = (
                    simulate(times, replace(site, engines=engines), load, SIMULATED_S, SIMULATED_S / 4)
                    for engines in (site.engines, max(1, site.engines - 1))
                )
                both = f"{usual.percentile(50) * 1e3:.0f} / {usual.percentile(99) * 1e3:.0f}"
                latencies = (both, f"{less.percentile(99) * 1e3:.0f}")
            cost = site.engines * assumed.gpu_hour + site.gateways * site.cores * assumed.core_hour
            rows.append(
                (
                    f"{load:,}",
                    "{} x {}".format(*photo["pixels"]),
                    site.gateways,
                    site.engines,
                    f"{load * photo['bytes'] * 8 / 1e9:.1f}",
                    *latencies,
                    f"{cost:,.0f}",
                    f"{cost / 3600 / load * 1e6:.2f}",
                )
            )
    head = ("images/s", "photo", "gateways", "GPUs", "Gbit/s in", "p50 / p99, ms")
    return table((*head, "p99 with one GPU less", "cost an hour", "cost a million"), rows)


def backfill(facts: dict[str, Any], assumed: Assumed) -> str:
    """By `prg embed` on machines with one GPU each."""
    rows = []
    of_a_gpu = assumed.max_batch / (assumed.gpu_batch_ms + assumed.max_batch * assumed.gpu_image_ms) * 1e3
    for photo in facts["photos"]:
        decoded = assumed.machine_cores / photo["decode_ms"] * 1e3
        rate = min(decoded, of_a_gpu)
        hours = BACKFILL / rate / 3600
        cost = hours * (assumed.gpu_hour + assumed.machine_cores * assumed.core_hour)
        rows.append(
            (
                "{} x {}".format(*photo["pixels"]),
                f"{photo['bytes'] / 1e3:.0f}",
                f"{1e3 / photo['decode_ms']:.0f}",
                math.ceil(of_a_gpu * photo["decode_ms"] / 1e3),
                f"{rate:,.0f}",
                "decoding" if decoded < of_a_gpu else "the GPU",
                f"{rate * photo['bytes'] * 8 / 1e9:.1f}",
                f"{hours / 24:.1f}",
                f"{cost:,.0f}",
                f"{cost / BACKFILL * 1e6:.2f}",
            )
        )
    head = (
        "photo",
        "kB",
        "images/s a core",
        "cores that feed a GPU",
        "images/s a machine",
        "limit",
        "Gbit/s in",
    )
    return table((*head, "machine-days", "cost", "cost a million"), rows)


def tables(facts: dict[str, Any], assumed: Assumed) -> dict[str, str]:
    """All of them, by name."""
    return {
        "curve": curve(facts),
        "online": online(facts, assumed),
        "backfill": backfill(facts, assumed),
    }


def parser() -> argparse.ArgumentParser:
    """The defaults are those of docs/scaling.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure this machine, and write --times")
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-everyday"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load, when measuring")
    parser.add_argument("--times", type=Path, default=TIMES, help=f"default: {TIMES}")
    # prg-cifar10 on an H200 in TF32: 4.05 ms for 8 images, 4.88 for 64 (docs/results.md).
    parser.add_argument("--gpu-batch-ms", type=float, default=3.93, help="of a batch, whatever is in it")
    parser.add_argument("--gpu-image-ms", type=float, default=0.0148, help="more for each image")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--cores", type=int, default=2, help="of a gateway")
    parser.add_argument("--machine-cores", type=int, default=16, help="beside the GPU, in a backfill")
    parser.add_argument("--busy", type=float, default=0.6, help="share of the time that things may be busy")
    parser.add_argument("--gpu-hour", type=float, default=4.0, help="price")
    parser.add_argument("--core-hour", type=float, default=0.05, help="price")
    return parser


def assumed_by(arguments: argparse.Namespace) -> Assumed:
    """Raises SystemExit for what can't be."""
    values = {name: getattr(arguments, name) for name in Assumed.__dataclass_fields__}
    for name, value in values.items():
        if value <= 0 and not name.endswith("_hour"):
            raise SystemExit(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    if values["busy"] >= 1:
        raise SystemExit(f"--busy {values['busy']:g}: must be below 1, else what waits grows without end")
    return Assumed(**values)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    assumed = assumed_by(arguments)
    if arguments.measure:
        facts = measure(arguments.entry, arguments.seconds)
        arguments.times.write_text(json.dumps(facts, indent=1) + "\n")
    elif not arguments.times.is_file():
        raise SystemExit(f"{arguments.times}: no such file; --measure writes it")
    facts = json.loads(arguments.times.read_text("utf-8"))
    print(facts["machine"], facts["entry"], sep="; ")
    for name, text in tables(facts, assumed).items():
        print(f"\n{name}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
