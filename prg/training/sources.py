"""Where images come from, before decoding: folders of images, parquet files, and the hub, as splits by name."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Of files in a folder that are taken for images."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of a split's folder, files or name on the hub."""

Row = tuple[str, bytes, int]
"""(name, encoded bytes, label)."""


class DataError(ValueError):
    """Images that can't be trained on; the message names the source and the fix."""


@dataclass(frozen=True)
class Source:
    """One split before decoding: its rows and what identifies them."""

    rows: Callable[[], Iterator[Row]]
    count: int
    classes: tuple[str, ...]
    """Names by label; empty where the images have no labels."""
    fingerprint: str
    labels: Callable[[], set[int]]
    """The labels that occur; no image is read for it."""
    why_unlabelled: str = ""
    """What would have to change for its folders to be classes; empty where there are none."""
    passed_over: Callable[[], str] = str
    """Which files are taken for no images, by their endings, and which folders have nothing else."""


def splits(source: str) -> dict[str, Source]:
    """The splits of a source, by name. Raises DataError where there is nothing to read."""
    folder = Path(source)
    if folder.is_dir():
        refuse_linked_folders(folder)
        parquet = sorted(p for p in folder.rglob("*.parquet") if not _hidden(p.relative_to(folder)))
        try:
            found = _parquet_splits(parquet, folder) if parquet else _image_folder(folder)
        except pa.ArrowException as error:
            raise DataError(f"{source}: not readable as parquet ({error})") from None
    elif folder.is_absolute() or source.startswith((".", "~")) or source.endswith("/") or folder.exists():
        raise DataError(f"{source}: no such folder")
    else:
        found = _hub(source)
    found = {name: split for name, split in found.items() if split.count}
    if not found:
        raise DataError(
            f"{source}: no images found; expected sub-folders of images ({', '.join(SUFFIXES)}), or parquet files"
        )
    return found


def refuse_linked_folders(folder: Path) -> None:
    """Raises DataError where a folder in it is a link: what is listed here would lack its images."""
    for parent, folders, _ in os.walk(folder):
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                raise DataError(
                    f"{path}: a link to {path.resolve()}, and folders that are links are not followed; "
                    "put the folder itself there (a bind mount does)"
                )


def split_named(name: str) -> str:
    """The one name of a split that has several: val is validation."""
    return next((one for one, names in SPLITS.items() if name.lower() in names), name)


def _image_folder(folder: Path) -> dict[str, Source]:
    """train/, validation/ and test/, or all as train. Only folders directly in `folder` are splits."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir())
    named = {p: split_named(p.name) for p in inside if split_named(p.name) in SPLITS}
    if not named:
        return {"train": _images_in(folder)}
    others = [p for p in sorted(folder.iterdir()) if p not in named and not p.name.startswith(".")]
    beside = [p for p in others if next(_images(p), None)]
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


def _images_in(folder: Path) -> Source:
    """One split: a class is a folder in it, with all that lies below; images beside those make all unlabelled.

    Raises DataError where the splits lie below the classes: what is to be judged by would be trained on.
    """
    files = sorted(_images(folder))
    names = [file.relative_to(folder).parts for file in files]
    loose = [parts[0] for parts in names if len(parts) == 1]
    labelled = not loose
    if names and all(len(parts) > 2 and split_named(parts[1]) in SPLITS for parts in names):
        name, split = names[0][:2]
        raise DataError(
            f"{folder}: splits lie below the classes, as {name}/{split}; if {name} is a class, put it below, as "
            f"{split}/{name}; else name {folder / name} itself"
        )
    beside = f"{len(loose)} of its images, such as {loose[0]}, are in no sub-folder" if loose else ""
    classes = tuple(sorted({parts[0] for parts in names})) if labelled else ()
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[parts[0]] if labelled else 0 for parts in names]

    def rows() -> Iterator[Row]:
        for file, label in zip(files, labels, strict=True):
            yield str(file), file.read_bytes(), label

    why = beside if len(loose) < len(files) else ""
    return Source(
        rows, len(files), classes, _marks(files), lambda: set(labels), why, lambda: passed_over(folder)
    )


def passed_over(folder: Path) -> str:
    """The files in a folder, at all levels, that are taken for no images: by their endings, with their number.

    Then the folders directly in it that hold nothing else, as a class of another format; empty where there are none.
    """
    endings: Counter[str] = Counter()
    for file in _files(folder):
        if file.suffix.lower() not in SUFFIXES:
            endings[file.suffix.lower() or "none"] += 1
    if not endings:
        return ""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    told = ", ".join(f"{ending} ({count})" for ending, count in ordered[:5])
    inside = (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))
    bare = [p.name for p in inside if next(_files(p), None) and not next(_images(p), None)]
    nothing = f"; no images at all in {', '.join(bare[:10])}" if bare else ""
    return f"{endings.total()} files in {folder} are taken for no images, by their ending: {told}{nothing}"


def _images(path: Path) -> Iterator[Path]:
    """The image files in a folder, at all levels; or the file itself, if it is one. Nothing hidden in it (.name)."""
    return (file for file in _files(path) if file.suffix.lower() in SUFFIXES)


def _files(path: Path) -> Iterator[Path]:
    """The same of files with any ending."""
    if path.is_file():
        yield path
    for parent, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _marks(files: list[Path]) -> str:
    """What changes when a file does."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(os.fsencode(os.path.abspath(file)) + f"|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _parquet_splits(files: list[Path], folder: Path) -> dict[str, Source]:
    """Parquet as Hugging Face `datasets` writes it: SPLIT-00000-of-00001.parquet, SPLIT.parquet, SPLIT/0000.parquet.

    Raises DataError where a split lies in several folders, as several configurations of a dataset do, or in
    images too.
    """
    for path in folder.iterdir():
        if path.is_dir() and split_named(path.name) in SPLITS and (image := next(_images(path), None)):
            raise DataError(
                f"{folder}: images, such as {image.relative_to(folder)}, beside parquet, such as "
                f"{files[0].relative_to(folder)}; put one of the two elsewhere"
            )
    groups: dict[str, list[Path]] = {}
    for file in files:
        name, parent = file.name.split("-")[0].removesuffix(".parquet"), file.parent
        if split_named(name) not in SPLITS and split_named(parent.name) in SPLITS and parent != folder:
            name = parent.name
        groups.setdefault(name, []).append(file)
    for name, parts in groups.items():
        places = sorted({str(part.parent) for part in parts})
        if len(places) > 1:
            raise DataError(
                f"{folder}: parquet of the split {name!r} lies in {' and in '.join(places)}; "
                "name one of these, or the folder above it, with --data"
            )
    return {name: _parquet(parts) for name, parts in groups.items()}


