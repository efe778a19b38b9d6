"""The images that are named to `prg embed`: folders, patterns and files; parquet and tars; here or behind URLs."""

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from entry.files import is_hidden
from prg.embed.stores import file_system, is_url
from prg.errors import DataError
from prg.images.walk import SUFFIXES, all_files, is_image, other_files

TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVES = (".parquet", *TARS)
"""Of files that hold images."""


@dataclass(frozen=True)
class Item:
    """One image."""

    id: str
    """Its path, or its archive and its place there. Unique."""
    read: Callable[[], bytes]
    """Its bytes; called in another thread. Raises OSError, or DataError."""


@dataclass(frozen=True)
class Archive:
    """A file that holds images: WebDataset's .tar, or parquet."""

    place: str
    """A path or a URL."""
    count: int | None
    """How many images, where that is known without reading all of it."""
    items: Callable[[], Iterator[Item]]
    """Raises DataError where the file is broken."""


@dataclass
class Found:
    """What the sources hold."""

    files: list[str] = field(default_factory=list)
    """Paths and URLs of images, each once."""
    archives: list[Archive] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """A sentence for each folder that holds other files too."""

    @property
    def count(self) -> int | None:
        """Of all images, where it is known."""
        counts = [archive.count for archive in self.archives]
        return None if None in counts else len(self.files) + sum(filter(None, counts))


def find(sources: Iterable[str], image_column: str = "") -> Found:
    """The images of folders (all levels), patterns, files and URLs, in the order of the sources, then of the names.

    A folder without images gives its archives. A link to nothing is among the images: a row with an error, not a
    file less. Raises DataError where one of the sources gives nothing: what is missing by accident, as a disk that
    is not mounted, must not look like images that were removed.
    """
    found = Found()
    archives: list[str] = []
    for source in sources:
        places = _remote(source) if is_url(source) else _local(source, found.skipped)
        if not places:
            raise DataError(
                f"{source}: no images there (files ending in {', '.join(SUFFIXES)}, or in {', '.join(ARCHIVES)})"
            )
        for place in places:
            (archives if place.lower().endswith(ARCHIVES) else found.files).append(place)
    found.files = list(dict.fromkeys(found.files))
    found.archives = [_archive(place, image_column) for place in dict.fromkeys(archives)]
    return found


def file_item(place: str) -> Item:
    """An image that is a file of its own."""
    return Item(display(place), partial(_read, place))


def display(place: str) -> str:
    """A path as text; bytes of it that are no UTF-8 as \\xff."""
    return os.fsencode(place).decode(errors="backslashreplace")


def _local(source: str, skipped: list[str]) -> list[str]:
    path = Path(source)
    if path.is_dir():
        files = sorted(map(str, all_files(path)))
        images = [file for file in files if is_image(Path(file))]
        if images and (others := other_files(path)):
            skipped.append(others)
        return images or [file for file in files if file.lower().endswith(ARCHIVES)]
    if path.is_file():
        return [str(path)]
    matching = (Path(name) for name in glob.glob(source, recursive=True))
    matches = sorted(str(match) for match in matching if match.is_file())
    if not matches:
        raise DataError(f"{source}: no such file or folder")
    return matches


def _remote(source: str) -> list[str]:
    files, path = file_system(source)
    root = re.split(r"[^/]*[*?[]", path)[0].rstrip("/")  # what is named itself may be hidden
    try:
        if root != path.rstrip("/"):
            names = files.glob(path)
        elif files.isdir(path):
            names = files.find(path)
        else:
            return [source] if files.exists(path) else []
    except Exception as error:  # a store's client raises whatever its transport does
        raise DataError(f"{source}: can't be listed ({error})") from None
    seen = [name for name in sorted(names) if not any(map(is_hidden, name.removeprefix(root).split("/")))]
    images = [name for name in seen if is_image(Path(name))]
    chosen = images or [name for name in seen if name.lower().endswith(ARCHIVES)]
    return [str(files.unstrip_protocol(name)) for name in chosen]


def _read(place: str) -> bytes:
    if not is_url(place):
        return Path(place).read_bytes()
    files, path = file_system(place)
    try:
        content: bytes = files.cat_file(path)
    except OSError:
        raise
    except Exception as error:  # as above
        raise OSError(f"can't be read ({error})") from None
    return content


def _open(place: str) -> IO[bytes]:
    if not is_url(place):
        return Path(place).open("rb")
    files, path = file_system(place)
    opened: IO[bytes] = files.open(path, "rb")
    return opened


def _archive(place: str, image_column: str) -> Archive:
    if place.lower().endswith(TARS):
        return Archive(place, None, partial(_tar_items, place))
    from prg.images.parquet import image_column as choose  # pyarrow is an extra

    pq, pa = _parquet()
    try:
        with _open(place) as file:
            table = pq.ParquetFile(file)
            column = choose(table.schema_arrow, image_column, place)
            count = table.metadata.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{place}: not readable as parquet ({error})") from None
    return Archive(place, count, partial(_parquet_items, place, column))


def _parquet() -> tuple[Any, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq, pa


def _parquet_items(place: str, column: str) -> Iterator[Item]:
    from prg.images.parquet import cell_bytes

    pq, pa = _parquet()
    folder = None if is_url(place) else Path(place).parent
    row = 0
    with _open(place) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(64, columns=[column]):
                for cell in batch.column(0).to_pylist():
                    name = f"{display(place)}#{row}"
                    yield Item(name, partial(cell_bytes, cell, folder, f"{name}, column {column!r}"))
                    row += 1
        except pa.ArrowException as error:
            raise DataError(f"{place}: broken after {row} images ({error})") from None


def _tar_items(place: str) -> Iterator[Item]:
    """Members whose names end like an image's; the others are their labels, texts and so on."""
    count = 0
    seen: set[str] = set()
    with _open(place) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it remembers every one
                    path = Path(member.name)
                    if not member.isfile() or not is_image(path) or any(map(is_hidden, path.parts)):
                        continue
                    if member.name in seen:
                        raise DataError(f"{place}: {member.name} is in it twice; a name of its own is needed")
                    seen.add(member.name)
                    content = tar.extractfile(member)
                    assert content is not None
                    data = content.read()
                    yield Item(f"{display(place)}#{member.name}", lambda data=data: data)  # type: ignore[misc]
                    count += 1
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{place}: broken after {count} images ({error})") from None
