"""Whether `known` tells images of other classes, and what the temperature mends. Prints one JSON line last.

Both splits should be ones that the entry was not trained on. For reporting: nothing is chosen by them. Both are encoded
alike first, as JPEG at the network's size: how a data set was compressed must not tell it from another.
"""

import argparse
import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from entry.runner import Runner
from prg.evaluation import reliability
from prg.images.decoded import load_split
from prg.images.sets import Images, same_classes
from prg.images.splits import splits
from service.routes.classify import share_below

BATCH = 64
QUALITY = 75
RARE = 0.05
"""Of images like those held out, this share should have a `known` below it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, default=Path("model_repository/prg-cifar10"))
    parser.add_argument(
        "--data", required=True, help="labelled images of the entry's classes; their test split"
    )
    parser.add_argument("--others", required=True, help="images of other classes; their validation split")
    parser.add_argument("--split", default="test", help="of --data (default: test)")
    arguments = parser.parse_args(argv)
    runner = Runner(arguments.entry)
    prg = runner.entry.prg
    calibration = prg.versions[runner.version].calibration
    if prg.labels is None or calibration is None:
        parser.error(f"{arguments.entry} has no calibration")
    own = same_classes(read(arguments.data, arguments.split, runner), prg.labels, arguments.data)
    others = read(arguments.others, "validation", runner)
    logits, known = answers(runner, own.pixels)
    other_logits, other_known = answers(runner, others.pixels)
    assert own.labels is not None
    share = [
        np.mean([share_below(value, calibration.known_quantiles) < RARE for value in values])
        for values in (known, other_known)
    ]
    facts = {
        "benchmark": "known",
        "entry": runner.entry.name,
        "fingerprint": runner.entry.fingerprints(runner.version).model,
        "images": [len(own), len(others)],
        "ece_of_logits": reliability(logits, own.labels).ece,
        "ece": reliability(logits / calibration.temperature, own.labels).ece,
        "temperature": calibration.temperature,
        "known_below_0.05": [round(float(value), 4) for value in share],
        "auroc_known": auroc(known, other_known),
        "auroc_probability": auroc(*(largest(z / calibration.temperature) for z in (logits, other_logits))),
    }
    print(json.dumps(facts))
    return 0


def read(source: str, split: str, runner: Runner) -> Images:
    """A split, decoded as it is served, and encoded as JPEG on the way."""
    with tempfile.TemporaryDirectory() as cache:
        images = load_split(splits(source)[split], runner.entry.prg.image, Path(cache))
    return replace(images, pixels=np.stack([recoded(pixels) for pixels in images.pixels]))


def recoded(pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 [3, S, S] as JPEG gives them back."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=QUALITY)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def answers(runner: Runner, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LOGITS [N, K] and KNOWN [N] of pixels uint8 [N, 3, S, S], at the level that was calibrated."""
    levels = runner.entry.prg.classify_t_end
    assert levels is not None
    parts = [
        runner.run(block, np.full(len(block), levels[0], np.float32))
        for block in (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
    ]
    return np.concatenate([p["LOGITS"] for p in parts]), np.concatenate([p["KNOWN"][:, 0] for p in parts])


def largest(logits: np.ndarray) -> np.ndarray:
    """The largest probability of each row."""
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    found: np.ndarray = (weights / weights.sum(1, keepdims=True)).max(1)
    return found


def auroc(own: np.ndarray, others: np.ndarray) -> float:
    """The share of pairs in which the first has the larger score."""
    ranks = np.concatenate([own, others]).argsort().argsort()[: len(own)]
    return round(float((ranks.sum() - len(own) * (len(own) - 1) / 2) / len(own) / len(others)), 4)


if __name__ == "__main__":
    sys.exit(main())
