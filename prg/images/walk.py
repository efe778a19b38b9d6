"""The one walker over folders: which of their files are images, the same for training and for `prg embed`."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prg.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Of files that are taken for images."""


def image_files(path: Path) -> Iterator[Path]:
    """The image files in a folder, at all levels; of a file itself, that one if it is an image.

    Raises DataError for a link to a folder, OSError for a folder that can't be listed.
    """
    return (file for file in all_files(path) if is_image(file))


def is_image(file: Path) -> bool:
    """Whether the file's name ends like an image's."""
    return file.suffix.lower() in SUFFIXES


def all_files(path: Path) -> Iterator[Path]:
    """Every file in a folder, at all levels, in order; nothing hidden (.name), and nothing below what is hidden."""
    if path.is_file():
        yield path
        return
    for parent, folders, files in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for folder in (Path(parent, name) for name in folders):
            if folder.is_symlink():  # not followed, so its images would be missing without a word
                raise DataError(
                    f"{folder}: a link to {folder.resolve()}, and links to folders are not followed; "
                    "put the folder itself there (a bind mount does)"
                )
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def other_files(folder: Path) -> str:
    """Which files of a folder are skipped because of their ending, and which of its folders hold nothing else.

    Empty where all files are images.
    """
    endings: Counter[str] = Counter()
    for file in all_files(folder):
        if not is_image(file):
            endings[file.suffix.lower() or "none"] += 1
    if not endings:
        return ""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(f"{ending} ({count})" for ending, count in ordered[:5])
    inside = (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))
    bare = [p.name for p in inside if next(all_files(p), None) and not next(image_files(p), None)]
    nothing = f"; no images at all in {', '.join(bare[:10])}" if bare else ""
    return f"{endings.total()} files in {folder} are skipped because of their ending: {counts}{nothing}"


def _raise(error: OSError) -> None:
    raise error
