"""The images named to `prg embed`: folders, patterns, files, archives, Lance datasets; here or behind URLs."""

import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from entry.errors import ImageError
from entry.files import is_hidden
from prg.embed.archives import ARCHIVES, Archive, Item, display, is_archive, open_archive
from prg.embed.lance import SUFFIX, is_lance, open_lance
from prg.embed.stores import file_system, is_url
from prg.errors import DataError
from prg.images.walk import SUFFIXES, all_files, is_image, other_files

LARGEST = 1 << 30
"""Bytes of an image's file."""


@dataclass
class Found:
    """What the sources hold."""

    files: list[str] = field(default_factory=list)
    """Paths and URLs of images, each once."""
    archives: list[Archive] = field(default_factory=list)
    listing: str = ""
    """A digest of all names, sizes and times of change."""
    skipped: list[str] = field(default_factory=list)
    """A sentence for each folder that holds other files too."""

    @property
    def count(self) -> int | None:
        """Of all images, where it is known."""
        counts = [archive.count for archive in self.archives]
        return None if None in counts else len(self.files) + sum(filter(None, counts))


def find(sources: Iterable[str], image_column: str = "", out: str = "") -> Found:
    """The images of folders (all levels), patterns, files and URLs, in the order of the sources, then of the names.

    A folder holds images or archives. A link to nothing is among the images: a row with an error, not a file less.
    What lies in `out` is left out. Raises DataError where one of the sources gives nothing: what is missing by
    accident, as a disk that is not mounted, must not look like images that were removed.
    """
    found, listing = Found(), hashlib.sha256()
    places: dict[str, None] = {}
    datasets: dict[str, list[Archive]] = {}
    for source in sources:
        if is_lance(source):
            datasets[source], mark = open_lance(source, image_column)
            places[source] = None
            listing.update(f"{source.rstrip('/')}|{mark}\n".encode())
            continue
        marks = _remote(source) if is_url(source) else _local(source, found.skipped)
        marks = {place: mark for place, mark in marks.items() if not _lies_in(place, out)}
        if not marks:
            raise DataError(
                f"{source}: no images there (files ending in {', '.join(SUFFIXES)}, or in {', '.join(ARCHIVES)}; "
                f"a Lance dataset, {SUFFIX}, is named by itself)"
            )
        for place, mark in marks.items():
            places[place] = None
            listing.update(f"{display(place)}|{mark}\n".encode())
    for place in places:
        if place in datasets:
            found.archives += datasets[place]
        elif is_archive(place):
            found.archives.append(open_archive(place, image_column))
        else:
            found.files.append(place)
    found.listing = listing.hexdigest()
    strange = [place for place in found.files if display(place) != place]
    if strange and (equal := {display(place) for place in strange} & set(found.files)):
        raise DataError(f"{equal.pop()}: two files would have this id; rename one")
    return found


def file_item(place: str) -> Item:
    """An image that is a file of its own."""
    return Item(display(place), partial(_read, place))


def _local(source: str, skipped: list[str]) -> dict[str, str]:
    """Each place with a mark that changes when the file does."""
    path = Path(source)
    if path.is_dir():
        chosen = _one_kind(source, sorted(map(str, all_files(path))))
        if chosen and is_image(Path(chosen[0])) and (others := other_files(path)):
            skipped.append(others)
    elif path.is_file():
        chosen = [str(path)]
    else:
        root = _root(source)
        chosen = sorted(
            str(Path(name))
            for name in glob.glob(source, recursive=True)
            if Path(name).is_file() and not _is_hidden(name, root)
        )
        if not chosen:
            raise DataError(f"{source}: no such file or folder")
    return {place: _mark(place) for place in chosen}


def _mark(place: str) -> str:
    try:
        facts = os.stat(place)
    except OSError:  # a link to nothing
        return ""
    return f"{facts.st_size}|{facts.st_mtime_ns}"


def _remote(source: str) -> dict[str, str]:
    files, path = file_system(source)
    root = _root(path)
    try:
        if root != path.rstrip("/"):
            names = files.glob(path, detail=True)
        elif files.isdir(path):
            names = files.find(path, detail=True)
        else:
            return {source: _facts(files.info(path))} if files.exists(path) else {}
    except Exception as error:  # a store's client raises whatever its transport does
        raise DataError(f"{source}: can't be listed ({error})") from None
    chosen = _one_kind(source, [name for name in sorted(names) if not _is_hidden(name, root)])
    return {str(files.unstrip_protocol(name)): _facts(names[name]) for name in chosen}


def _facts(info: dict[str, Any]) -> str:
    return "|".join(
        str(info.get(key)) for key in ("size", "ETag", "etag", "mtime", "LastModified", "updated")
    )


def _one_kind(source: str, files: list[str]) -> list[str]:
    """The images, or the archives where there are no images. Raises DataError where both are there."""
    images = [file for file in files if is_image(Path(file))]
    archives = [file for file in files if is_archive(file)]
    if images and archives:
        raise DataError(
            f"{source}: holds images, such as {images[0]}, and archives, such as {archives[0]}; name the two by "
            "themselves, as by patterns, or put one of them elsewhere"
        )
    return images or archives


def _root(pattern: str) -> str:
    """The folder of a pattern in which hidden names count: what is named itself may be hidden."""
    return re.split(r"[^/]*[*?[]", pattern)[0].rstrip("/")


def _is_hidden(name: str, root: str) -> bool:
    return any(map(is_hidden, name.removeprefix(root).split("/")))


def _lies_in(place: str, out: str) -> bool:
    """Whether a file is of the output, or of the folder where it is put together."""
    if not out or is_url(place) or is_url(out):
        return bool(out) and place.startswith(out.rstrip("/") + "/")
    path, own = os.path.abspath(place), os.path.abspath(out)
    return path == own or path.startswith((f"{own}/", f"{own}.parts/"))


def _read(place: str) -> bytes:
    """Raises OSError, ImageError."""
    if not is_url(place):
        facts = os.stat(place)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{place} is no regular file")
        if facts.st_size > LARGEST:
            raise ImageError(
                413, "Image too large", f"{facts.st_size:,} bytes, at most {LARGEST:,} are taken"
            )
        return Path(place).read_bytes()
    files, path = file_system(place)
    try:
        content: bytes = files.cat_file(path)
    except OSError:
        raise
    except Exception as error:  # as above
        raise OSError(f"can't be read ({error})") from None
    return content
