"""Images decoded once into arrays of the network's own size, kept for the next time."""

import hashlib
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
ROW = [("label", np.int64), ("key", np.uint64)]


def load_split(
    source: Source, spec: ImageSpec, cache: Path, skip_unreadable: bool = False, enlarge: bool = True
) -> Images:
    """Decode a split by the service's own preprocessing, or read what an earlier call left in `cache`.

    skip_unreadable: leave out files that are no images, and list them. enlarge: take images that are smaller
    than the network's size (as serving does). Raises DataError that lists what is not taken.
    """
    return Decoding(source, spec, cache, skip_unreadable, enlarge).whole()


@dataclass(frozen=True)
class Decoding:
    """A split on its way into `cache`; the rest is as `load_split` has it."""

    source: Source
    spec: ImageSpec
    cache: Path
    skip_unreadable: bool
    enlarge: bool

    @property
    def key(self) -> str:
        """Another one for whatever makes other pixels."""
        kind = (
            f"{self.source.fingerprint}|{self.spec.model_dump_json()}|{self.skip_unreadable}|{self.enlarge}"
        )
        return hashlib.sha256(kind.encode()).hexdigest()[:16]

    @property
    def files(self) -> tuple[Path, Path]:
        """(pixels, rows). The rows are written last: where they are, the pixels are whole."""
        return self.cache / f"{self.key}-pixels.npy", self.cache / f"{self.key}-rows.npy"

    @property
    def done(self) -> bool:
        """Whether the whole split is there."""
        return all(file.exists() for file in self.files)

    def part(self, number: int, of: int) -> "_Part":
        """Decode a share of the rows, unless it is there: for several processes, which have one each."""
        part = _Part(self.cache / f"{self.key}-{number}-of-{of}")
        if not part.facts.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            count = self.source.count
            self._decode(part, count * number // of, count * (number + 1) // of)
        return part

    def whole(self, parts: int = 1) -> Images:
        """The split, joined from so many parts where it is not there. Raises DataError."""
        pixels_path, rows_path = self.files
        if not self.done:
            if skipped := self.source.skipped():
                note(skipped)
            found = [self.part(number, parts) for number in range(parts)]
            try:
                self._join(found)
            finally:
                for part in found:
                    part.remove()
        # Mapped: the processes of a machine share what the system has read. (By "r" PyTorch would warn of each batch.)
        pixels = np.load(pixels_path, mmap_mode="c")
        rows = np.load(rows_path)
        labels = rows["label"].astype(np.int64) if self.source.classes else None
        return Images(pixels, labels, self.source.classes, rows["key"].copy(), self.source.why_unlabelled)

    def _decode(self, part: "_Part", start: int, stop: int) -> None:
        def one(row: Row) -> tuple[np.ndarray | ImageError, str, tuple[int, int]]:
            name, content, label = row
            facts = (label, key_of(content))
            try:
                pixels = load_image(content, self.spec, LIMITS)
                if not self.enlarge:
                    _check_size(content, self.spec.size)
            except ImageError as error:
                return error, name, facts
            return pixels, name, facts

        good: list[tuple[int, int]] = []
        bad: list[str] = []
        small: list[str] = []
        rows = self.source.rows(start, stop)
        # Written, not mapped: on a full disk a write is an error, but a mapped page ends the process.
        with atomic_file(part.pixels) as file:
            _write_header(file, stop - start, self.spec.size)
            with ThreadPoolExecutor() as pool, track("decoding images", stop - start) as bar:
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
        with atomic_file(part.facts) as file:
            np.savez(file, rows=np.array(good, ROW), bad=np.array(bad, str), small=np.array(small, str))

    def _join(self, parts: "list[_Part]") -> None:
        """Make the whole of its parts, and raise DataError for what is wrong in any of them."""
        facts = [np.load(part.facts) for part in parts]
        rows, bad, small = (np.concatenate([f[name] for f in facts]) for name in ("rows", "bad", "small"))
        count = self.source.count
        if len(bad) and (not self.skip_unreadable or not len(rows)):
            raise DataError(
                f"{len(bad)} of {count} files are no usable images; remove them, "
                f"or leave them out with --skip-unreadable:\n  {first_few(bad.tolist())}"
            )
        if len(small):
            raise DataError(
                f"{len(small)} of {count} images are smaller than the network's {self.spec.size} pixels; choose "
                "a recipe of their size, or have them enlarged, by --set data.enlarge=true where the model is "
                f"trained:\n  {first_few(small.tolist())}"
            )
        pixels_path, rows_path = self.files
        first, *others = parts
        with first.pixels.open("r+b") as file:
            _write_header(file, len(rows), self.spec.size)
            begin = file.tell()
            # Behind its own pixels, whatever a join that was interrupted has written there.
            file.seek(len(facts[0]["rows"]) * 3 * self.spec.size**2, os.SEEK_CUR)
            file.truncate()
            for part in others:
                with part.pixels.open("rb") as more:
                    more.seek(begin)
                    shutil.copyfileobj(more, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())
        os.replace(first.pixels, pixels_path)
        if len(bad):
            note(f"left out {len(bad)} of {count} files:\n  {first_few(bad.tolist())}")
        with atomic_file(rows_path) as file:
            np.save(file, rows)


@dataclass(frozen=True)
class _Part:
    """What one process decoded: pixels, and beside them a row for each and what was no image."""

    stem: Path

    @property
    def pixels(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}-pixels.npy")

    @property
    def facts(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}-rows.npz")

    def remove(self) -> None:
        self.facts.unlink(missing_ok=True)
        self.pixels.unlink(missing_ok=True)


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
