"""Image sets, decoded once into arrays of the network's own size, and how their classes go together."""

import hashlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from entry.config import ImageSpec
from entry.images import ImageError, Limits, load_image
from prg.training.processes import note
from prg.training.progress import track
from prg.training.sources import DataError, Row, Source

LIMITS = Limits(max_bytes=1 << 30, max_pixels=500_000_000)
"""A user's own files are trusted further than strangers' uploads."""


@dataclass(frozen=True)
class Images:
    """A split: pixels uint8 [N, 3, S, S] (may be memory-mapped), labels int64 [N] or None, class names."""

    pixels: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, index: np.ndarray) -> "Images":
        """The images at `index`, copied into memory."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index], self.classes)

    def digests(self) -> dict[str, str]:
        """What tells these images from any others, or from the same in another order: of pixels, and of labels."""
        parts = {"pixels": self.pixels} | ({} if self.labels is None else {"labels": self.labels})
        return {k: hashlib.sha256(np.ascontiguousarray(v).data).hexdigest()[:16] for k, v in parts.items()}


def load_split(
    source: Source, spec: ImageSpec, cache: Path, skip_unreadable: bool = False, enlarge: bool = True
) -> Images:
    """Decode a split by the service's own preprocessing, or read what an earlier call left in `cache`.

    skip_unreadable: leave files out that are no images, and say which. enlarge: take images that are smaller
    than the network's size (as serving does). Raises DataError that lists what is not taken.
    """
    kind = f"{source.fingerprint}|{spec.model_dump_json()}|{skip_unreadable}|{enlarge}"
    key = hashlib.sha256(kind.encode()).hexdigest()[:16]
    pixels_path, labels_path = cache / f"{key}-pixels.npy", cache / f"{key}-labels.npy"
    if not (
        labels_path.exists() and pixels_path.exists()
    ):  # the labels are written last, when both are whole
        cache.mkdir(parents=True, exist_ok=True)
        _decode(source, spec, pixels_path, labels_path, skip_unreadable, enlarge)
    pixels = np.load(pixels_path, mmap_mode="r" if pixels_path.stat().st_size > 4 << 30 else None)
    labels = np.load(labels_path)
    return Images(pixels, labels if source.classes else None, source.classes)


def hold_out(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Split off a validation part, the same for the same seed: (training, validation)."""
    training, held_back = deal(len(images), share, seed)
    return images.subset(training), images.subset(held_back)


