"""`prg embed`: its rate beside the extractor's own, and its memory. Prints one JSON line last.

The images are made here: a few of noise, and links to them, so that a million take little room.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from entry.images import load_image
from entry.runner import Runner
from prg.embed.local import Local

SOURCES = 40
"""Files that the links lead to; of one a file system takes some ten thousand."""
A_FOLDER = 1000
ALONE = 2048
"""Images that the extractor alone is timed on, at most."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels (default: 64)")
    parser.add_argument("--out", default="vectors", help="vectors, vectors.parquet or vectors.npy")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        photos = make(Path(folder), arguments.images, arguments.side)
        command = [sys.executable, "-m", "prg.cli", "embed", str(photos), "--entry", str(arguments.entry)]
        facts = {"images": arguments.images, "side": arguments.side, "entry": arguments.entry.name}
        for name in ("first", "again"):
            start = time.perf_counter()
            subprocess.run([*command, "--out", f"{folder}/{arguments.out}"], check=True)
            facts[f"{name}_s"] = round(time.perf_counter() - start, 1)
            # The largest of all children so far, in KiB.
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            facts[f"{name}_peak_mb"] = round(peak / 1024)
        alone = extractor(arguments.entry, photos, min(ALONE, arguments.images))
    facts |= {"extractor_images_per_s": round(alone, 1)}
    facts |= {"images_per_s": round(arguments.images / facts["first_s"], 1), "with": os.cpu_count()}
    print(json.dumps(facts))
    return 0


def make(folder: Path, count: int, side: int) -> Path:
    """A folder of so many images."""
    rng = np.random.default_rng(0)
    (folder / "sources").mkdir()
    for i in range(SOURCES):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"sources/{i}.jpg")
    for i in range(count):
        place = folder / "photos" / f"{i // A_FOLDER:05}"
        if i % A_FOLDER == 0:
            place.mkdir(parents=True)
        os.link(folder / f"sources/{i % SOURCES}.jpg", place / f"{i:08}.jpg")
    return folder / "photos"


def extractor(entry: Path, photos: Path, count: int) -> float:
    """Images a second of the module alone, on decoded images, in batches of the size that `prg embed` uses."""
    runner = Runner(entry)
    content = next(photos.rglob("*.jpg")).read_bytes()
    batch = np.stack([load_image(content, runner.entry.prg.image)] * Local.batch)
    levels = np.full(Local.batch, runner.entry.prg.t_end, np.float32)
    runner.run(batch, levels)
    start = time.perf_counter()
    for _ in range(-(-count // Local.batch)):
        runner.run(batch, levels)
    return -(-count // Local.batch) * Local.batch / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
