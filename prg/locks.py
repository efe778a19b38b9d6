"""A lock between processes, which the system releases when its holder ends, however it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[bool]:
    """Whether this process got the lock of that name; `shared` ones exclude none but those that are not.

    Always true where the system or the file system has no such locks.
    """
    with path.open("ab") as file:
        yield _got(file.fileno(), shared)


def _got(descriptor: int, shared: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
