"""What the tests of training share: a small image folder and a recipe that trains in a second."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from prg.cli import main

CLASSES = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
SETTINGS = (
    *("network=tiny16", "image.size=16", "image.resize=16", "data.validation=0.3", "pretrain.precision=fp32"),
    *(
        "finetune.precision=fp32",
        "pretrain.batch=8",
        "finetune.batch=8",
        "pretrain.epochs=2",
        "finetune.epochs=6",
    ),
    *("finetune.lr=0.01", "encoder.steps=2", "pretrain.optimiser=muon"),
)


def image_folder(
    folder: Path, each: int = 20, splits: tuple[str, ...] = ("train", "test"), seed: int = 0
) -> Path:
    """An image folder of three classes that are easily told apart."""
    rng = np.random.default_rng(seed)
    for split in splits:
        for name, colour in CLASSES.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(each):
                noise = rng.integers(-40, 40, (18, 20, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                    place / f"{i}.png"
                )
    return folder


def trained_run(folder: Path, photos: Path) -> Path:
    """A run that is pretrained and fine-tuned."""
    assert main(["pretrain", str(folder), "--recipe", "images-32", "--data", str(photos), *overrides()]) == 0
    assert main(["finetune", str(folder)]) == 0
    return folder


def overrides(*more: str) -> list[str]:
    """--set flags for the settings above and `more`."""
    return [part for item in (*SETTINGS, *more) for part in ("--set", item)]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes meanwhile: the kernel refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
