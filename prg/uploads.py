"""Images as the files of requests: paths, bytes and pixels in, a bounded number of bytes a request."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image

Image = str | Path | bytes | np.ndarray | PIL.Image.Image
"""A file's path, its content, pixels uint8 [H, W, 3], or what Pillow opened."""
Images = Image | Iterable[Image]
Files = list[tuple[str, tuple[str, bytes]]]
"""Of one request, as httpx takes them."""
REQUEST_ROWS = 32
"""Images x levels of one request."""
REQUEST_BYTES = 24 << 20


def portions(images: Images, levels: int, unreadable: dict[int, str]) -> Iterator[Files]:
    """Files of one request each. One that can't be read travels empty, and its reason goes to `unreadable`."""
    most = max(1, REQUEST_ROWS // max(1, levels))
    files: Files = []
    size = 0
    for row, image in enumerate([images] if isinstance(images, Image) else images):
        try:
            name, content = _file(image)
        except OSError as error:
            name, content, unreadable[row] = "unreadable", b"", str(error)
        if files and (len(files) == most or size + len(content) > REQUEST_BYTES):
            yield files
            files, size = [], 0
        files.append(("files", (name, content)))
        size += len(content)
    if files:
        yield files


def _file(image: Image) -> tuple[str, bytes]:
    """(name, content) of one image. Raises OSError."""
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, str | Path):
        return _name(Path(image)), Path(image).read_bytes()
    picture = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "image.png", file.getvalue()


def _name(path: Path) -> str:
    """For the service, a name of UTF-8 whatever bytes the file's own has."""
    return os.fsencode(path.name).decode(errors="replace")
