"""The simulation: gateways, engines and requests that arrive at random (Poisson), an image each.

A gateway has one event loop and decodes in as many threads as it has cores, which it shares in slices; an engine
computes whatever waits, a batch at a time. No network delay, no proxy.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import simpy

SLICE_S = 0.003
"""For which a thread has a core while others want it."""


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


def summary(rate: float, outcome: Outcome) -> dict[str, float]:
    """Arrivals a second, milliseconds, and the share that was refused."""
    total = len(outcome.latencies) + outcome.refused
    figures = {f"p{q}_ms": round(outcome.percentile(q) * 1e3) for q in (50, 95)}
    return {"arrivals_per_s": round(rate)} | figures | {"refused": round(outcome.refused / total, 2)}


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


class Scene:
    """A site with nothing under way, and what becomes of its requests."""

    def __init__(self, times: Times, site: Site) -> None:
        self.env, self.outcome = simpy.Environment(), Outcome()
        self._times, self._site = times, site
        self._gateways = [Gateway(self.env, site) for _ in range(site.gateways)]
        self._shared = [Engine(self.env, site, times, None) for _ in range(site.engines)]
        self._own = [
            Engine(self.env, site, times, gateway.cores) for gateway in self._gateways if not self._shared
        ]

    def request(self, i: int, warm_s: float = 0.0) -> Steps:
        """The i-th, not counted where it begins within `warm_s`."""
        env, times, begun = self.env, self._times, self.env.now
        at = i % len(self._gateways)
        gateway, engines = self._gateways[at], self._shared or self._own[at : at + 1]
        if gateway.held >= self._site.queue:
            self.outcome.refused += begun >= warm_s
            return
        gateway.held += 1
        with gateway.loop.request() as turn:
            yield turn
            yield from work(env, gateway.cores, times.overhead_s / 2)
        with gateway.threads.request() as turn:
            yield turn
            yield from work(env, gateway.cores, times.decode_s[i % len(times.decode_s)])
        engine = min(engines, key=lambda e: e.in_flight)
        engine.in_flight += 1
        image = Waiting(env.now, env.event())
        engine.waiting.put(image)
        yield image.answered
        with gateway.loop.request() as turn:
            yield turn
            yield from work(env, gateway.cores, times.overhead_s / 2)
        gateway.held -= 1
        if begun >= warm_s:
            self.outcome.latencies.append(env.now - begun)


def simulate(
    times: Times, site: Site, rate: float, seconds: float, warm_s: float = 0.0, seed: int = 1
) -> Outcome:
    """So many requests a second for so long; those of the first `warm_s` are not counted."""
    scene, rng = Scene(times, site), np.random.default_rng(seed)

    def arrivals() -> Steps:
        for i, gap in enumerate(rng.exponential(1 / rate, int(rate * seconds))):
            yield scene.env.timeout(gap)
            scene.env.process(scene.request(i, warm_s))

    scene.env.process(arrivals())
    scene.env.run()
    return scene.outcome


def limit(times: Times, site: Site, callers: int, seconds: float) -> float:
    """Answers a second, where each caller waits for its answer before it asks again."""
    scene, numbers = Scene(times, site), count()

    def caller() -> Steps:
        while True:
            yield from scene.request(next(numbers))

    for _ in range(callers):
        scene.env.process(caller())
    scene.env.run(until=seconds)
    return len(scene.outcome.latencies) / seconds
