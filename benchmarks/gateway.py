"""The gateway: what it can do by itself, and the whole service beside its own parts.

limit        answers a second to callers who each wait for theirs, with a model that takes no time; the gateway has one
             core (benchmarks/trust/overload.py)
full batches an engine that takes 20 ms a batch of 32 and no core, several images a request
in process   decoding and the model side by side in batches of 32, no HTTP; photos of mixed sizes
closed loop  the service, so many callers, each sending its next photo when the last is answered
open loop    photos arrive at random (Poisson) at a share of the closed loop's rate, whether or not earlier ones are
             answered; latency is from the planned arrival

Without options its tables go into docs/performance.md and the figures into docs/results/gateway.json.

PYTHONPATH=. python benchmarks/gateway.py [--entry ENTRY] [--seconds N] [--callers N] [--load SHARE]
"""

import argparse
import io
import json
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.generator import Load, Measured, post
from benchmarks.pages import commit, write_region
from benchmarks.peers.engine import BATCH_S, MAX_BATCH, STAND_IN
from benchmarks.peers.servers import SERVERS, Body, running
from benchmarks.trust.overload import CALLERS, apart, coloured, limit_of
from benchmarks.trust.rows import ENGINES, Absent
from benchmarks.trust.stage import Gateway, machine
from entry.files import write_atomically
from entry.images import load_image
from entry.runner import Runner
from tests.tiny import png

SIZES = ((160, 120), (320, 240), (640, 480), (1280, 960), (1920, 1080))
TOGETHER = 8
"""Images a request."""
CALLERS_TOGETHER = 32
AIM = 0.95
"""Of what the engine of 20 ms a batch can do."""
PAGE = Path("docs/performance.md")
RESULTS = Path("docs/results/gateway.json")


def photos(count: int = 60) -> list[bytes]:
    """JPEGs of mixed sizes, with detail at every scale as photos have."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        picture = np.zeros((height, width, 3))
        for cells in (4, 16, 64, 256):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) / 4
        buffer = io.BytesIO()
        Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def photos_to(port: int, files: list[bytes]) -> Load:
    """These files, in turn."""
    return Load(port, [post("/embed", "image/jpeg", file) for file in files])


def limits() -> dict[str, float | None]:
    """Answers a second by engine; None where it is not here."""
    found: dict[str, float | None] = {}
    for engine in ENGINES:
        try:
            with apart(engine) as stage:
                found[engine] = round(limit_of(coloured(stage.gateway.port), slow=False))
        except Absent:
            found[engine] = None
    return found


def full_batches(entry: Path, seconds: float) -> dict[str, float]:
    """Several images a request, with an engine that takes 20 ms a batch."""
    server = replace(SERVERS[0], body=together)
    with running(server, Path(sys.executable), entry, STAND_IN, [png()]) as (load, _):
        measured = load.closed(CALLERS_TOGETHER, seconds)
    rate, most = measured.rate * TOGETHER, MAX_BATCH / BATCH_S
    return {"callers": CALLERS_TOGETHER, "images_per_s": round(rate, 1), "share": round(rate / most, 3)}


def together(image: bytes) -> Body:
    """One image several times, as a form."""
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="image.png"\r\n\r\n'
    return "multipart/form-data; boundary=x", (head.encode() + image + b"\r\n") * TOGETHER + b"--x--\r\n"


def in_process(entry: Path, files: list[bytes], seconds: float) -> dict[str, float]:
    """The model in batches of 32, the next batch decoded meanwhile by as many threads as there are cores."""
    runner = Runner(entry)
    spec, level = runner.entry.prg.image, runner.entry.prg.t_end
    levels = np.full(32, level, np.float32)
    # TorchScript compiles in its first calls.
    for _ in range(3):
        runner.run(np.zeros((32, 3, spec.size, spec.size), np.uint8), levels)
    done = 0
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:

        def decode(first: int) -> list[Future[np.ndarray]]:
            return [pool.submit(load_image, files[(first + i) % len(files)], spec) for i in range(32)]

        following = decode(0)
        while time.perf_counter() - start < seconds:
            batch = np.stack([image.result() for image in following])
            done += 32
            following = decode(done)
            runner.run(batch, levels)
    return {"images_per_s": round(done / (time.perf_counter() - start), 1)}


def served(entry: Path, files: list[bytes], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The service in the closed and in the open loop."""
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), {"model_repository": entry.parent, "models": entry.name})
        try:
            load = photos_to(gateway.start().port, files)
            load.closed(arguments.callers, 2)
            closed = load.closed(arguments.callers, arguments.seconds)
            opened = load.opened(arguments.load * closed.rate, arguments.seconds)
        finally:
            gateway.stop()
    return {"closed loop": figures(closed), "open loop": figures(opened)}


