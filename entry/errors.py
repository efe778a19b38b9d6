"""What a person can mend: an entry, an image or a device that can't be used, a package that is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("entry", "prg", "service")


class EntryError(ValueError):
    """An entry that can't be used; the message names the file, the key and what to do."""


class DeviceError(ValueError):
    """A device that is not there; the message says which are."""


class ImageError(ValueError):
    """An image that can't be used: an HTTP status, a short title and what to do."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title

    # From one process to another.
    def __reduce__(self) -> tuple[type["ImageError"], tuple[int, str, str]]:
        return ImageError, (self.status, self.title, str(self))


class PackageError(RuntimeError):
    """A package that is not installed; the message names the extra that brings it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """All that is imported in here comes with this extra. Raises PackageError for a package that is not there."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        if package in OURS:
            raise
        raise PackageError(
            f"the package {package} is missing; pip install 'prg-service[{extra}]' (in a checkout: make setup)"
        ) from None
