"""Parquet files, and datasets of the Hugging Face hub, as splits: which columns they are read from, cell by cell."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prg.console import note
from prg.errors import DataError
from prg.images.folders import marks
from prg.images.source import SPLITS, Row, Source, composed, standard_name
from prg.images.walk import image_files, listed

ROWS = 512
"""Of a batch."""
LABELS = ("label", "labels", "class", "category", "target", "y", "fine_label", "coarse_label")
"""Names of a column of labels, in any case, where no metadata of `datasets` says which it is."""
MOST_CLASSES = 100_000
"""Numbers beyond are no labels, but something else under a label's name."""


def parquet_splits(files: list[Path], folder: Path, image: str = "", label: str = "") -> dict[str, Source]:
    """Parquet as `datasets` writes it: SPLIT-00000-of-00001.parquet, SPLIT.parquet, SPLIT/0000.parquet.

    image, label: the columns to read, where the files don't say.
    Raises DataError where a split lies in several folders, as several configurations of a dataset do, or in
    images too, where a file is not readable, and where it is not clear which columns to read.
    """
    for path in listed(folder)[0]:
        if standard_name(path.name) in SPLITS and (found := next(image_files(path), None)):
            raise DataError(
                f"{folder}: images, such as {found.relative_to(folder)}, beside parquet, such as "
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
        tables = {name: [_file(part) for part in parts] for name, parts in groups.items()}
        return _splits(tables, str(folder), image, label)
    except pa.ArrowException as error:
        raise DataError(f"{folder}: not readable as parquet ({error})") from None


def hub_splits(name: str, image: str = "", label: str = "") -> dict[str, Source]:
    """A dataset of the hub. Raises DataError where there is none of that name."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises whatever its transport does
        raise DataError(
            f"{name}: neither a folder here nor a dataset that the hub gives ({error}); "
            "name the folder with --data"
        ) from None
    tables = {str(split): [_dataset(data, f"{name}: {split}")] for split, data in found.items()}
    return _splits(tables, name, image, label)


def image_column(schema: pa.Schema, wanted: str, where: str) -> str:
    """The column of images: `wanted`, else what the metadata of `datasets` calls one, else the only one that may be.

    Such as are structs with a field `bytes` or, where there are none, binary. `where` names the file in errors.
    Raises DataError where there is none, or several.
    """
    there = ", ".join(schema.names)
    if wanted:
        if wanted not in schema.names:
            raise DataError(
                f"{where}: no column {wanted!r}; name the one of images with --image-column: {there}"
            )
        if not _is_struct(schema.field(wanted).type) and not _is_binary(schema.field(wanted).type):
            kind = schema.field(wanted).type
            raise DataError(
                f"{where}: the column {wanted!r} is of {kind}, and images are bytes; columns: {there}"
            )
        return wanted
    found = (
        [name for name, kind in _features(schema).items() if kind.get("_type") == "Image"]
        or [field.name for field in schema if _is_struct(field.type)]
        or [field.name for field in schema if _is_binary(field.type)]
    )
    if not found:
        raise DataError(f"{where}: no column of images (columns: {there})")
    if len(found) > 1:
        raise DataError(
            f"{where}: several columns may be the images: {', '.join(found)}; name one with --image-column"
        )
    return found[0]


def label_column(schema: pa.Schema, wanted: str, where: str) -> str:
    """The column of labels as `image_column` finds that of images; empty where there is none.

    Without metadata it is known by its name, and holds whole numbers or strings. Raises DataError for several.
    """
    if wanted:
        return wanted if wanted in schema.names else ""
    found = [name for name, kind in _features(schema).items() if kind.get("_type") == "ClassLabel"] or [
        field.name for field in schema if field.name.lower() in LABELS and _names_classes(field.type)
    ]
    if len(found) > 1:
        raise DataError(
            f"{where}: several columns may be the labels: {', '.join(found)}; name one with --label-column"
        )
    return found[0] if found else ""


def cell_bytes(cell: Any, folder: Path | None, where: str) -> bytes:
    """The encoded image of a cell: its bytes, else those of the file that it names; none where it is empty.

    folder: that of the parquet, where a relative path begins; None: files are not looked for.
    where: file, row and column, for errors. Raises DataError where the file can't be read.
    """
    if not isinstance(cell, dict):
        return cell or b""
    content, path = cell.get("bytes"), cell.get("path")
    if content or not path:
        return content or b""
    if folder is None:
        raise DataError(f"{where}: holds no bytes, but the path {path}; write the images into the column")
    try:
        return (folder / path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{where}: holds no bytes, but the path {folder / path}, which can't be read "
            f"({getattr(error, 'strerror', None) or error}); put the file there, or write the images into the column"
        ) from None


@dataclass(frozen=True)
class Table:
    """Rows of images and labels: of one parquet file, or of a split of the hub."""

    where: str
    folder: Path
    """Where relative paths in its cells begin."""
    schema: pa.Schema
    batches: Callable[[list[str]], Iterable[pa.RecordBatch]]
    """Of these columns."""
    count: int
    fingerprint: str


def _file(file: Path) -> Table:
    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for column in columns:
            if column not in schema.names:
                raise DataError(f"{file}: no column {column!r}, which other files of its split have")
        try:
            yield from pq.ParquetFile(file).iter_batches(ROWS, columns=columns)
        except pa.ArrowException as error:
            raise DataError(f"{file}: not readable as parquet ({error})") from None

    schema = pq.read_schema(file)
    return Table(str(file), file.parent, schema, batches, pq.read_metadata(file).num_rows, marks([file]))


def _dataset(data: Any, where: str) -> Table:
    def batches(columns: list[str]) -> Iterable[pa.RecordBatch]:
        found: list[pa.RecordBatch] = data.data.select(columns).to_batches(ROWS)
        return found

    return Table(where, Path(), data.data.schema, batches, len(data), data._fingerprint)


def _splits(tables: dict[str, list[Table]], source: str, image: str, label: str) -> dict[str, Source]:
    """Each split from its tables; says which columns it reads. Raises DataError."""
    if label and not any(label in parts[0].schema.names for parts in tables.values()):
        there = ", ".join(dict.fromkeys(name for parts in tables.values() for name in parts[0].schema.names))
        raise DataError(f"{source}: no column {label!r}; name the one of labels with --label-column: {there}")
    read: dict[tuple[str, str], list[str]] = {}
    found: dict[str, Source] = {}
    for name, parts in tables.items():
        schema, where = parts[0].schema, parts[0].where
        columns = image_column(schema, image, where), label_column(schema, label, where)
        read.setdefault(columns, []).append(name)
        found[name] = _split(parts, *columns)
    for (images, labels), names in read.items():
        what = f"labels from {labels!r}" if labels else "no column of labels"
        note(f"{source}: {', '.join(names)}: images from the column {images!r}, {what}")
    return found


def _split(parts: list[Table], column: str, label: str) -> Source:
    """One split, its classes named in the schema or by the labels themselves. Raises DataError."""
    numbers: dict[Any, int] = {}
    classes: tuple[str, ...] = ()
    schema = parts[0].schema
    why = f"no column of labels is known; name it with --label-column, of {', '.join(schema.names)}"
    if label:
        found = {y for t in parts for batch in t.batches([label]) for y in batch[label].unique().to_pylist()}
        names = _features(schema).get(label, {}).get("names")
        classes, numbers = _numbered(found, names, f"{parts[0].where}: column {label!r}")
        why = f"the labels in the column {label!r} are hidden"

    def rows(start: int = 0, stop: int | None = None) -> Iterator[Row]:
        columns = [column, label] if classes else [column]
        before = 0
        for table in parts:
            first = max(0, start - before)
            last = table.count if stop is None else min(table.count, stop - before)
            before += table.count
            if first < last:
                yield from rows_of(table, columns, first, last)

    def rows_of(table: Table, columns: list[str], first: int, last: int) -> Iterator[Row]:
        number = 0
        for whole in table.batches(columns):
            batch = whole.slice(max(0, first - number), max(0, last - max(first, number)))
            place_of_first = max(first, number)
            number += len(whole)
            labels = batch[label].to_pylist() if classes else [None] * len(batch)
            cells = zip(batch[column].to_pylist(), labels, strict=True)
            for row, (cell, y) in enumerate(cells, place_of_first):
                place = f"{table.where}, row {row}"
                content = cell_bytes(cell, table.folder, f"{place}, column {column!r}")
                path = cell.get("path") if isinstance(cell, dict) else None
                yield path or place, content, numbers[y] if classes else 0
            if number >= last:
                return

    count = sum(table.count for table in parts)
    fingerprint = "|".join([*(table.fingerprint for table in parts), column, label])
    why = "" if classes else why
    return Source(rows, count, classes, fingerprint, lambda: set(numbers.values()), why)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote of the columns that are there."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features") or {}
    return {k: f for k, f in features.items() if isinstance(f, dict) and k in schema.names}


def _is_struct(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _names_classes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


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
        number = {name: i for i, name in enumerate(sorted({composed(y) for y in found}))}
        return tuple(number), {y: number[composed(y)] for y in found}
    if not all(isinstance(y, int) for y in found):
        raise DataError(f"{where}: labels such as {found.pop()!r}; whole numbers or names are needed")
    if not names and max(found) >= MOST_CLASSES:
        raise DataError(f"{where}: a label {max(found)}; classes are numbered from 0 on, or named")
    spelt = [composed(name) for name in names or map(str, range(max(found) + 1))]
    if max(found) >= len(spelt):
        raise DataError(f"{where}: a label {max(found)}, but there are {len(spelt)} names of classes")
    number = {name: i for i, name in enumerate(dict.fromkeys(spelt))}
    return tuple(number), {y: number[spelt[y]] for y in found}
