"""One split of images before decoding, and the names that splits go by."""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of a split's folder, files, or name on the hub."""

Row = tuple[str, bytes, int]
"""(name, encoded bytes, label)."""


class Rows(Protocol):
    """The rows from `start` to `stop`, by default all; the others are not read where that can be helped."""

    def __call__(self, start: int = 0, stop: int | None = None) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Source:
    """One split before decoding: its rows and what identifies them."""

    rows: Rows
    count: int
    classes: tuple[str, ...]
    """Names by label; empty where the images have no labels."""
    fingerprint: str
    """Changes when a file does."""
    labels: Callable[[], set[int]]
    """The labels that occur; no image is read for it."""
    why_unlabelled: str = ""
    """What would have to change for it to have labels; empty where nothing is known."""
    skipped: Callable[[], str] = str
    """Which of its files are skipped because of their ending."""


def composed(name: str) -> str:
    """A class's name as names are compared, in Unicode's NFC: a Mac writes ä as an a and its dots."""
    return unicodedata.normalize("NFC", name)


def standard_name(split: str) -> str:
    """The one name of a split that has several: val is validation."""
    return next((one for one, names in SPLITS.items() if split.lower() in names), split)
