"""Parquet files, and datasets of the Hugging Face hub, as splits."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prg.errors import DataError
from prg.images.folders import marks
from prg.images.source import SPLITS, Row, Source, standard_name
from prg.images.walk import image_files

ROWS = 512
"""Of a batch."""


def parquet_splits(files: list[Path], folder: Path) -> dict[str, Source]:
    """Parquet as `datasets` writes it: SPLIT-00000-of-00001.parquet, SPLIT.parquet, SPLIT/0000.parquet.

    Raises DataError where a split lies in several folders, as several configurations of a dataset do, or in
    images too, and where a file is not readable.
    """
    for path in folder.iterdir():
        if path.is_dir() and standard_name(path.name) in SPLITS and (image := next(image_files(path), None)):
            raise DataError(
                f"{folder}: images, such as {image.relative_to(folder)}, beside parquet, such as "
                f"{files[0].relative_to(folder)}; put one of the two elsewhere"
            )
    groups: dict[str, list[Path]] = {}
    for file in files:
        name, parent = file.name.split("-")[0].removesuffix(".parquet"), file.parent
        if standard_name(name) not in SPLITS and standard_name(parent.name) in SPLITS and parent != folder:
            name = parent.name
        groups.setdefault(name, []).append(file)
    for name, parts in groups.items():
        places = sorted({str(part.parent) for part in parts})
        if len(places) > 1:
            raise DataError(
                f"{folder}: parquet of the split {name!r} lies in {' and in '.join(places)}; "
                "name one of these, or the folder above it, with --data"
            )
    try:
        return {name: _split(_files(parts)) for name, parts in groups.items()}
    except pa.ArrowException as error:
        raise DataError(f"{folder}: not readable as parquet ({error})") from None


def hub_splits(name: str) -> dict[str, Source]:
    """A dataset of the hub. Raises DataError where there is none of that name."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises whatever its transport does
        raise DataError(
            f"{name}: neither a folder here nor a dataset that the hub gives ({error}); "
            "name the folder with --data"
        ) from None
    return {str(split): _split(_dataset(data, f"{name}: {split}")) for split, data in found.items()}


@dataclass(frozen=True)
class Table:
    """Rows of images and labels, wherever they are."""

    where: str
    schema: pa.Schema
    batches: Callable[[list[str]], Iterable[pa.RecordBatch]]
    """Of these columns."""
    count: int
    fingerprint: str


def _files(files: list[Path]) -> Table:
    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            yield from pq.ParquetFile(file).iter_batches(ROWS, columns=columns)

    count = sum(pq.ParquetFile(f).metadata.num_rows for f in files)
    return Table(str(files[0]), pq.read_schema(files[0]), batches, count, marks(files))


def _dataset(data: Any, where: str) -> Table:
    def batches(columns: list[str]) -> Iterable[pa.RecordBatch]:
        found: list[pa.RecordBatch] = data.data.select(columns).to_batches(ROWS)
        return found

    return Table(where, data.data.schema, batches, len(data), data._fingerprint)


def _split(table: Table) -> Source:
    """Columns of images {bytes, path}, and of labels, whose names are in the schema. Raises DataError."""
    schema = table.schema
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {})
    column = next((f.name for f in schema if _holds_images(f.type)), None)
    if column is None:
        raise DataError(f"{table.where}: no column of images (columns: {', '.join(schema.names)})")
    named = [k for k, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    label = next((k for k in [*named, "label"] if k in schema.names), None)
    numbers: dict[Any, int] = {}
    classes: tuple[str, ...] = ()
    if label is not None:
        found = {y for batch in table.batches([label]) for y in batch.column(0).unique().to_pylist()}
        names = features.get(label, {}).get("names")
        classes, numbers = _numbered(found, names, f"{table.where}: column {label!r}")

    def rows() -> Iterator[Row]:
        number = 0
        for batch in table.batches([column, label] if classes and label else [column]):
            labels = batch.column(1).to_pylist() if classes else [None] * len(batch)
            for image, y in zip(batch.column(0).to_pylist(), labels, strict=True):
                path, content = _image(image)
                yield path or f"{table.where}, row {number}", content, numbers[y] if classes else 0
                number += 1

    return Source(rows, table.count, classes, table.fingerprint, lambda: set(numbers.values()))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image(cell: Any) -> tuple[str | None, bytes]:
    """(path, bytes) of a cell; of a file that it only names, its bytes; none, which is no image, where it is empty."""
    if isinstance(cell, bytes):
        return None, cell
    path, content = (cell or {}).get("path"), (cell or {}).get("bytes")
    return path, content or (Path(path).read_bytes() if path and Path(path).is_file() else b"")


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
