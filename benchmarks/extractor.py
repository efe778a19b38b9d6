"""The exported extractor by itself: images a second at each batch size. Prints one JSON line last.

python benchmarks/extractor.py [ENTRY] [--rounds N]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from entry.runner import Runner
from prg.machine import device_name

BATCHES = (1, 8, 32, 64)


def main(argv: list[str] | None = None) -> int:
    """Time every batch size in turn, round by round, so that a slow moment hits all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", type=Path, nargs="?", default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    runner = Runner(arguments.entry, device=arguments.device)
    size = runner.entry.prg.image.size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(BATCHES), 3, size, size), np.uint8)
    levels = np.full(max(BATCHES), runner.entry.prg.t_end, np.float32)
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for round_ in range(-3, arguments.rounds):  # the first three compile
        for batch in BATCHES:
            start = time.perf_counter()
            runner.run(images[:batch], levels[:batch])
            if round_ >= 0:
                seconds[batch].append(time.perf_counter() - start)
    rows = {}
    print(f"{'batch':>6} {'ms':>9} {'images/s':>9}   (median of {arguments.rounds} rounds)")
    for batch, times in seconds.items():
        median = statistics.median(times)
        rows[batch] = {"ms": round(median * 1e3, 2), "images_per_s": round(batch / median, 1)}
        print(f"{batch:6} {rows[batch]['ms']:9.2f} {rows[batch]['images_per_s']:9.1f}")
    facts = {
        "benchmark": "extractor",
        "entry": runner.entry.name,
        "fingerprint": runner.entry.fingerprints(runner.version).model,
        "nfe": runner.entry.prg.nfe,
        "device": device_name(runner.device),
        "batches": rows,
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
