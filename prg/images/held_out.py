"""Which images are held out from training: a property of each image, whatever its name, order or folder.

An image's key is a digest of its encoded bytes. It is held out where the key, as a fraction of all keys, is below the
share. So shares nest, and images that are added, renamed or moved change nothing for the others. (A re-encoded
copy is another image.)
"""

import hashlib
import math

import numpy as np

from prg.errors import DataError
from prg.images.sets import Images

SALT = b"prg: held out?"
LEAST = 10
"""Images held out, at least: fewer say nothing."""
LARGEST_SHARE = 0.5


def key_of(content: bytes) -> int:
    """An image's key from its encoded bytes, below 2**64."""
    return int.from_bytes(hashlib.sha256(SALT + content).digest()[:8])


def hold_out(
    images: Images, share: float, remedy: str = "", before: float | None = None
) -> tuple[Images, Images]:
    """(training, held out), each in the order of the keys.

    before: the share that trainings before this one held out; what is held out of all must be enough too.
    Raises DataError as `is_held_out` does.
    """
    held = is_held_out(images, share, remedy)
    if before and before < share:
        is_held_out(images, before, "begin from a model that held out more, or add a test split")
    order = np.argsort(images.keys, kind="stable")
    return images.subset(order[~held[order]]), images.subset(order[held[order]])


def is_held_out(images: Images, share: float, remedy: str = "") -> np.ndarray:
    """Which of the images are: bool [N].

    Raises DataError where these are fewer than LEAST, or all images of a class; it tells the `remedy`, by default
    a share that works.
    """
    fraction = images.keys / 2.0**64
    held: np.ndarray = fraction < share
    alone = _without_training(images, held)
    if held.sum() < LEAST or alone:
        all_of = f", among them all of {', '.join(alone)}" if alone else ""
        raise DataError(
            f"a share of {share:g} holds out {held.sum()} of {len(images)} images{all_of}; at least {LEAST} are "
            f"needed, and one of each class to train on: {remedy or _share_that_works(images, fraction)}"
        )
    return held


def _without_training(images: Images, held: np.ndarray) -> list[str]:
    """The classes of which every image is held out."""
    if images.labels is None:
        return []
    gone = set(images.labels[held]) - set(images.labels[~held])
    return [images.classes[i] for i in sorted(gone)]


def _share_that_works(images: Images, fraction: np.ndarray) -> str:
    """A share that works, in hundredths; where there is none, what else does."""
    least = np.sort(fraction)[LEAST - 1] if len(images) >= LEAST else math.inf
    share = next((n / 100 for n in range(1, 51) if n / 100 > least), None)
    if share is not None and not _without_training(images, fraction < share):
        return f"--set data.validation={share}"
    if images.labels is None:
        return "add images"
    return "add images, or fit a head alone by --freeze, which holds none out"
