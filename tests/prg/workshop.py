"""What the tests of training share: a small image folder and a recipe that trains in a second."""

import io
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from prg.checkpoint import Stage
from prg.cli import main
from prg.export import Precision
from prg.images.sets import Images
from prg.publish import publish
from prg.recipe import Data
from prg.target import open_target
from prg.training.finetune import finetune
from prg.training.pretrain import pretrain
from prg.training.run import Run, open_run

CHECKPOINT = "checkpoint.safetensors"

CLASSES = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
SETTINGS = (
    *("network=tiny16", "image.size=16", "image.resize=16", "data.validation=0.3", "pretrain.precision=fp32"),
    *("finetune.precision=fp32", "pretrain.batch=8", "finetune.batch=8", "pretrain.epochs=2"),
    *("finetune.epochs=6", "finetune.lr=0.01", "encoder.steps=2", "pretrain.optimiser=muon"),
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
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def new_run(folder: Path, photos: Path, *changes: str) -> Run:
    """A run of the settings above and `changes`, not begun yet."""
    return open_run(folder, "images-32", [*SETTINGS, f"data.source={photos}", *changes])


def trained_run(folder: Path, photos: Path, *changes: str) -> Path:
    """A run that is pretrained and fine-tuned."""
    run = new_run(folder, photos, *changes)
    pretrain(run)
    finetune(run)
    return folder


def exported(
    run: Path, entry: Path, stage: Stage = "finetune", precision: Precision = "fp32", compact: bool = False
) -> Path:
    """The run's model as the next version of the entry."""
    publish(open_run(run), stage, entry, precision, compact)
    return entry


def evaluated(target: Path, photos: Path | None = None, split: str = "") -> tuple[str, Images]:
    """(name, images) that a run or an entry is evaluated on; photos: by default those of the run."""
    data = Data(source=str(photos)) if photos else Data()
    with tempfile.TemporaryDirectory() as scratch:
        return open_target(target, "finetune", Path(scratch), data).material.evaluated(split)


def answer(*command: object) -> str:
    """What the command prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert main([str(part) for part in command]) == 0
    return out.getvalue()


def refusal(*command: object) -> str:
    """What the command says that will not do it."""
    with redirect_stderr(io.StringIO()) as said:
        assert main([str(part) for part in command]) == 1
    return said.getvalue().partition("prg: ")[2]


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
