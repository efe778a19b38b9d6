"""One training at a time in a folder: two would write over each other's checkpoints."""

import fcntl
from pathlib import Path
from typing import IO

from prg.training.processes import ProcessError


class Lock:
    """A folder's lock; the system releases it when the process ends, however it does."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Raises ProcessError where another process holds it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ProcessError(
                f"{self._path.parent}: another process is training here; wait for it, or take another folder"
            ) from None
        except OSError:  # a file system without locks: go on as without them
            self.release()

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None
