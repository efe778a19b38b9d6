"""A whole split posted through POST /classify, beside the module itself on the same images. Prints one JSON line last.

Starts prg-serve on the entry's repository. Differences are images whose first class is not the same both ways.

PYTHONPATH=. python benchmarks/served_accuracy.py --data FOLDER [--entry ENTRY] [--split test] [--limit N]
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.gateway import serving
from entry.runner import Runner
from prg.client import Client
from prg.evaluation import classify
from prg.images.decoded import load_split
from prg.images.sets import same_classes
from prg.images.splits import splits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--data", required=True, help="labelled images of the entry's classes")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="the first so many images alone")
    arguments = parser.parse_args(argv)
    runner = Runner(arguments.entry)
    prg = runner.entry.prg
    if prg.labels is None or prg.classify_t_end is None:
        raise SystemExit(f"{arguments.entry}: was exported without a head, so it has no classes")
    source = splits(arguments.data)[arguments.split]
    with tempfile.TemporaryDirectory() as cache:
        images = same_classes(load_split(source, prg.image, Path(cache)), prg.labels, arguments.data)
    assert images.labels is not None
    images = images.subset(np.arange(min(len(images), arguments.limit or len(images))))
    itself = classify(runner, images.pixels, prg.classify_t_end[0]).argmax(1)
    os.environ["PRG_DEFAULT_MODEL"] = runner.entry.name
    with serving(arguments.entry.resolve().parent) as url, Client(url) as client:
        files = (content for _, content, _ in islice(source.rows(), len(images)))
        served = client.classify(files, top_k=1)
    if served.errors:
        raise SystemExit(
            f"{len(served.errors)} images failed, the first: {next(iter(served.errors.values()))}"
        )
    if served.fingerprint != runner.entry.fingerprints(runner.version).model:
        raise SystemExit(f"the service answered with {served.fingerprint}, other weights than the entry's")
    first = np.array([found[0].class_id for found in served.predictions])
    facts = {
        "benchmark": "served accuracy",
        "entry": runner.entry.name,
        "fingerprint": served.fingerprint,
        "images": len(images),
        "top1_itself": float((itself == images.labels).mean()),
        "top1_served": float((first == images.labels).mean()),
        "differences": int((itself != first).sum()),
        "written": [accuracy.model_dump() for accuracy in prg.versions[runner.version].accuracy],
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
