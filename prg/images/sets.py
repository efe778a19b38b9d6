"""Sets of decoded images, and how the classes of one go with those of another."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from prg.errors import DataError
from prg.images.source import Source, composed

KEPT = 64
"""Keys of images trained on that a model keeps, by which they are known again elsewhere."""


class Pixels(Protocol):
    """uint8 [N, 3, S, S]: an array, in memory or mapped from the disk, or some rows of one."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Picked:
    """Rows of pixels that stay where they are; what is asked for is copied."""

    whole: Pixels
    index: np.ndarray  # int [M]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.whole[self.index[rows]]


@dataclass(frozen=True)
class Images:
    """Decoded images, a row each."""

    pixels: Pixels
    labels: np.ndarray | None  # int64 [N]
    classes: tuple[str, ...]
    """Names by label; empty without labels."""
    keys: np.ndarray  # uint64 [N]
    """Which image each is, by a digest of its encoded bytes."""
    why_unlabelled: str = ""
    """As their source says it."""

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, index: np.ndarray) -> "Images":
        """The images at `index`; their pixels are read when they are used."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, pixels=Picked(self.pixels, index), labels=labels, keys=self.keys[index])

    def unlabelled(self) -> "Images":
        """The same images without their labels."""
        return replace(self, labels=None, classes=())

    @property
    def digest(self) -> str:
        """16 hex digits, different for other images and other labels, the same in another order."""
        labels = [] if self.labels is None else [self.labels]
        rows = np.sort(np.rec.fromarrays([self.keys, *labels]))
        return hashlib.sha256(rows.tobytes()).hexdigest()[:16]

    @property
    def kept_keys(self) -> tuple[str, ...]:
        """The KEPT smallest keys, 16 hex digits each: a sample that is the same for the same images."""
        return tuple(f"{key:016x}" for key in np.unique(self.keys)[:KEPT])


def sample(images: Images, limit: int | None, seed: int = 0) -> Images:
    """At most `limit` of the images, drawn at random, the same for the same seed."""
    if limit is None or limit >= len(images):
        return images
    index = np.random.default_rng([seed, 0xF0]).permutation(len(images))[:limit]
    return images.subset(np.sort(index))


def sample_evenly(images: Images, limit: int) -> Images:
    """At most `limit` of the images, of each class as many as of any other while they last; the same each time."""
    if limit >= len(images):
        return images
    if images.labels is None:
        return sample(images, limit)
    order = np.random.default_rng([0, 0xF1]).permutation(len(images))
    labels = images.labels[order]
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    place = np.empty(len(images), np.int64)  # of each image among those of its class
    place[by_class] = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    return images.subset(np.sort(order[np.argsort(place, kind="stable")[:limit]]))


def same_classes(images: Images, trained: tuple[str, ...], where: str) -> Images:
    """The images with their labels numbered as in training.

    Raises DataError for images without labels, or of a class that training never saw.
    """
    if images.labels is None:
        why = f": {images.why_unlabelled}" if images.why_unlabelled else ""
        raise DataError(f"{where}: no labels{why}")
    number = numbers_of(images.classes, trained)
    unknown = [images.classes[i] for i, n in enumerate(number) if n is None]
    if unknown:
        raise DataError(f"{where}: classes that training never saw: {', '.join(unknown)}")
    return replace(images, labels=np.array(number, np.int64)[images.labels], classes=trained)


def numbers_of(classes: Sequence[str], trained: tuple[str, ...]) -> list[int | None]:
    """Where each class stands among those of training, by its name; None for one that does not.

    Data that numbers its classes from 0, as many as there are, but names none, has them in training's order.
    """
    number = {composed(name): i for i, name in enumerate(trained)}
    own = [composed(name) for name in classes]
    if set(own) != set(number) and set(own) == {str(i) for i in range(len(trained))}:
        return [int(name) for name in own]
    return [number.get(name) for name in own]


def check_classes_were_seen(trained: tuple[str, ...], seen: set[int], splits: Mapping[str, Source]) -> None:
    """Raise DataError for a class that occurs only in images to evaluate on: no head could ever name it.

    trained: the names of training's classes. seen: the labels that occur there. splits: the others, by name.
    """
    for name, source in splits.items():
        number = numbers_of(source.classes, trained)
        unseen = [
            source.classes[i] for i in sorted(source.labels()) if source.classes and number[i] not in seen
        ]
        if unseen:
            raise DataError(
                f"split {name!r} has classes that training never saw: {', '.join(unseen)}; "
                "add images of them to the training split, or remove them"
            )
