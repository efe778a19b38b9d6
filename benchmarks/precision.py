"""An entry's answers and speed by device and precision, beside the processor's in fp32. Prints one JSON line last.

fp32 means fp32 throughout; tf32 is fp32 with TF32 convolutions, PyTorch's default on CUDA and so a served entry's.
Differences are the worst image's; times are of one batch that is on the device already.

PYTHONPATH=. python benchmarks/precision.py --data FOLDER [--entry ENTRY] [--device cuda] [--batch N] [--images N]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from entry.runner import Runner
from prg.export import DTYPES, least_cosine, relative_difference
from prg.images.decoded import load_split
from prg.images.splits import splits
from prg.machine import choose_device, device_name

ROUNDS = 10
PRECISIONS = {"fp32": "fp32", "tf32": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""What the network's weights are, by the name of a row."""


def main(argv: list[str] | None = None) -> int:
    """Answers of every precision in turn; the reference comes first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--data", required=True, help="images of any kind")
    parser.add_argument("--split", default="train")
    parser.add_argument("--device", default=choose_device().type)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=512, help="the first so many of the split")
    arguments = parser.parse_args(argv)
    reference = Runner(arguments.entry)
    prg = reference.entry.prg
    with tempfile.TemporaryDirectory() as cache:
        images = load_split(splits(arguments.data)[arguments.split], prg.image, Path(cache))
    pixels = images.pixels[: arguments.images]
    level = (prg.classify_t_end or (prg.t_end,))[0]
    expected = answers(reference, pixels, level, arguments.batch)
    rows = {}
    print(f"{'':6} {'relative':>9} {'cosine':>9} {'same class':>10} {'ms':>8} {'images/s':>9}")
    for name, weights in PRECISIONS.items():
        if name == "tf32" and arguments.device == "cpu":
            continue
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        runner = Runner(arguments.entry, device=arguments.device)
        network(runner).to(DTYPES[weights])
        found = answers(runner, pixels, level, arguments.batch)
        ms = 1e3 * seconds(runner, pixels[: arguments.batch], level)
        row = {
            "relative": {k: relative_difference(found[k], expected[k]) for k in expected},
            "cosine": {k: least_cosine(found[k], expected[k]) for k in expected},
            "ms": round(ms, 2),
            "images_per_s": round(1e3 * len(pixels[: arguments.batch]) / ms, 1),
        }
        if "LOGITS" in expected:
            same = found["LOGITS"].argmax(1) == expected["LOGITS"].argmax(1)
            row["same_class"] = float(same.mean())
        rows[name] = row
        print(
            f"{name:6} {max(row['relative'].values()):9.1e} {min(row['cosine'].values()):9.6f} "
            f"{row.get('same_class', float('nan')):10.2%} {ms:8.2f} {row['images_per_s']:9,.0f}",
            flush=True,
        )
    facts = {
        "benchmark": "precision",
        "entry": reference.entry.name,
        "fingerprint": reference.entry.fingerprints(reference.version).model,
        "device": device_name(torch.device(arguments.device)),
        "torch": torch.__version__,
        "images": len(pixels),
        "batch": arguments.batch,
        "t_end": level,
        "rows": rows,
    }
    print(json.dumps(facts))
    return 0


def network(runner: Runner) -> torch.nn.Module:
    """The velocity network inside an entry's module."""
    return runner.module.encoder.solver.velocity.net


def answers(runner: Runner, pixels: np.ndarray, level: float, batch: int) -> dict[str, np.ndarray]:
    """Each output of all images, float32 [N, D]."""
    parts = []
    for start in range(0, len(pixels), batch):
        some = pixels[start : start + batch]
        parts.append(runner.run(some, np.full(len(some), level, np.float32)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def seconds(runner: Runner, pixels: np.ndarray, level: float) -> float:
    """Median time of the module on these images, after three runs that are not counted."""
    images = torch.from_numpy(pixels).to(runner.device)
    levels = torch.full((len(pixels), 1), level, device=runner.device)
    times = []
    with torch.inference_mode():
        for _ in range(3 + ROUNDS):
            start = time.perf_counter()
            runner.module(images, levels)
            if runner.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


if __name__ == "__main__":
    sys.exit(main())
