"""This service beside LitServe, BentoML, MLServer and Ray Serve: one machine, one run, one image a request.

    python -m benchmarks.peers [--rounds N] [--more] [--scale X]

Each peer is installed from PyPI into an environment of its own under .venv-peers/. All run the same decoding and the
same model, batches of at most 32, and the delay that each recommends; the generator is on the same cores. Closed loop:
so many callers who each wait for their answer. Open loop: arrivals at random (Poisson) at a share of that server's own
best closed-loop rate. Every answer is compared with that of the model in this process. Prints a table, and writes it
into docs/performance.md.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.generator import Load, Measured
from benchmarks.pages import commit, write_region
from benchmarks.peers.engine import STAND_IN, Engine
from benchmarks.peers.servers import SERVERS, Server, environment, running
from benchmarks.trust.stage import machine, processor_s
from entry.files import write_atomically

ENTRY = Path("model_repository/prg-cifar10")
ENGINES = {STAND_IN: 2.0, ENTRY.name: 4.0}
"""Engine -> seconds of each load."""
CALLERS = (1, 16, 64, 256)
SHARES = (0.5, 0.9)
IMAGES = 64
SHOWN = ("images_per_s", "p50_ms", "p99_ms", "cores")
TOLERANCE = 1e-3
PAGE = Path("docs/performance.md")
RESULTS = Path("docs/results/peers.json")


@dataclass(frozen=True)
class Cell:
    """One server under one load, in one round."""

    round: int
    engine: str
    server: str
    load: str
    images_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    wrong: int
    late_ms: float
    """Of the generator, its 99th percentile."""
    generator: float
    """Its share of a core."""
    cores: float
    """That the server's processes used."""


def pictures(size: int) -> list[bytes]:
    """PNGs that differ: a random colour in each of 4 x 4 fields."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(IMAGES):
        buffer = io.BytesIO()
        fields = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        fields.resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def loads(load: Load, seconds: float) -> Iterator[tuple[str, Measured]]:
    """What each load came to; the open ones at shares of the best closed one."""
    best = 0.0
    for callers in CALLERS:
        measured = load.closed(callers, seconds)
        best = max(best, measured.rate)
        yield str(callers), measured
    for share in SHARES:
        yield f"{share:g} of its best", load.opened(share * best, seconds)


def one_round(number: int, pythons: dict[Server, Path], scale: float) -> Iterator[Cell]:
    """Each server in turn, a different one first in each round."""
    order = list(pythons)
    order = order[number % len(order) :] + order[: number % len(order)]
    for engine, seconds in ENGINES.items():
        os.environ |= {"PEERS_ENGINE": engine, "PEERS_ENTRY": str(ENTRY)}
        model = Engine()
        files = pictures(model.spec.size)
        expected = model.embed([model.decode(file) for file in files])
        for server in order:
            with running(server, pythons[server], ENTRY, engine, files) as (load, pid):
                before = clocks(pid)
                for name, measured in loads(load, seconds * scale):
                    after = clocks(pid)
                    wall, generator, cores = (b - a for a, b in zip(before, after, strict=True))
                    figures = figures_of(server, measured, expected)
                    yield Cell(number, engine, server.name, name, *figures, generator / wall, cores / wall)
                    before = clocks(pid)


def clocks(pid: int) -> tuple[float, float, float]:
    """Seconds: of the wall, of this process on a core, of a server on all cores."""
    return time.perf_counter(), time.process_time(), processor_s(pid)


def figures_of(
    server: Server, measured: Measured, expected: np.ndarray
) -> tuple[float, float, float, int, int, float]:
    """A cell's figures from images_per_s to late_ms; every answer is compared with its own image's."""
    good = measured.good
    p50, p99 = np.percentile([answer.latency_s * 1e3 for answer in good] or [np.nan], (50, 99))
    vectors = np.array([server.vector(json.loads(answer.body)) for answer in good])
    own = expected[[answer.request for answer in good]]
    wrong = int((np.abs(vectors - own).max(1) > TOLERANCE * np.abs(own).max(1)).sum()) if good else 0
    failed = len(measured.answers) - len(good)
    return measured.rate, float(p50), float(p99), failed, wrong, measured.late_s * 1e3


def table(cells: list[Cell], engine: str) -> str:
    """Markdown: a row for each load, a column for each server, medians over the rounds."""
    labels = {s.name: s.label for s in SERVERS if any(c.server == s.name for c in cells)}
    lines = [
        "| callers, or arrivals | " + " | ".join(labels.values()) + " |",
        "|---" * (len(labels) + 1) + "|",
    ]
    for load in dict.fromkeys(c.load for c in cells):
        row = [load]
        for name in labels:
            found = [c for c in cells if (c.engine, c.load, c.server) == (engine, load, name)]
            rate, p50, p99, cores = (median(getattr(c, figure) for c in found) for figure in SHOWN)
            ours = "" if name == SERVERS[0].name else f" (×{ratio(cells, engine, load, name):.2f})"
            row.append(f"{rate:,.0f}/s{ours}<br>{p50:,.0f} / {p99:,.0f} ms<br>{cores:.1f} cores")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def rounded(one: Cell) -> dict[str, object]:
    """For JSON."""
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(one).items()}


def ratio(cells: list[Cell], engine: str, load: str, server: str) -> float:
    """A server's rate to ours in the same round; the median over the rounds."""
    rates = {(c.round, c.server): c.images_per_s for c in cells if (c.engine, c.load) == (engine, load)}
    return median(
        rate / rates[number, SERVERS[0].name] for (number, name), rate in rates.items() if name == server
    )


