"""The one walker over folders: which of their files are images, the same for training and for `prg embed`."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from entry.files import is_hidden
from prg.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Of files that are taken for images; entry.images has the formats that are decoded."""


def image_files(path: Path) -> Iterator[Path]:
    """The image files in a folder, at all levels; of a file itself, that one if it is an image.

    Raises DataError for a link to a folder, OSError for a folder that can't be listed.
    """
    return (file for file in all_files(path) if is_image(file))


def is_image(file: Path) -> bool:
    """Whether the file's name ends like an image's."""
    return file.suffix.lower() in SUFFIXES


def all_files(path: Path) -> Iterator[Path]:
    """Every file in a folder, at all levels, in order; nothing hidden, and nothing below what is hidden.

    Of a file itself, that one. Raises as `image_files` does.
    """
    if path.is_file():
        yield path
        return
    folders, files = listed(path)
    for folder in folders:
        if folder.is_symlink():  # not followed, so its images would be missing without a word
            raise DataError(
                f"{folder}: a link to {folder.resolve()}, and links to folders are not followed; "
                "put the folder itself there (a bind mount does)"
            )
    yield from files
    for folder in folders:
        yield from all_files(folder)


def listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """(folders, files) directly in a folder, in order, nothing hidden. Raises OSError for what can't be read.

    os.walk and Path.glob would leave out what they may not read, without a word.
    """
    folders: list[Path] = []
    files: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not is_hidden(entry.name):
                (folders if entry.is_dir() else files).append(folder / entry.name)
    return folders, files


def other_files(folder: Path) -> str:
    """Which files of a folder are skipped because of their ending, and which of its folders hold no image.

    Empty where all files are images, and all folders hold some.
    """
    endings: Counter[str] = Counter()
    for file in all_files(folder):
        if not is_image(file):
            endings[file.suffix.lower() or "none"] += 1
    said = []
    if endings:
        ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
        counts = ", ".join(f"{ending} ({count})" for ending, count in ordered[:5])
        said.append(f"{endings.total()} files in {folder} are skipped because of their ending: {counts}")
    if bare := [inside.name for inside in listed(folder)[0] if next(image_files(inside), None) is None]:
        more = f" and {len(bare) - 10} more" if len(bare) > 10 else ""
        said.append(f"no images at all in {', '.join(bare[:10])}{more} (of {folder})")
    return "; ".join(said)
