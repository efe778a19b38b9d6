"""Folders of images as splits: a sub-folder is a class, or a split whose sub-folders are classes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from prg.errors import DataError
from prg.images.source import SPLITS, Row, Source, composed, standard_name
from prg.images.walk import image_files, listed, other_files


def folder_splits(folder: Path) -> dict[str, Source]:
    """train/, validation/ and test/, or all as train. Only folders directly in `folder` are splits."""
    folders, files = listed(folder)
    named = {p: standard_name(p.name) for p in folders if standard_name(p.name) in SPLITS}
    if not named:
        return {"train": _images_in(folder)}
    beside = [p for p in [*folders, *files] if p not in named and next(image_files(p), None)]
    if beside:
        raise DataError(
            f"{folder}: {next(iter(named)).name} is the name of a split, but there are images in {beside[0].name} "
            "beside it; put all images into folders of splits, or give that class another name"
        )
    found: dict[str, Source] = {}
    for path, name in named.items():
        if name in found:
            raise DataError(f"{folder}: several folders are its {name} split; leave one of them")
        found[name] = _images_in(path)
    return found


def marks(files: list[Path]) -> str:
    """A digest that changes when one of the files does."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(os.fsencode(os.path.abspath(file)) + f"|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _images_in(folder: Path) -> Source:
    """One split: a class is a folder in it, with all that lies below; images beside those make all unlabelled.

    Raises DataError where the splits lie below the classes: test images would be trained on.
    """
    files = list(image_files(folder))
    names = [file.relative_to(folder).parts for file in files]
    loose = [parts[0] for parts in names if len(parts) == 1]
    if names and all(len(parts) > 2 and standard_name(parts[1]) in SPLITS for parts in names):
        name, split = names[0][:2]
        raise DataError(
            f"{folder}: splits lie below the classes, as {name}/{split}; if {name} is a class, put it below, as "
            f"{split}/{name}; else name {folder / name} itself"
        )
    why = f"{len(loose)} of its images, such as {loose[0]}, are in no sub-folder" if loose else ""
    classes = () if loose else tuple(sorted({composed(parts[0]) for parts in names}))
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(composed(parts[0]), 0) for parts in names]

    def rows(start: int = 0, stop: int | None = None) -> Iterator[Row]:
        for file, label in zip(files[start:stop], labels[start:stop], strict=True):
            yield str(file), file.read_bytes(), label

    return Source(
        rows=rows,
        count=len(files),
        classes=classes,
        fingerprint=marks(files),
        labels=lambda: set(labels),
        why_unlabelled=why if len(loose) < len(files) else "",
        skipped=lambda: other_files(folder),
    )