def ahead(cells: list[Cell]) -> list[str]:
    """Where a peer answers more, and by how much."""
    lines = []
    for engine in ENGINES:
        for callers in map(str, CALLERS):
            for server in {c.server: None for c in cells if c.server != SERVERS[0].name}:
                more = ratio(cells, engine, callers, server) - 1
                if more > 0:
                    lines.append(f"- {engine}, callers: {callers}: {server} by {more * 100:.0f} %")
    return lines


def page(cells: list[Cell], where: str) -> str:
    """What is written into docs/."""
    titles = {STAND_IN: f"An engine of {STAND_IN}", ENTRY.name: f"`{ENTRY.name}` on the processor"}
    parts = [f"{titles[engine]}:\n\n{table(cells, engine)}" for engine in ENGINES]
    behind = ahead(cells)
    parts.append("A peer answers more images than prg-serve here:\n\n" + "\n".join(behind) if behind else "")
    strange = {
        name: tuple(sum(getattr(c, what) for c in cells if c.server == name) for what in ("failed", "wrong"))
        for name in dict.fromkeys(c.server for c in cells)
    }
    told = [f"{name} {failed} and {wrong}" for name, (failed, wrong) in strange.items() if failed or wrong]
    parts.append(f"Requests refused or failed, and wrong answers: {', '.join(told) or 'none'}.")
    missing = [server.label for server in SERVERS if server.name not in strange]
    if missing:
        parts.append(f"Not installed, so not measured: {', '.join(missing)}.")
    parts.append(where)
    return "\n\n".join(filter(None, parts))


def main(argv: list[str] | None = None) -> int:
    """Run the rounds, written after each; 1 where an answer was wrong or prg-serve failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--more", action="store_true", help="add these rounds to those of the last run")
    parser.add_argument(
        "--scale", type=float, default=1, help="of the seconds; other than 1, nothing is written"
    )
    arguments = parser.parse_args(argv)
    before = json.loads(RESULTS.read_text()) if arguments.more else {"cells": [], "minutes": 0}
    cells = [Cell(**facts) for facts in before["cells"]]
    pythons = {server: python for server in SERVERS if (python := environment(server))}
    at, begun = commit(), time.monotonic()
    first = 1 + max((c.round for c in cells), default=-1)
    for number in range(first, first + arguments.rounds):
        for one in one_round(number, pythons, arguments.scale):
            print(json.dumps(rounded(one)), file=sys.stderr, flush=True)
            cells.append(one)
        minutes = before["minutes"] + (time.monotonic() - begun) / 60
        where = (
            f"`python -m benchmarks.peers` at commit {at}, {machine()}, {len(os.sched_getaffinity(0))} cores; "
            f"rounds: {1 + number}, {minutes:.0f} minutes. The generator took at most "
            f"{max(c.generator for c in cells) * 100:.0f} % of a core."
        )
        text = page(cells, where)
        if arguments.scale == 1:
            write_region(PAGE, "benchmarks.peers", text)
            facts = {"commit": at, "machine": machine(), "minutes": round(minutes, 1)}
            facts |= {"servers": [server.label for server in pythons]}
            rows = ",\n".join(json.dumps(rounded(c)) for c in cells)
            write_atomically(RESULTS, f'{json.dumps(facts)[:-1]}, "cells": [\n{rows}\n]}}\n'.encode())
    print(text)
    return int(any(c.wrong or (c.failed and c.server == SERVERS[0].name) for c in cells))


if __name__ == "__main__":
    sys.exit(main())
