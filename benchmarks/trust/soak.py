"""Good, bad and aborted requests for a long time against a running service: memory, files and threads stay flat.

Half of the callers' requests are good ones, checked; the others are odd files, options that are wrong, bodies that end
half way, and connections that hang up before the answer. Writes a plot and the samples into docs/results.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import matplotlib
import matplotlib.pyplot as plt

from benchmarks.trust.fuzz import seed_images
from benchmarks.trust.load import ask, client, random_colour
from benchmarks.trust.rows import Row, rows_of, table
from benchmarks.trust.stage import Usage, machine, staged
from tests.tiny import png

MINUTES = 30.0
CALLERS = 12
EVERY_S = 2.0
PAUSE_S = 0.05
LIMITS = {"memory_mb": 20.0, "files": CALLERS, "threads": 2}
"""How much the median of the last third may be above that of the second; the first warms up. A file is a connection."""
LABELS = {"memory_mb": "memory [MB]", "files": "open files", "threads": "threads"}

Ask = Callable[[httpx.AsyncClient], Awaitable[str]]
"""Sends one request and says what became of it: "right", a status, "hung up", or something that must not be."""


async def good(http: httpx.AsyncClient) -> str:
    """One image, its answer checked."""
    outcome = await ask(http)
    return outcome.kind if outcome.kind in ("right", "refused") else f"{outcome.kind}: {outcome.said}"


async def odd(http: httpx.AsyncClient) -> str:
    """Odd files."""
    files = [("files", ("odd", random.choice(ODD))) for _ in range(random.randint(1, 4))]
    return expected(await http.post("/embed", files=files), 200, 422)


async def wrong(http: httpx.AsyncClient) -> str:
    """Options and bodies that are refused."""
    kind = {"content-type": "image/png"}
    sent: list[tuple[int, dict[str, object]]] = [
        (422, {"params": {"t_end": 7}, "content": png(), "headers": kind}),
        (422, {"json": {"inputs": [{"b64": 7}]}}),
        (422, {"content": b"{", "headers": {"content-type": "application/json"}}),
        (415, {"content": b"text", "headers": {"content-type": "text/plain"}}),
        (422, {"content": b"--B\r\n", "headers": {"content-type": "multipart/form-data; boundary=B"}}),
    ]
    status, request = random.choice(sent)
    return expected(await http.post("/embed", **request), status)  # type: ignore[arg-type]


async def looking(http: httpx.AsyncClient) -> str:
    """What a monitor asks."""
    return expected(await http.get(random.choice(("/models", "/metrics", "/health/ready", "/docs"))), 200)


async def half_a_body(http: httpx.AsyncClient) -> str:
    """A body that ends half way."""
    return await hung_up(http, 0.5)


async def no_patience(http: httpx.AsyncClient) -> str:
    """A whole request, whose answer nobody reads."""
    return await hung_up(http, 1.0)


async def hung_up(http: httpx.AsyncClient, share: float) -> str:
    """A connection that is closed after that share of the body."""
    body = png(random_colour(), (200, 200)) + bytes(100_000)
    head = (
        "POST /classify HTTP/1.1\r\nHost: prg\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    where = urlsplit(str(http.base_url))
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(head + body[: int(len(body) * share)])
    await writer.drain()
    await asyncio.sleep(random.random() * 0.05)
    writer.transport.abort()
    return "hung up"


def expected(response: httpx.Response, *statuses: int) -> str:
    """The status, or what is wrong with it."""
    if response.status_code in (*statuses, 503):
        return str(response.status_code)
    return f"failed: {response.status_code} {response.text[:200]}"


MIX: tuple[Ask, ...] = (good, good, good, good, good, odd, wrong, looking, half_a_body, no_patience)
ODD = seed_images()


def run(engine: str, minutes: float = MINUTES, out: Path = Path("docs/results")) -> list[Row]:
    """One service, so many minutes."""
    with staged(engine) as stage:
        samples, seen = asyncio.run(soak(stage.gateway.url, minutes * 60, stage.gateway.usage))
    kept = {name: [getattr(usage, name) for _, usage in samples] for name in LIMITS}
    growth = {name: grown(values) for name, values in kept.items()}
    bad = {said: n for said, n in seen.items() if ":" in said}
    flat = all(growth[name] <= limit for name, limit in LIMITS.items())
    requests = ", ".join(f"{n:,} {said}" for said, n in seen.most_common() if said not in bad)
    medians = ", ".join(
        f"{LABELS[n]} {statistics.median(v[-len(v) // 3 :]):.0f} ({growth[n]:+.1f})" for n, v in kept.items()
    )
    row = Row(
        f"soak, {minutes:g} minutes",
        f"{CALLERS} callers: {requests}",
        f"{medians}; {sum(bad.values())} not as documented{f': {next(iter(bad))}' if bad else ''}",
        "growth from the second third to the last: "
        + ", ".join(f"{LABELS[n]} {v:g}" for n, v in LIMITS.items()),
        flat and not bad,
    )
    out.mkdir(parents=True, exist_ok=True)
    seconds = [at for at, _ in samples]
    plot(seconds, kept, engine, out / f"soak-{engine}.png")
    facts = {
        "machine": machine(),
        "engine": engine,
        "minutes": minutes,
        "requests": dict(seen),
        "growth": growth,
    }
    (out / f"soak-{engine}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return [row]


def grown(values: list[float]) -> float:
    """How much the median of the last third is above that of the second."""
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[-2 * third : -third])


async def soak(
    url: str, seconds: float, usage: Callable[[], Usage]
) -> tuple[list[tuple[float, Usage]], Counter[str]]:
    """(samples with their time, requests by what became of them)."""
    seen, samples, begun = Counter[str](), [], time.monotonic()

    async def caller() -> None:
        while time.monotonic() - begun < seconds:
            try:
                seen[await random.choice(MIX)(http)] += 1
            except (httpx.HTTPError, OSError) as error:
                seen[f"lost: {error!r}"] += 1
            await asyncio.sleep(PAUSE_S * random.random() * 2)

    async def sampler() -> None:
        while time.monotonic() - begun < seconds:
            samples.append((time.monotonic() - begun, usage()))
            await asyncio.sleep(EVERY_S)

    async with client(url) as http:
        await asyncio.gather(sampler(), *(caller() for _ in range(CALLERS)))
    return samples, seen


def plot(seconds: list[float], kept: dict[str, list[float]], engine: str, path: Path) -> None:
    """What the processes held over time."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(len(kept), sharex=True, figsize=(8, 6), layout="constrained")
    for axis, (name, values) in zip(axes, kept.items(), strict=True):
        axis.plot([second / 60 for second in seconds], values)
        axis.set_ylabel(LABELS[name])
        axis.set_ylim(0, max(values) * 1.2)
    axes[-1].set_xlabel("minutes")
    figure.suptitle(f"The service's processes, {engine} engine, under good, bad and aborted requests")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("embedded", "triton"), default="embedded")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    rows = rows_of("soak", lambda engine: run(engine, arguments.minutes, arguments.out), arguments.engine)
    print(table([(arguments.engine, row) for row in rows]))
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
