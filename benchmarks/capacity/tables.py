"""The tables of docs/scaling.md, from times and assumptions."""

import math
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.capacity.simulate import Outcome, Site, Times, limit, simulate, summary

LOADS = (10_000, 100_000)
SIMULATED_S = 1.0
BACKFILL = 1_000_000_000


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


LIMIT_S, RUNS = 60.0, 20
"""For how long the limit is simulated; and how often each load is: near the limit arrivals at random differ most."""
COMPARED = {
    "arrivals_per_s": "arrivals/s: measured / simulated",
    "p50_ms": "p50, ms",
    "p95_ms": "p95, ms",
}


def curve(facts: dict[str, Any]) -> str:
    """Measured beside simulated, each loaded in times of its own limit: near it a few per cent decide how long a queue
    stands."""
    times, site = Times(**facts["times"]), Site()
    own = limit(times, site, facts["callers"], LIMIT_S)
    rows = []
    for measured in facts["curve"]:
        rate, pooled = measured["load"] * own, Outcome()
        for seed in range(RUNS):
            one = simulate(times, site, rate, facts["seconds"], seed=seed)
            pooled.latencies += one.latencies
            pooled.refused += one.refused
        simulated = summary(rate, pooled)
        rows.append(
            (f"{measured['load']:g}", *(f"{measured[key]:g} / {simulated[key]:g}" for key in COMPARED))
        )
    return table(("load", *COMPARED.values()), rows)


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
