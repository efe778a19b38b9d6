"""Images decoded once into arrays of the network's own size, kept for the next time."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from entry.config import ImageSpec
from entry.files import atomic_file
from entry.images import ImageError, Limits, load_image
from prg.console import first_few, note, track
from prg.errors import DataError
from prg.images.held_out import key_of
from prg.images.sets import Images
from prg.images.source import Row, Source

LIMITS = Limits(max_bytes=1 << 30, max_pixels=500_000_000)
"""A user's own files are trusted further than strangers' uploads."""
MAPPED_BYTES = 4 << 30
"""Larger sets are mapped from the disk instead of read into memory."""


def load_split(
    source: Source, spec: ImageSpec, cache: Path, skip_unreadable: bool = False, enlarge: bool = True
) -> Images:
    """Decode a split by the service's own preprocessing, or read what an earlier call left in `cache`.

    skip_unreadable: leave out files that are no images, and list them. enlarge: take images that are smaller
    than the network's size (as serving does). Raises DataError that lists what is not taken.
    """
    kind = f"{source.fingerprint}|{spec.model_dump_json()}|{skip_unreadable}|{enlarge}"
    key = hashlib.sha256(kind.encode()).hexdigest()[:16]
    pixels_path, rows_path = cache / f"{key}-pixels.npy", cache / f"{key}-rows.npy"
    if not (rows_path.exists() and pixels_path.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        _decode(source, spec, pixels_path, rows_path, skip_unreadable, enlarge)
    pixels = np.load(pixels_path, mmap_mode="r" if pixels_path.stat().st_size > MAPPED_BYTES else None)
    rows = np.load(rows_path)
    labels = rows["label"].astype(np.int64) if source.classes else None
    return Images(pixels, labels, source.classes, rows["key"].copy(), source.why_unlabelled)


def _decode(
    source: Source, spec: ImageSpec, pixels_path: Path, rows_path: Path, skip: bool, enlarge: bool
) -> None:
    def one(row: Row) -> tuple[np.ndarray | ImageError, str, tuple[int, int]]:
        name, content, label = row
        facts = (label, key_of(content))
        try:
            pixels = load_image(content, spec, LIMITS)
            if not enlarge:
                _check_size(content, spec.size)
        except ImageError as error:
            return error, name, facts
        return pixels, name, facts

    if skipped := source.skipped():
        note(skipped)
    good: list[tuple[int, int]] = []
    bad: list[str] = []
    small: list[str] = []
    rows = source.rows()
    # Written, not mapped: on a full disk a write is an error, but a mapped page ends the process.
    with atomic_file(pixels_path) as file:
        _write_header(file, source.count, spec.size)
        with ThreadPoolExecutor() as pool, track("decoding images", source.count) as bar:
            while batch := list(islice(rows, 512)):
                for result, name, facts in pool.map(one, batch):
                    if isinstance(result, _TooSmall):
                        small.append(f"{name}: {result}")
                    elif isinstance(result, ImageError):
                        bad.append(f"{name}: {result}")
                    else:
                        file.write(result.tobytes())
                        good.append(facts)
                bar.advance(len(batch))
        file.seek(0)
        _write_header(file, len(good), spec.size)
        if bad and (not skip or not good):
            raise DataError(
                f"{len(bad)} of {source.count} files are no usable images; remove them, "
                f"or leave them out with --skip-unreadable:\n  {first_few(bad)}"
            )
        if small:
            raise DataError(
                f"{len(small)} of {source.count} images are smaller than the network's {spec.size} pixels; choose "
                "a recipe of their size, or have them enlarged, by --set data.enlarge=true where the model is "
                f"trained:\n  {first_few(small)}"
            )
    if bad:
        note(f"left out {len(bad)} of {source.count} files:\n  {first_few(bad)}")
    # The rows last: where they are, the pixels are whole.
    with atomic_file(rows_path) as file:
        np.save(file, np.array(good, [("label", np.int64), ("key", np.uint64)]))


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