def figures(measured: Measured) -> dict[str, float]:
    """For JSON."""
    percentiles = np.percentile([answer.latency_s * 1e3 for answer in measured.good], (50, 95, 99))
    named = zip(("p50_ms", "p95_ms", "p99_ms"), percentiles, strict=True)
    return {
        "images_per_s": round(measured.rate, 1),
        "failed": len(measured.answers) - len(measured.good),
        **{name: round(float(value), 1) for name, value in named},
    }


def page(facts: dict[str, Any], callers: int, share: float) -> str:
    """The tables, and what they were made by."""
    rows, together = facts["rows"], facts["full_batches"]
    answers = ", ".join(
        f"{engine} {'not here' if limit is None else f'{limit:,.0f}'}"
        for engine, limit in facts["limits"].items()
    )
    lines = [
        "| | images/s | p50 / p95 / p99, ms | failed |",
        "|---|---|---|---|",
        f"| in one process, without HTTP | {rows['in process']['images_per_s']:.1f} | | |",
    ]
    for name, title in (
        ("closed loop", f"{callers} callers"),
        ("open loop", f"arrivals at {share:g} of that rate"),
    ):
        row = rows[name]
        latency = " / ".join(f"{row[key]:,.0f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
        lines.append(f"| {title} | {row['images_per_s']:.1f} | {latency} | {row['failed']} |")
    return "\n\n".join(
        (
            f"By itself, answers a second by engine, {CALLERS[False]} callers: {answers}.",
            f"An engine of {STAND_IN}, {TOGETHER} images a request, {together['callers']} callers: "
            f"{together['images_per_s']:,.0f} images/s, {together['share'] * 100:.0f} % of what such an engine can do; "
            f"the aim is {AIM * 100:.0f} %.",
            f"The whole service, `{facts['entry']}`, {facts['photos']}, one a request:",
            "\n".join(lines),
            f"`PYTHONPATH=. python benchmarks/gateway.py` at commit {facts['commit']}, {facts['machine']}.",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """All of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--load", type=float, default=0.5, help="open loop: share of the closed loop's rate")
    arguments = parser.parse_args(argv)
    files = photos()
    mean_kb = sum(map(len, files)) / len(files) / 1e3
    small, large = ("{} × {}".format(*size) for size in (min(SIZES), max(SIZES)))
    runner = Runner(arguments.entry)
    facts = {
        "commit": commit(),
        "machine": machine(),
        "entry": runner.entry.name,
        "fingerprint": runner.entry.fingerprints(runner.version).model,
        "photos": f"JPEGs of {small} to {large}, {mean_kb:.0f} kB on average",
        "limits": limits(),
        "full_batches": full_batches(arguments.entry, arguments.seconds),
        "rows": {
            "in process": in_process(arguments.entry, files, arguments.seconds),
            **served(arguments.entry, files, arguments),
        },
    }
    print(text := page(facts, arguments.callers, arguments.load))
    if arguments == parser.parse_args([]):
        write_atomically(RESULTS, json.dumps(facts, indent=1).encode() + b"\n")
        write_region(PAGE, "benchmarks/gateway.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
