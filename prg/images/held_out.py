"""Which images are held out from training: a property of each image, whatever its name, order or folder.

The share is `data.validation` of the recipe. An image's key is a digest of its encoded bytes. It is held out where
the key, as a fraction of all keys, is below the share. So shares nest, and images that are added, renamed or moved
change nothing for the others. (A re-encoded copy is another image.)
"""

import hashlib
import math
from collections.abc import Sequence

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

    before: the share that trainings before this one held out; what all of them held out must be enough too.
    Raises DataError as `is_held_out` does.
    """
    held = is_held_out(images, share, remedy)
    if before and before < share:
        is_held_out(
            images, before, "begin from a model that held out more, add a test split, or use --freeze"
        )
    order = np.argsort(images.keys, kind="stable")
    return images.subset(order[~held[order]]), images.subset(order[held[order]])


def never_trained_on(held_out: Images, before: float | None) -> Images | None:
    """Those that earlier trainings, which held out the share `before`, were not trained on either; None for none.

    Where `before` is not known they are taken for all.
    """
    if before is None:
        return held_out
    index = np.flatnonzero(held_out.keys / 2.0**64 < before)
    return held_out.subset(index) if len(index) else None


def is_held_out(images: Images, share: float, remedy: str = "") -> np.ndarray:
    """Which of the images are: bool [N].

    remedy: what to do where they are too few; by default images are to be trained on, and it is another share.
    Raises DataError where they are fewer than LEAST or, before a training, all images of a class.
    """
    fraction = images.keys / 2.0**64
    held: np.ndarray = fraction < share
    alone = [] if remedy else _without_training(images, held)
    if held.sum() < LEAST or alone:
        all_of = f", among them all of {', '.join(alone)}" if alone else ""
        needed = f"at least {LEAST} are needed" + ("" if remedy else ", and one of each class to train on")
        raise DataError(
            f"a share of {share:g} holds out {held.sum()} of {len(images)} images{all_of}; {needed}: "
            f"{remedy or _share_that_works(images, fraction)}"
        )
    return held


def knows(kept: tuple[str, ...], images: Images) -> bool:
    """Whether more of the images than some chance copies are those that a training kept these keys of.

    The keys are the smallest of its images. So of an image whose key lies between them it is known whether it was
    trained on, and the share of these stands for the share of all.
    """
    known, inside = _between(kept, images)
    return known > 0 and (known == inside or (known > 1 and 10 * known > inside))


def are_others(trainings: Sequence[tuple[str, ...]], images: Images) -> bool:
    """Whether it is seen that none of the trainings, which kept these keys each, was made on these images.

    That is where no key is among theirs, though some of theirs lie between those of a training.
    """
    found = [_between(kept, images) for kept in trainings]
    return not any(known for known, _ in found) and any(inside for _, inside in found)


def _between(kept: tuple[str, ...], images: Images) -> tuple[int, int]:
    """(how many of these keys the images have, how many images lie between the keys)."""
    keys = np.array([int(key, 16) for key in kept], np.uint64)
    own = np.unique(images.keys)
    return len(np.intersect1d(own, keys)), int(((own >= keys[0]) & (own <= keys[-1])).sum())


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
