"""What was held back from every training behind a model: it is judged by nothing that one of them was given."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prg.training import processes
from prg.training.data import Images, hold_out
from prg.training.sources import DataError

Record = Mapping[str, Any]
"""Of one training: its kind, how many images it was given, of which share of them by which seed, and their digest."""


def behind(facts: Mapping[str, Any]) -> list[Record]:
    """Of every training behind a checkpoint of these facts, its own last; none of what was imported."""
    before: list[Record] = facts.get("init", {}).get("seen", [])
    settings = facts["settings"]
    if "imported" in settings:
        return before
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


def as_dealt(images: Images, record: Record) -> tuple[Images, Images] | None:
    """What that training was given of these images, and what was held back; None where it was given others.

    Without a digest in the record, as many images are taken for the same.
    """
    share = record.get("validation", 1 - record["images"] / len(images))
    held = round(len(images) * share)
    if held < 1 or len(images) - held != record["images"]:
        return None
    training, held_back = hold_out(images, share, record["seed"])
    if record.get("digest") not in (None, training.digests()["pixels"]):
        return None
    return training, held_back


def never_seen(
    images: Images, records: Sequence[Record], model: str, where: str
) -> tuple[Images, Images] | None:
    """(the others, those that no training behind the model was given), None where none was given any of these.

    What can't be known is told on stderr. Raises DataError where the trainings held back different images.
    """
    once = {(r["images"], r["seed"], r.get("digest")): r for r in records}
    found = [(r, dealt) for r in once.values() if (dealt := as_dealt(images, r))]
    if len({r["seed"] for r, _ in found}) > 1:
        raise DataError(
            f"{model}: its trainings held back different images of {where}, by the seeds "
            f"{' and '.join(str(r['seed']) for r, _ in found)}: name a split that none of them saw with --split"
        )
    if len(found) < len(once):
        note(
            f"{model} was {'also ' if found else ''}trained on other images than {where}, or on these in another "
            "order; should it have seen some of those that it is judged by now, it is judged too well"
        )
    if any("digest" not in r for r, _ in found):
        note(
            f"{model} says how many images it was trained on, but not which: {where} is taken for them by number"
        )
    # With one seed, a smaller share that is held back lies within a larger one.
    return max(found, key=lambda f: f[0]["images"])[1] if found else None


def note(text: str) -> None:
    """A line on stderr, from one process."""
    if processes.writes():
        print(f"note: {text}", file=sys.stderr)