def _parquet(files: list[Path]) -> Source:
    """Columns of images {bytes, path}, and of labels, whose names are in the schema."""
    schema = pq.read_schema(files[0])
    features = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    )
    column = next((f.name for f in schema if _holds_images(f.type)), None)
    if column is None:
        raise DataError(f"{files[0]}: no column of images (columns: {', '.join(schema.names)})")
    named = [k for k, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    label = next((k for k in [*named, "label"] if k in schema.names), None)
    labels: dict[Any, int] = {}
    classes: tuple[str, ...] = ()
    if label is not None:
        found = {
            y for file in files for y in pq.read_table(file, columns=[label])[label].unique().to_pylist()
        }
        classes, labels = _numbered(
            found, features.get(label, {}).get("names"), f"{files[0]}: column {label!r}"
        )

    def rows() -> Iterator[Row]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(512):
                images = batch.column(column).to_pylist()
                numbers = batch.column(label).to_pylist() if classes else [None] * len(images)
                for i, (image, y) in enumerate(zip(images, numbers, strict=True)):
                    path, content = _image(image)
                    yield path or f"{file.name}, row {i}", content, labels[y] if classes else 0

    count = sum(pq.ParquetFile(f).metadata.num_rows for f in files)
    return Source(rows, count, classes, _marks(files), lambda: set(labels.values()))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image(cell: Any) -> tuple[str | None, bytes]:
    """(path, bytes) of a cell; nothing, which is no image, where it is empty."""
    if isinstance(cell, bytes):
        return None, cell
    return (cell or {}).get("path"), (cell or {}).get("bytes") or b""


def _numbered(
    found: Iterable[Any], names: Iterable[str] | None, where: str
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """(class names, the number of each label) for the labels that occur; no classes where none is known.

    Labels that are hidden are -1 on the hub, or empty. Raises DataError where only some are.
    """
    found = set(found)
    hidden = {y for y in found if y is None or (isinstance(y, int) and y < 0)}
    if hidden == found:
        return (), {}
    if hidden:
        raise DataError(f"{where}: some images have no label ({hidden.pop()}); give all of them one, or none")
    if all(isinstance(y, str) for y in found):
        return tuple(sorted(found)), {y: i for i, y in enumerate(sorted(found))}
    if not all(isinstance(y, int) for y in found):
        raise DataError(f"{where}: labels such as {found.pop()!r}; whole numbers or names are needed")
    classes = tuple(names or (str(i) for i in range(max(found) + 1)))
    if max(found) >= len(classes):
        raise DataError(f"{where}: a label {max(found)}, but there are {len(classes)} names of classes")
    return classes, {y: y for y in found}


def _hub(name: str) -> dict[str, Source]:
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises whatever its transport does
        raise DataError(
            f"{name}: neither a folder here nor a dataset that the hub gives ({error}); "
            "name the folder with --data"
        ) from None
    return {str(split): _dataset(data, f"{name}: {split}") for split, data in found.items()}


def _dataset(data: Any, where: str) -> Source:
    """One split of a `datasets` dataset, its images left encoded."""
    import datasets

    column = next((k for k, f in data.features.items() if isinstance(f, datasets.Image)), None)
    if column is None:
        raise DataError(f"{where}: no column of images among {', '.join(data.features)}")
    label = next((k for k, f in data.features.items() if isinstance(f, datasets.ClassLabel)), None)
    raw = data.cast_column(column, datasets.Image(decode=False))
    labels: dict[Any, int] = {}
    classes: tuple[str, ...] = ()
    if label is not None:
        classes, labels = _numbered(
            data.unique(label), data.features[label].names, f"{where}, column {label!r}"
        )

    def rows() -> Iterator[Row]:
        for i, row in enumerate(raw):
            path, content = _image(row[column])
            if path and not content:
                content = Path(path).read_bytes()
            yield path or f"row {i}", content, labels[row[label]] if classes else 0

    return Source(rows, len(data), classes, data._fingerprint, lambda: set(labels.values()))
