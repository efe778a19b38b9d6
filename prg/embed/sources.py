"""The images that are named to `prg embed`: folders, files and patterns."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from prg.errors import DataError
from prg.images.walk import image_files


def find_images(sources: Iterable[str]) -> Iterator[Path]:
    """Files of folders (all levels), of patterns, and named ones, each once, in a fixed order.

    A link to nothing is among them: a row with an error, not a file less. Raises DataError where nothing is there.
    """
    seen: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(image_files(path))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
            if not found:
                raise DataError(f"{source}: no such file or folder")
        for file in found:
            if file not in seen:
                seen.add(file)
                yield file
