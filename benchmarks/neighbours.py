"""Nearest neighbours of the same class, by plain cosine of each feature. Prints one JSON line last.

The images are a whole split, which should be one that training never saw. For reporting: nothing is chosen by it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from entry.runner import Runner
from prg.images.decoded import load_split
from prg.images.splits import splits

BATCH = 64
PREFIX = 64
"""Of the embedding, to see what its first numbers say."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument(
        "--split", default="test", help="one that the entry was not trained on (default: test)"
    )
    parser.add_argument("--t-end", type=float, help="by default the entry's")
    parser.add_argument("-k", type=int, default=10)
    arguments = parser.parse_args(argv)
    runner = Runner(arguments.entry)
    t_end = runner.entry.prg.t_end if arguments.t_end is None else arguments.t_end
    with tempfile.TemporaryDirectory() as cache:
        images = load_split(splits(arguments.data)[arguments.split], runner.entry.prg.image, Path(cache))
    if images.labels is None:
        parser.error("the images have no labels")
    vectors = features(runner, images.pixels, t_end)
    result = {name: round(precision(v, images.labels, arguments.k), 4) for name, v in vectors.items()}
    print(f"share of the {arguments.k} nearest (cosine) of {len(images)} images that are of the same class")
    for name, value in result.items():
        print(f"  {name:20} {value:.1%}")
    facts = {"images": len(images), "t_end": t_end, "k": arguments.k, "precision": result}
    print(
        json.dumps(
            facts
            | {"entry": runner.entry.name, "fingerprint": runner.entry.fingerprints(runner.version).encoder}
        )
    )
    return 0


def features(runner: Runner, pixels: np.ndarray, t_end: float) -> dict[str, np.ndarray]:
    """float32 [N, D] by the name of the feature."""
    parts = [
        runner.run(
            pixels[start : start + BATCH], np.full(len(pixels[start : start + BATCH]), t_end, np.float32)
        )
        for start in range(0, len(pixels), BATCH)
    ]
    names = [name for name in ("EMBEDDING", "HIDDEN", "STATE") if name in parts[0]]
    found = {name.lower(): np.concatenate([part[name] for part in parts]) for name in names}
    if "embedding" in found:
        found[f"embedding, first {PREFIX}"] = found["embedding"][:, :PREFIX]
    return found


def precision(vectors: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of each vector's k nearest others, by cosine, that have its label."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    nearest = np.argpartition(-similar, k, axis=1)[:, :k]
    return float((labels[nearest] == labels[:, None]).mean())


if __name__ == "__main__":
    sys.exit(main())