def deal(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are trained on, and which are held back: int64, each in order."""
    held = held_count(count, share)
    order = np.random.default_rng([seed, 0x5EED]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def held_count(count: int, share: float) -> int:
    """How many are held back. Raises DataError where that is none or all of them."""
    held = round(count * share)
    if held < 1 or held >= count:
        raise DataError(f"data.validation = {share} of {count} images leaves a part empty")
    return held


def same_classes(images: Images, trained: tuple[str, ...], where: str) -> Images:
    """The images with their labels numbered as in training.

    Raises DataError for images without labels, or of a class that training never saw.
    """
    if images.labels is None:
        raise DataError(f"{where}: no labels")
    number = numbers_of(images.classes, trained)
    unknown = [images.classes[i] for i, n in enumerate(number) if n is None]
    if unknown:
        raise DataError(f"{where}: classes that training never saw: {', '.join(unknown)}")
    return Images(images.pixels, np.array(number, np.int64)[images.labels], trained)


def numbers_of(classes: Sequence[str], trained: tuple[str, ...]) -> list[int | None]:
    """Where each class stands among those of training, by its name; None for one that does not.

    Data that numbers its classes from 0, as many as there are, but names none, has them in training's order.
    """
    if set(classes) != set(trained) and set(classes) == {str(i) for i in range(len(trained))}:
        return [int(name) for name in classes]
    return [trained.index(name) if name in trained else None for name in classes]


def check_classes_were_seen(trained: tuple[str, ...], seen: set[int], splits: Mapping[str, Source]) -> None:
    """Raise DataError for a class that is only in images to be judged by: no head could ever name it.

    trained: the names of training's classes. seen: the labels that occur there. splits: the others, by name.
    """
    for name, source in splits.items():
        number = numbers_of(source.classes, trained)
        unseen = [
            source.classes[i] for i in sorted(source.labels()) if source.classes and number[i] not in seen
        ]
        if unseen:
            raise DataError(
                f"split {name!r} has classes that training never saw: {', '.join(unseen)}; "
                "add images of them to the training split, or remove them"
            )


def check_held_back(training: Images, held_back: Images) -> None:
    """Raise DataError for a class of which every image is held back from training."""
    assert training.labels is not None
    assert held_back.labels is not None
    lonely = set(np.unique(held_back.labels)) - set(np.unique(training.labels))
    if lonely:
        raise DataError(
            f"classes {', '.join(training.classes[i] for i in sorted(lonely))}: so few images that all of them are "
            "held back; add images, or lower data.validation"
        )


def _decode(
    source: Source, spec: ImageSpec, pixels_path: Path, labels_path: Path, skip: bool, enlarge: bool
) -> None:
    def one(row: Row) -> tuple[np.ndarray | ImageError, str, int]:
        try:
            pixels = load_image(row[1], spec, LIMITS)
            if not enlarge:
                _check_size(row[1], spec.size)
        except ImageError as error:
            return error, row[0], row[2]
        return pixels, row[0], row[2]

    if others := source.passed_over():
        note(others)
    temporary = pixels_path.with_name(pixels_path.name + ".tmp")
    labels: list[int] = []
    bad: list[str] = []
    small: list[str] = []
    rows = source.rows()
    try:
        # Written, not mapped: on a full disk a write is an error, but a mapped page is the process's end.
        with (
            temporary.open("wb") as file,
            ThreadPoolExecutor() as pool,
            track("decoding images", source.count) as bar,
        ):
            _write_header(file, source.count, spec.size)
            while batch := list(islice(rows, 512)):
                for result, name, label in pool.map(one, batch):
                    if isinstance(result, _TooSmall):
                        small.append(f"{name}: {result}")
                    elif isinstance(result, ImageError):
                        bad.append(f"{name}: {result}")
                    else:
                        file.write(result.tobytes())
                        labels.append(label)
                bar.advance(len(batch))
            file.seek(0)
            _write_header(file, len(labels), spec.size)
        if bad and (not skip or not labels):
            raise DataError(
                f"{len(bad)} of {source.count} files are no usable images; remove them, "
                f"or leave them out with --skip-unreadable:\n  {_shown(bad)}"
            )
        if small:
            raise DataError(
                f"{len(small)} of {source.count} images are smaller than the network's {spec.size} pixels; choose "
                "a recipe of their size, or have them enlarged, by --set data.enlarge=true where the model is "
                f"trained:\n  {_shown(small)}"
            )
        if bad:
            print(f"left out {len(bad)} of {source.count} files:\n  {_shown(bad)}", file=sys.stderr)
        os.replace(temporary, pixels_path)
        with labels_path.with_suffix(".tmp").open("wb") as file:
            np.save(file, np.array(labels, np.int64))
        os.replace(labels_path.with_suffix(".tmp"), labels_path)
    finally:
        temporary.unlink(missing_ok=True)
        labels_path.with_suffix(".tmp").unlink(missing_ok=True)


class _TooSmall(ImageError):
    """An image that would have to be enlarged."""


def _check_size(content: bytes, size: int) -> None:
    with Image.open(io.BytesIO(content)) as picture:
        if min(picture.size) < size:
            raise _TooSmall(422, "Image too small", f"{picture.width} x {picture.height}")


def _write_header(file: IO[bytes], count: int, size: int) -> None:
    """A .npy's header; numpy leaves room in it for any count, so that it can be written again over itself."""
    shape = (count, 3, size, size)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _shown(lines: list[str]) -> str:
    return "\n  ".join(lines[:10]) + (f"\n  … and {len(lines) - 10} more" if len(lines) > 10 else "")
