"""The extractor by itself, as the official algorithm has it and as it can be served.

official is 31 Euler steps in eager PyTorch, in this project's solver, which computes what torchdiffeq's does;
torchscript is model.pt as it is served; bf16 is that with PRG_PRECISION=bf16; compiled is that with PRG_COMPILE_CACHE.
ceiling is how many operations a second a large matrix product takes here, in the row's precision, in the same run.

Without options its table goes into docs/performance.md and the figures into docs/results/extractor.json.

PYTHONPATH=. python benchmarks/extractor.py [ENTRY…] [--rounds N] [--device cuda] [--cache FOLDER] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pages import commit, write_region
from benchmarks.trust.stage import machine
from entry.compiled import compiler
from entry.files import write_atomically
from entry.runner import Runner
from prg.encoder import Encoder
from prg.extractor import Normalise
from prg.machine import device_name
from prg.reopen import Reopened, reopen

CALLS = {1: 8, 8: 4, 32: 3}
"""How often a batch of each size is computed in a row; the first, for which other rows emptied the caches, does not
count."""
OFFICIAL_STEPS = 31
OFFICIAL_ROUNDS = 2
"""It is slow and steady: one call a round."""
SIDE = 2048
"""Of the matrices that say how fast this machine multiplies."""
ENTRIES = (Path("model_repository/prg-everyday"), Path("model_repository/prg-cifar10"))
ROWS = {
    "official": f"official: {OFFICIAL_STEPS} Euler steps, eager",
    "torchscript": "TorchScript, as served",
    "bf16": "TorchScript, `PRG_PRECISION=bf16`",
    "compiled": "compiled, `PRG_COMPILE_CACHE`",
}
AIMS = {("compiled", 1): 1.5, ("compiled", 32): 1.1, ("bf16", 32): 1.8}
"""(row, images) -> times TorchScript."""
PAGE = Path("docs/performance.md")
RESULTS = Path("docs/results/extractor.json")
Call = Callable[[np.ndarray, np.ndarray], object]


def main(argv: list[str] | None = None) -> int:
    """All rows of an entry in turn, round by round, so that a slow moment hits all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", type=Path, nargs="*", default=ENTRIES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, help="keep what is compiled here (default: compile anew)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    published = arguments == parser.parse_args([])
    facts: dict[str, Any] = {
        "benchmark": "extractor",
        "commit": commit(),
        "machine": machine(),
        "device": device_name(torch.device(arguments.device)),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "entries": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        for entry in arguments.entries:
            cache = (arguments.cache or Path(temporary)).absolute()
            facts["entries"].append(measure(entry.resolve(), arguments.device, arguments.rounds, cache))
    if file := RESULTS if published else arguments.json:
        write_atomically(file, json.dumps(facts, indent=2).encode() + b"\n")
    print(text := page(facts))
    if published:
        write_region(PAGE, "benchmarks/extractor.py", text)
    return 0


def page(facts: dict[str, Any]) -> str:
    """The table, and what it was made by."""
    found = {(e["entry"], r["row"], r["batch"]): r for e in facts["entries"] for r in e["rows"]}
    lines = [
        "| | | 1 image, ms | 32 images, ms | images/s | times, 1 image | times, 32 images | of the ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in dict.fromkeys((name, row) for name, row, _ in found):
        one, many = found[name, row, 1], found[name, row, 32]
        cells = (
            f"`{name}`",
            ROWS[row],
            *(f"{of['ms']:,.0f}" if of["ms"] >= 100 else f"{of['ms']:.1f}" for of in (one, many)),
            f"{many['images_per_s']:.1f}",
            *(f"{of['times_torchscript']:.2f}" for of in (one, many)),
            f"{many['of_ceiling'] * 100:.0f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    ceilings = "; ".join(
        f"`{e['entry']}` {e['matmul_gflop_per_s']['fp32']} in fp32, {e['matmul_gflop_per_s']['bf16']} in bf16"
        for e in facts["entries"]
    )
    where = (
        f"`PYTHONPATH=. python benchmarks/extractor.py` at commit {facts['commit']}, {facts['machine']}, "
        f"PyTorch {facts['torch']}; medians of {facts['rounds']} rounds."
    )
    return "\n\n".join(("\n".join(lines), f"Ceilings, in GFLOP/s: {ceilings}.", missed(found), where))


def missed(found: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Which aims, and by how much."""
    lines = [
        f"- `{name}`, {ROWS[row]}, {batch} image{'s' if batch > 1 else ''}: {of['times_torchscript']:.2f} times"
        for (name, row, batch), of in found.items()
        if of["times_torchscript"] < AIMS.get((row, batch), 0)
    ]
    return "\n".join(("Below its aim:\n", *lines)) if lines else "Every aim is met."


def measure(directory: Path, device: str, rounds: int, cache: Path) -> dict[str, Any]:
    """One entry's rows, printed as a table too."""
    opened = reopen(directory)
    prg = opened.entry.prg
    plain = Runner(directory, device=device)
    rows: dict[str, Call] = {
        "official": official(opened, plain.device),
        "torchscript": plain.run,
        "bf16": Runner(directory, device=device, precision="bf16").run,
    }
    if device == "cpu" and compiler():
        rows["compiled"] = compiled(directory, cache)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(CALLS), 3, prg.image.size, prg.image.size), np.uint8)
    levels = np.full(max(CALLS), prg.t_end, np.float32)
    precisions = {row: "bf16" if row == "bf16" else "fp32" for row in rows}
    seconds: dict[tuple[str, int], list[float]] = {(row, batch): [] for batch in CALLS for row in rows}
    ceilings: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for round_ in range(-3, rounds):  # the first three compile
        for precision, found in ceilings.items():
            found.append(matmul(precision, plain.device))
        for row, batch in seconds:
            if row == "official" and not -2 < round_ < OFFICIAL_ROUNDS:
                continue
            calls = 1 if row == "official" else CALLS[batch]
            for call in range(calls):
                start = time.perf_counter()
                rows[row](images[:batch], levels[:batch])
                if round_ >= 0 and (call or calls == 1):
                    seconds[row, batch].append(time.perf_counter() - start)
    ceiling = {precision: statistics.median(found[3:]) for precision, found in ceilings.items()}
    operations = {row: flops(opened, OFFICIAL_STEPS if row == "official" else prg.steps) for row in rows}
    found_rows = []
    print(f"{opened.entry.name}   matmul, GFLOP/s: {ceiling['fp32']:.0f} fp32, {ceiling['bf16']:.0f} bf16")
    print(f"{'':12} {'batch':>5} {'ms':>9} {'images/s':>9} {'times':>6} {'of ceiling':>10}")
    for (row, batch), times in seconds.items():
        median, base = statistics.median(times), statistics.median(seconds["torchscript", batch])
        share = operations[row] * batch / median / 1e9 / ceiling[precisions[row]]
        found_rows.append(
            {
                "row": row,
                "batch": batch,
                "ms": round(median * 1e3, 2),
                "images_per_s": round(batch / median, 1),
                "times_torchscript": round(base / median, 2),
                "of_ceiling": round(share, 2),
            }
        )
        print(
            f"{row:12} {batch:5} {median * 1e3:9.2f} {batch / median:9.1f} {base / median:6.2f} {share:10.0%}"
        )
    return {
        "entry": opened.entry.name,
        "fingerprint": plain.entry.fingerprints(plain.version).model,
        "nfe": prg.nfe,
        "gflop_an_image": round(operations["torchscript"] / 1e9, 3),
        "matmul_gflop_per_s": {precision: round(value) for precision, value in ceiling.items()},
        "rows": found_rows,
    }


def official(opened: Reopened, device: torch.device) -> Call:
    """The official algorithm on the entry's network: the features of 31 Euler steps, eager."""
    normalise = Normalise(opened.entry.prg.image).to(device)
    encoder = slow_encoder(opened, OFFICIAL_STEPS).to(device).eval()

    def call(images: np.ndarray, levels: np.ndarray) -> None:
        with torch.inference_mode():
            pixels, t_end = (torch.from_numpy(values).to(device) for values in (images, levels))
            for features in encoder(normalise(pixels), t_end):
                features.cpu()

    return call


def slow_encoder(opened: Reopened, steps: int) -> Encoder:
    """The entry's encoder with another number of Euler steps."""
    config = replace(opened.encoder.config, solver="euler", steps=steps)
    return Encoder(opened.encoder.net, config, save_memory=False)


def flops(opened: Reopened, steps: int) -> int:
    """Floating-point operations an image, of matrix products and convolutions."""
    side, device = opened.entry.prg.image.size, next(opened.encoder.parameters()).device
    image, t_end = torch.zeros(1, 3, side, side, device=device), torch.full((1,), 0.5, device=device)
    # Outside of the counter: it tries the network as it is made.
    encoder = slow_encoder(opened, steps)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        encoder(image, t_end)
    return int(counter.get_total_flops())


def compiled(directory: Path, cache: Path) -> Call:
    """The entry compiled, as the service does it."""
    runner = Runner(directory)
    if not runner.use_compiled(cache, max(CALLS)):
        command = [sys.executable, "-m", "entry.compile", directory, runner.version, cache]
        start = time.perf_counter()
        subprocess.run([*map(str, command), "--most", str(max(CALLS))], check=True)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        if not runner.use_compiled(cache, max(CALLS)):
            raise SystemExit(f"{directory}: compiled, it gives other answers")
    return runner.run


def matmul(precision: str, device: torch.device) -> float:
    """GFLOP/s of one large product."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    start = time.perf_counter()
    (a @ a)[0, 0].item()
    return 2 * SIDE**3 / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    sys.exit(main())
