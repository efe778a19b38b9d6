"""An entry as a new entry: the same network and head, the embedding fitted to images that are named."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from entry.config import Prg
from prg.console import note
from prg.errors import DataError, ExportError, FittingError
from prg.export import BY_CLASS, DTYPES, LEVELS, Export, Precision, export, relative_difference
from prg.extractor import Extractor
from prg.images.decoded import load_split
from prg.images.held_out import hold_out
from prg.images.sets import Images, same_classes
from prg.images.source import standard_name
from prg.images.splits import choose_split, splits
from prg.recipe import Data
from prg.reopen import Reopened, reopen
from prg.training.fitted import fit

SAME = 1e-5
"""Largest relative difference of logits."""


def reexport(
    old: Path,
    new: Path,
    data: Data,
    precision: Precision | None,
    compact: bool,
    keep: int | None = None,
    pt2: bool = False,
) -> str:
    """Write the highest version of the entry `old` as the next one of `new`; returns the version.

    data: images whose training split the embedding is fitted to, best those that the model was trained on. With a
    head they must be labelled with its classes; it is calibrated on the share that was held out of its training or,
    where that is not known, on a validation split, if there is one.
    Raises EntryError, DataError, FittingError, ExportError.
    """
    opened = reopen(old)
    prg, version = opened.entry.prg, opened.version
    encoder, head = opened.encoder, opened.head
    images, held_out = _images(data, prg)
    if head is not None and version.held_out:
        images, held_out = hold_out(images, version.held_out, "name the images that the model was trained on")
    levels = prg.classify_t_end or (prg.t_end,)
    try:
        fitted = fit(encoder, prg.image, prg.t_end, images, head, levels[0], held_out)
    except FittingError as error:
        raise FittingError(f"{data.source}: {error}") from None
    extractor = Extractor(encoder, prg.image, fitted.projection, head)
    if head is not None and fitted.calibration is None:
        note(
            "no calibration: the entry held no images out, and there is no validation split; /classify has no `known`"
        )
    encoder.net.to(DTYPES[prg.precision])
    _prove_same_logits(opened, extractor)
    assert fitted.on is not None
    kept = {k: v for k, v in version.training.items() if k != BY_CLASS}  # of accuracies that go with it
    about = {"fitted_on": fitted.on.model_dump(mode="json")}
    described = Export(
        image=prg.image,
        t_end=prg.t_end,
        feature=prg.feature if prg.features.embedding else "embedding",
        training=kept | about | ({"head_input": opened.head_input} if head else {}),
        held_out=version.held_out,
        labels=prg.labels,
        classify_t_end=prg.classify_t_end,
        calibration=fitted.calibration,
        precision=precision or prg.precision,
        compact=compact,
        keep=keep,
        pt2=pt2,
    )
    return export(extractor, described, new)


def _images(data: Data, prg: Prg) -> tuple[Images, Images | None]:
    """The training split and the validation split, their labels numbered as the head has them. Raises DataError."""
    source = data.source
    found = splits(source, data.image_column, data.label_column)

    def load(split: str) -> Images:
        with tempfile.TemporaryDirectory() as cache:
            images = load_split(found[split], prg.image, Path(cache))
        return images.unlabelled() if prg.labels is None else same_classes(images, prg.labels, source)

    def load_training(split: str) -> Images:
        images = load(split)
        seen = set() if images.labels is None else set(images.labels.tolist())
        if lacking := [name for i, name in enumerate(images.classes) if i not in seen]:
            raise DataError(
                f"{source}: no images of {', '.join(lacking)}, which the head knows; add some of each class"
            )
        return images

    train = choose_split(found, "train", source)
    others = [name for name in found if name != train and standard_name(name) == "validation"]
    return load_training(train), load(others[0]) if others else None


def _prove_same_logits(opened: Reopened, extractor: Extractor) -> None:
    """Raise ExportError where the new extractor has other logits than the entry's module."""
    if extractor.head is None:
        return
    place = list(opened.entry.outputs()).index("LOGITS")
    size = opened.entry.prg.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (len(LEVELS), 3, size, size), np.uint8)
    images, levels = torch.from_numpy(pixels), torch.tensor(LEVELS)[:, None]
    with torch.inference_mode():
        old = opened.module(images, levels)[place]
        new = extractor.eval()(images, levels)[-2]
    difference = relative_difference(new.float().numpy(), old.float().numpy())
    if not difference <= SAME:
        raise ExportError(f"the logits differ by {difference:.1e} from those of the entry it is made of")
