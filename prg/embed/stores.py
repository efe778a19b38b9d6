"""Where partitions are: a folder here, or one behind a URL that fsspec reads (s3://, gs://, …)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from entry.errors import needs
from entry.files import write_atomically
from prg.errors import DataError
from prg.locks import lock


class Store(Protocol):
    """Named pieces of bytes, each written whole or not at all."""

    def names(self) -> set[str]:
        """Of all that is there, but for what is hidden."""

    def read(self, name: str) -> bytes:
        """The content of one."""

    def write(self, name: str, content: bytes) -> None:
        """Write one, in place of an older one of its name."""

    def remove(self, name: str) -> None:
        """Remove one, if it is there."""

    def alone(self, shard: str) -> Any:
        """A context in which no other run writes here, but those of other shards. Raises DataError."""


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        """Of all that is there, but for what is hidden."""
        return {file.name for file in self.path.iterdir() if not file.name.startswith(".")}

    def read(self, name: str) -> bytes:
        """The content of one."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write one, in place of an older one of its name."""
        write_atomically(self.path / name, content)

    def remove(self, name: str) -> None:
        """Remove one, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def alone(self, shard: str) -> Iterator[None]:
        """No other run writes here, but those of other shards. Raises DataError."""
        with ExitStack() as held:
            mine = held.enter_context(lock(self.path / ".lock", shared=bool(shard)))
            if shard:
                mine = held.enter_context(lock(self.path / f".lock-{shard}")) and mine
            if not mine:
                raise DataError(f"{self.path}: another run writes here; wait for it, or name another --out")
            yield


class Remote:
    """A folder behind a URL. Nothing keeps two runs apart there: object stores have no locks."""

    def __init__(self, url: str) -> None:
        self._files, self._path = file_system(url)
        with suppress(OSError):  # where there are folders at all
            self._files.makedirs(self._path, exist_ok=True)

    def names(self) -> set[str]:
        """Of all that is there, but for what is hidden."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path, detail=False)
        except FileNotFoundError:  # object stores have no empty folders
            return set()
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        return {name for name in names if not name.startswith(".")}

    def read(self, name: str) -> bytes:
        """The content of one."""
        content: bytes = self._files.cat_file(f"{self._path}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write one, in place of an older one of its name."""
        self._files.pipe_file(f"{self._path}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove one, if it is there."""
        with suppress(FileNotFoundError):
            self._files.rm_file(f"{self._path}/{name}")

    @contextmanager
    def alone(self, shard: str) -> Iterator[None]:
        """Nothing: there are no locks."""
        yield


def open_store(out: str) -> Store:
    """A folder or a URL as a store."""
    return Remote(out.rstrip("/")) if is_url(out) else Folder(Path(out))


def is_url(place: str) -> bool:
    """Whether this is a URL, and no path."""
    return "://" in place


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises DataError for a URL that can't be used."""
    with needs("remote"):
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # fsspec names the package that reads such URLs
        raise DataError(f"{url}: {error}") from None
    return files, str(path)
