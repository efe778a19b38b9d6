"""Files that hold many images: WebDataset's .tar, and parquet; here or behind URLs."""

import gzip
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from entry.files import is_hidden
from prg.embed.stores import file_system, is_url
from prg.errors import DataError
from prg.images.walk import is_image

TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVES = (".parquet", *TARS)


@dataclass(frozen=True)
class Item:
    """One image."""

    id: str
    """Its path, or its archive and its place there. Unique."""
    read: Callable[[], bytes]
    """Its bytes; called in another thread. Raises OSError, ImageError or DataError."""


@dataclass(frozen=True)
class Archive:
    """One such file."""

    place: str
    """A path or a URL."""
    count: int | None
    """How many images, where that is known without reading all of it."""
    items: Callable[[], Iterator[Item]]
    """Raises DataError where the file is broken, or holds no image."""


def is_archive(place: str) -> bool:
    """By its ending."""
    return place.lower().endswith(ARCHIVES)


def open_archive(place: str, image_column: str) -> Archive:
    """image_column: of parquet; empty: the only one. Raises DataError."""
    if place.lower().endswith(TARS):
        return Archive(place, None, partial(_checked, place, _tar_items))
    from prg.images.parquet import image_column as choose  # pyarrow is an extra

    pq, pa = _parquet()
    try:
        with _open(place) as file:
            table = pq.ParquetFile(file)
            column = choose(table.schema_arrow, image_column, place)
            count = table.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{place}: not readable as parquet ({error})") from None
    return Archive(place, count, partial(_checked, place, partial(_parquet_items, column)))


def display(place: str) -> str:
    """A path as text; bytes of it that are no UTF-8 as \\xff."""
    return os.fsencode(place).decode(errors="backslashreplace")


def _checked(place: str, read: Callable[[str, IO[bytes]], Iterator[Item]]) -> Iterator[Item]:
    """The items; an archive that ends early is an error, and not a smaller one."""
    _, pa = _parquet() if place.lower().endswith(".parquet") else (None, None)
    broken = (tarfile.TarError, EOFError, OSError, *([pa.ArrowException] if pa else []))
    count = 0
    with _open(place) as file:
        try:
            for item in read(place, file):
                yield item
                count += 1
        except broken as error:
            raise DataError(f"{display(place)}: broken after {count} images ({error})") from None
    if not count:
        raise DataError(f"{display(place)}: no images in it")


def _open(place: str) -> IO[bytes]:
    if not is_url(place):
        return Path(place).open("rb")
    files, path = file_system(place)
    opened: IO[bytes] = files.open(path, "rb")
    return opened


def _parquet() -> tuple[Any, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq, pa


def _parquet_items(column: str, place: str, file: IO[bytes]) -> Iterator[Item]:
    from prg.images.parquet import cell_bytes

    pq, _ = _parquet()
    folder = None if is_url(place) else Path(place).parent
    row = 0
    for batch in pq.ParquetFile(file).iter_batches(64, columns=[column]):
        for cell in batch.column(0).to_pylist():
            name = f"{display(place)}#{row}"
            yield Item(name, partial(cell_bytes, cell, folder, f"{name}, column {column!r}"))
            row += 1


class _Member(tarfile.TarInfo):
    """A header that is cut or damaged is an error; tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tar)
        # EOFHeaderError, the fourth kind, is the end.
        except (
            tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
            tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
            tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
        ) as error:
            raise tarfile.ReadError(f"no end of the archive: {error}") from None


def _tar_items(place: str, file: IO[bytes]) -> Iterator[Item]:
    """Members whose names end like an image's; the others are their labels, texts and so on."""
    plain: Any = file if place.lower().endswith(".tar") else gzip.GzipFile(fileobj=file)
    seen: set[str] = set()
    with tarfile.open(fileobj=plain, mode="r|", tarinfo=_Member) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it remembers every one
            path = Path(member.name)
            if member.isdir() or not is_image(path) or any(is_hidden(p) for p in path.parts if p != ".."):
                continue
            name = f"{display(place)}#{display(member.name)}"
            if name in seen:
                raise DataError(f"{name} is in it twice; a name of its own is needed")
            seen.add(name)
            content = tar.extractfile(member) if member.isfile() else None
            yield Item(name, partial(_link, name) if content is None else partial(bytes, content.read()))
    while plain.read(1 << 20):  # to the end, where gzip checks what it read
        pass


def _link(name: str) -> bytes:
    raise DataError(f"{name}: a link, with no content of its own in the archive")
