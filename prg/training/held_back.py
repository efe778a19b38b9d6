"""Which images were held back from every training behind a model, and what of that can't be known."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from prg.training.data import Images, deal, hold_out
from prg.training.processes import note
from prg.training.sources import DataError

Record = Mapping[str, Any]
"""Of one training: its kind, how many images it was given, of which share of them by which seed, and their digest;
of one before an import the kind alone."""


def behind(facts: Mapping[str, Any]) -> list[Record]:
    """Of every training behind a checkpoint of these facts, its own last."""
    settings = facts["settings"]
    before: list[Record] = []
    if "seen" in facts.get("init", {}):
        before = facts["init"]["seen"]
    elif "pretraining" in facts:  # of an import, or from before records were kept
        before = behind(facts["pretraining"] | {"kind": "pretrain"})
    if "imported" in settings:
        return [*before, {"kind": "imported"}]
    own = {"kind": facts["kind"], "images": settings["images"]}
    own |= {"validation": settings["data"]["validation"], "seed": settings["seed"]}
    if "digests" in settings:  # a checkpoint from before they were taken has none
        own["digest"] = settings["digests"]["pixels"]
    return [*before, own]


def told_by_entry(training: Mapping[str, Any]) -> list[Record]:
    """The same of an entry, from what it says of its training; an old one knows but numbers and seeds."""
    if "seen" in training:
        return list(training["seen"])
    stages = ((kind, training.get(kind, {})) for kind in ("pretrain", "finetune"))
    return [{"kind": k, "images": s["images"], "seed": s["seed"]} for k, s in stages if "images" in s]


def held_back_by(images: Images, record: Record) -> np.ndarray | None:
    """Which of these images were held back from that training; None where it was not given the others of these.

    Without a digest in the record, as many images are taken for the same.
    """
    count = len(images)
    share = record.get("validation", 1 - record.get("images", 0) / count)
    held = round(count * share)
    if not 0 < held < count or count - held != record.get("images"):
        return None
    training, held_back = deal(count, share, record["seed"])
    if record.get("digest") not in (None, images.subset(training).digests()["pixels"]):
        return None
    return held_back


def gave_some_of(images: Images, records: Sequence[Record]) -> bool:
    """Whether just these images, but for some held back, were given to one of the trainings, as its digest says."""
    return any("digest" in r and held_back_by(images, r) is not None for r in records)


def never_seen(
    images: Images, records: Sequence[Record], model: str, where: str, share: float, seed: int
) -> tuple[Images, Images]:
    """(the others, those held back from all trainings behind the model).

    Where none of them was given any of these images, as `share` and `seed` deal them. model, where: the names of
    the model and of the images. What can't be known is told on stderr. Raises DataError where the trainings held
    back no image in common.
    """
    once = {(r.get("images"), r.get("seed"), r.get("digest")): r for r in records}.values()
    told = [r for r in once if "images" in r]
    found = [(r, held) for r in told if (held := held_back_by(images, r)) is not None]
    if len(told) < len(once):
        note(
            f"{model} was imported, and what it was trained on before is not known: "
            "should that be what it is judged by now, it is judged too well"
        )
    if len(found) < len(told):
        note(
            f"{model} was {'also ' if found else ''}trained on other images than {where}, or on these in another "
            "order; should it have seen some of those that it is judged by now, it is judged too well"
        )
    if any("digest" not in r for r, _ in found):
        note(
            f"{model} says how many images it was trained on, but not which: {where} is taken for them by number"
        )
    if not found:
        return hold_out(images, share, seed)
    held = reduce(np.intersect1d, [h for _, h in found])
    if not len(held):
        raise DataError(
            f"{model}: its trainings held back different images of {where}, and none in common: "
            "there is nothing to judge it by"
        )
    if len(held) < min(len(h) for _, h in found):
        note(
            f"{model}: its trainings held back different images of {where}; judged by the {len(held)} in common"
        )
    return images.subset(np.setdiff1d(np.arange(len(images)), held)), images.subset(held)
