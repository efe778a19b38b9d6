"""The splits of a source of images, by name: of a folder of images, of parquet files, or of a dataset on the hub."""

from dataclasses import replace
from pathlib import Path

from prg.console import note
from prg.errors import DataError
from prg.images.folders import folder_splits
from prg.images.source import Source, composed, standard_name
from prg.images.walk import SUFFIXES, all_files


def splits(source: str, image_column: str = "", label_column: str = "") -> dict[str, Source]:
    """The splits of a source, by name.

    image_column, label_column: of parquet, which columns are read; empty: as the files say.
    Raises DataError where there is nothing to read, or it is not clear which column.
    """
    columns = image_column, label_column
    folder = Path(source)
    if folder.is_dir():
        parquet = [file for file in all_files(folder) if file.suffix == ".parquet"]
        if parquet:
            from prg.images.parquet import parquet_splits  # only here: pyarrow is an extra

            found = parquet_splits(parquet, folder, *columns)
        else:
            if any(columns):
                note(
                    f"{source}: a folder of images, so {' and '.join(filter(None, columns))} is no column of it"
                )
            found = folder_splits(folder)
    elif folder.is_absolute() or source.startswith((".", "~")) or source.endswith("/") or folder.exists():
        raise DataError(f"{source}: no such folder")
    else:
        from prg.images.parquet import hub_splits

        found = hub_splits(source, *columns)
    if not any(split.count for split in found.values()):
        raise DataError(
            f"{source}: no images found; expected sub-folders of images ({', '.join(SUFFIXES)}), or parquet files"
        )
    if empty := [name for name, split in found.items() if not split.count]:
        note(f"{source}: no images in the split {', '.join(empty)}, which is left out")
    return {name: split for name, split in found.items() if split.count}


def choose_split(found: dict[str, Source], wanted: str, source: str) -> str:
    """The split of that name, or of another name for it. Raises DataError where there is none."""
    same = [name for name in found if standard_name(name) == standard_name(wanted)]
    if not same:
        raise DataError(f"{source}: no split {wanted!r} (there are: {', '.join(found)}); name one of them")
    return wanted if wanted in found else same[0]


def choose_evaluated(found: dict[str, Source], wanted: str, source: str, train: str) -> str:
    """The split to evaluate on: `wanted` if named, else test, else validation, else `train`. Raises DataError.

    A split without labels, such as a competition's, is skipped unless it is named.
    """
    if wanted:
        return choose_split(found, wanted, source)
    labelled = [name for name, split in found.items() if split.classes and name != train]
    evaluated = (name for one in ("test", "validation") for name in labelled if standard_name(name) == one)
    return next(evaluated, None) or choose_split(found, train, source)


def rename_classes(
    found: dict[str, Source], train: str, labels: tuple[str, ...], source: str
) -> dict[str, Source]:
    """The splits under other class names, given in the order of the training split's classes. Raises DataError.

    Where there is no such split, as in images to evaluate on, those of the first one that has classes.
    """
    named = [split for name, split in found.items() if standard_name(name) == standard_name(train)]
    own = next((split.classes for split in named or found.values() if split.classes), ())
    if not labels or (own and {composed(name) for name in own} <= {composed(name) for name in labels}):
        return found
    if len(labels) != len(own):
        raise DataError(f"data.labels has {len(labels)} names, but {source} has {len(own)} classes")
    names = dict(zip(own, labels, strict=True))
    return {k: replace(v, classes=tuple(names.get(c, c) for c in v.classes)) for k, v in found.items()}
