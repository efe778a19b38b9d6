"""The whole service beside its own parts: in process, closed loop, open loop. Prints one JSON line last.

Starts prg-serve, sends photos of mixed sizes, one a request. Rows, all in one run on one machine:
  in process   decoding and the model side by side in batches of 32, no HTTP
  closed loop  so many callers, each sending its next photo when the last is answered
  open loop    photos arrive at random (Poisson) at a share of the closed loop's rate, whether or not
               earlier ones are answered; refusals are counted, latency is from the planned arrival

python benchmarks/gateway.py [--seconds N] [--callers N] [--load SHARE]
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from entry.images import load_image
from entry.runner import Runner
from prg.machine import device_name

SIZES = ((160, 120), (320, 240), (640, 480), (1280, 960), (1920, 1080))


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


@contextlib.contextmanager
def serving(repository: Path) -> Iterator[str]:
    """prg-serve on a free port, ready; gives its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"PRG_MODEL_REPOSITORY": str(repository), "PRG_PORT": str(port)}
    server = subprocess.Popen(
        [sys.executable, "-m", "service.app"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        else:
            raise SystemExit("the service did not become ready within 60 s")
        yield url
    finally:
        server.terminate()
        server.wait(30)


def in_process(entry: Path, files: list[bytes], seconds: float) -> dict[str, float]:
    """The model in batches of 32, the next batch decoded meanwhile by as many threads as there are cores."""
    runner = Runner(entry)
    spec, level = runner.entry.prg.image, runner.entry.prg.t_end
    levels = np.full(32, level, np.float32)
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


async def closed_loop(url: str, files: list[bytes], seconds: float, callers: int) -> dict[str, float]:
    """Each caller sends its next photo when the last is answered."""
    latencies: list[float] = []
    async with client(url) as http:
        end = time.perf_counter() + seconds

        async def caller(number: int) -> None:
            i = number
            while time.perf_counter() < end:
                start = time.perf_counter()
                response = await http.post("/embed", content=files[i % len(files)])
                response.raise_for_status()
                latencies.append(time.perf_counter() - start)
                i += callers

        start = time.perf_counter()
        await asyncio.gather(*(caller(n) for n in range(callers)))
        elapsed = time.perf_counter() - start
    return {"callers": callers, "images_per_s": round(len(latencies) / elapsed, 1), **percentiles(latencies)}


async def open_loop(url: str, files: list[bytes], seconds: float, rate: float) -> dict[str, float]:
    """Photos arrive at random at `rate` a second."""
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(1 / rate, int(seconds * rate)))
    latencies: list[float] = []
    refused = 0
    async with client(url) as http:
        begin = time.perf_counter()

        async def one(i: int, due: float) -> None:
            nonlocal refused
            await asyncio.sleep(max(0, begin + due - time.perf_counter()))
            response = await http.post("/embed", content=files[i % len(files)])
            if response.status_code == 503:
                refused += 1
            else:
                response.raise_for_status()
                latencies.append(time.perf_counter() - begin - due)

        await asyncio.gather(*(one(i, due) for i, due in enumerate(arrivals)))
    return {"arrivals_per_s": round(rate, 1), "refused": refused, **percentiles(latencies)}


def client(url: str) -> httpx.AsyncClient:
    """A client without limits of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=url, timeout=60, limits=limits, headers={"content-type": "image/jpeg"})


def percentiles(latencies: list[float]) -> dict[str, float]:
    """Milliseconds."""
    values = np.percentile(np.array(latencies) * 1e3, (50, 95, 99))
    return {name: round(float(v), 1) for name, v in zip(("p50_ms", "p95_ms", "p99_ms"), values, strict=True)}


def main(argv: list[str] | None = None) -> int:
    """Run the three rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--load", type=float, default=0.5, help="open loop: share of the closed loop's rate")
    arguments = parser.parse_args(argv)
    files = photos()
    rows = {"in process": in_process(arguments.entry, files, arguments.seconds)}
    with serving(arguments.entry.parent) as url:
        asyncio.run(closed_loop(url, files, 2, arguments.callers))  # warm
        rows["closed loop"] = asyncio.run(closed_loop(url, files, arguments.seconds, arguments.callers))
        rate = arguments.load * rows["closed loop"]["images_per_s"]
        rows["open loop"] = asyncio.run(open_loop(url, files, arguments.seconds, rate))
    for name, row in rows.items():
        print(f"{name:12}", "  ".join(f"{k} {v}" for k, v in row.items()))
    share = round(rows["closed loop"]["images_per_s"] / rows["in process"]["images_per_s"], 3)
    runner = Runner(arguments.entry)
    mean_kb = sum(map(len, files)) / len(files) / 1e3
    facts = {
        "benchmark": "gateway",
        "entry": runner.entry.name,
        "fingerprint": runner.entry.fingerprints(runner.version).model,
        "device": device_name(runner.device),
        "photos": f"{len(files)} JPEGs, {min(SIZES)} to {max(SIZES)}, {mean_kb:.0f} kB on average",
        "rows": rows,
        "closed_loop_to_in_process": share,
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
