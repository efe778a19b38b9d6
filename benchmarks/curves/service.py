"""prg-serve with its embedded engine: against the photos' size and the number of callers; and its start."""

import contextlib
import http.client
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.curves.fresh import peak_mb
from benchmarks.curves.model import Rows
from benchmarks.generator import Load, post
from benchmarks.trust.stage import Gateway, family

MODEL = "prg-everyday"
SIZES = ((160, 120), (320, 240), (640, 480), (1280, 960), (2560, 1920), (4000, 3000))
USUAL = (640, 480)
CALLERS = (1, 4, 16, 64, 256)
FEW = 16
SECONDS = 4.0
PHOTOS = 4
STARTS = 3
PATIENCE_S = 400.0


def run() -> dict[str, Rows]:
    """The curves by name. Each size and number meets a new service, as memory once taken is kept."""
    sizes: Rows = []
    for width, height in SIZES:
        sent = requests(width, height)
        kilobytes = round(sum(map(len, sent)) / len(sent) / 1e3)
        sizes.append({"photo": f"{width} × {height}", "kB": kilobytes} | alone(sent, FEW))
    usual = requests(*USUAL)
    return {
        "photo size": sizes,
        "callers": [{"callers": callers} | alone(usual, callers) for callers in CALLERS],
    }


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG with detail at every scale, the finer the fainter, as photos have."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in zip((4, 16, 64, 256, 1024, 4096), (90, 60, 45, 35, 30, 25), strict=True):
        if cells <= 2 * width:
            field = rng.integers(0, 256, (cells * 3 // 4, cells, 3), np.uint8)
            fine = Image.fromarray(field).resize((width, height), Image.Resampling.BILINEAR)
            picture += (np.asarray(fine, np.float32) / 127.5 - 1) * contrast
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def requests(width: int, height: int) -> list[bytes]:
    """One photo each."""
    return [post("/embed", "image/jpeg", photo(width, height, seed)) for seed in range(PHOTOS)]


@contextlib.contextmanager
def serving(**settings: object) -> Iterator[tuple[Gateway, float]]:
    """A service of the shipped models, and how many seconds passed until it was ready."""
    given = {"model_repository": Path("model_repository").absolute()} | settings
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), given)
        begin = time.perf_counter()
        gateway.start(wait=False)
        try:
            while not ready(gateway.port):
                if gateway.process.poll() is not None or time.perf_counter() - begin > PATIENCE_S:
                    raise SystemExit(f"not ready: {gateway.log.read_text()[-3000:]}")
                time.sleep(0.02)
            yield gateway, time.perf_counter() - begin
        finally:
            gateway.stop()


def ready(port: int) -> bool:
    """What /health/ready says, asked in a way that costs little."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    return False


def loaded(gateway: Gateway, sent: list[bytes], callers: int) -> dict[str, str | int | float]:
    """What so many callers get, each of whom waits for an answer before sending again."""
    load = Load(gateway.port, sent)
    measured = load.closed(callers, SECONDS)
    load.close()
    if failed := len(measured.answers) - len(measured.good):
        raise SystemExit(f"{failed} of {len(measured.answers)} requests failed")
    p50, p99 = np.percentile([answer.latency_s * 1e3 for answer in measured.good], (50, 99))
    return {"images/s": round(measured.rate, 1), "p50, ms": round(p50, 1), "p99, ms": round(p99, 1)}


def alone(sent: list[bytes], callers: int) -> dict[str, str | int | float]:
    """What they get of a service that did nothing before, and its memory."""
    with serving(models=MODEL) as (gateway, _):
        figures = loaded(gateway, sent, callers)
        return figures | {"memory, MB": memory_mb(gateway)}


def memory_mb(gateway: Gateway) -> int:
    """The most that its processes took, added up."""
    return round(peak_mb(process.pid for process in family(gateway.process.pid)))


def starts() -> dict[str, Rows]:
    """Seconds to ready in several settings, and what is served while models are compiled."""
    sent = requests(*USUAL)
    loads: Rows = []

    def under_load(gateway: Gateway, state: str) -> None:
        loads.extend({"model": state, "callers": n} | loaded(gateway, sent, n) for n in (1, FEW))

    rows = [start("all shipped models")]
    with tempfile.TemporaryDirectory() as cache:
        rows.append(start(MODEL, models=MODEL))
        with serving(models=MODEL) as (gateway, _):
            under_load(gateway, "TorchScript")
        with serving(models=MODEL, compile_cache=cache) as (gateway, seconds):
            begin = time.perf_counter() - seconds
            under_load(gateway, "TorchScript, while it is compiled")
            assert not compiled(gateway)
            while not compiled(gateway):
                time.sleep(0.2)
            rows.append(
                {
                    "start": f"{MODEL}, PRG_COMPILE_CACHE empty",
                    "ready, s": round(seconds, 1),
                    "compiled, s": round(time.perf_counter() - begin),
                    "memory, MB": memory_mb(gateway),
                }
            )
            under_load(gateway, "compiled")
        rows.append(start(f"{MODEL}, PRG_COMPILE_CACHE filled", models=MODEL, compile_cache=cache))
    return {"start": rows, "while compiling": loads}


def start(name: str, **settings: object) -> dict[str, str | int | float]:
    """The median of several starts."""
    found = []
    for _ in range(STARTS):
        with serving(**settings) as (gateway, seconds):
            found.append((seconds, memory_mb(gateway)))
    seconds, memory = map(median, zip(*found, strict=True))
    return {"start": name, "ready, s": round(seconds, 1), "memory, MB": round(memory)}


def compiled(gateway: Gateway) -> bool:
    """Whether its log says that the model is. Raises SystemExit where it could not be."""
    events = {event["event"]: event for event in gateway.events()}
    if failed := events.get("model not compiled"):
        raise SystemExit(str(failed))
    return "model compiled" in events
