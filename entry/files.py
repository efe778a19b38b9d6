"""Files written whole or not at all, their digests, and which names nobody means."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

LEFT_BY_SYSTEMS = {"@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"}
"""Folders that network drives, disks, Windows and macOS put beside people's own."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out wherever folders are read, with all that lies below it."""
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; whatever interrupts this, `path` holds the old content or the new."""
    # Hidden, so that nobody takes it for one of a folder's files; its own, because two may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # such as a full disk's
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by this content."""
    with atomic_file(path) as file:
        file.write(content)


def sha256(path: Path) -> str:
    """Digest of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
