"""Image sets on disk or on the hub, decoded once into arrays of the network's own size."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entry.config import ImageSpec
from entry.images import ImageError, Limits, load_image
from prg.training.progress import track

LIMITS = Limits(max_bytes=1 << 30, max_pixels=500_000_000)
"""A user's own files are trusted further than strangers' uploads."""


class DataError(ValueError):
    """Images that can't be trained on; the message names the source and the fix."""


@dataclass(frozen=True)
class Images:
    """A split: pixels uint8 [N, 3, S, S] (may be memory-mapped), labels int64 [N] or None, class names."""

    pixels: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, index: np.ndarray) -> "Images":
        """The images at `index`, copied into memory."""
        return Images(self.pixels[index], None if self.labels is None else self.labels[index], self.classes)


@dataclass(frozen=True)
class Source:
    """One split before decoding: (name, encoded bytes, label) rows and what identifies them."""

    rows: Callable[[], Iterator[tuple[str, bytes, int]]]
    count: int
    classes: tuple[str, ...]
    fingerprint: str


def splits(source: str) -> dict[str, Source]:
    """The splits of a source, by name. Raises DataError where there is nothing to read."""
    folder = Path(source)
    if folder.is_dir():
        parquet = sorted(folder.rglob("*.parquet"))
        try:
            found = _parquet_splits(parquet) if parquet else _image_folder(folder)
        except pa.ArrowException as error:
            raise DataError(f"{source}: not readable as parquet ({error})") from None
    elif folder.is_absolute() or source.startswith((".", "~")) or folder.exists():
        raise DataError(f"{source}: no such folder")
    else:
        found = _hub(source)
    if not found:
        raise DataError(f"{source}: no images found; expected sub-folders of images, or parquet files")
    return found


def load_split(source: Source, spec: ImageSpec, cache: Path) -> Images:
    """Decode a split by the service's own preprocessing, or read what an earlier call left in `cache`.

    Raises DataError that lists files which are no images.
    """
    key = hashlib.sha256(f"{source.fingerprint}|{spec.model_dump_json()}".encode()).hexdigest()[:16]
    pixels_path, labels_path = cache / f"{key}-pixels.npy", cache / f"{key}-labels.npy"
    if not labels_path.exists():  # written last, so its presence says that both are whole
        cache.mkdir(parents=True, exist_ok=True)
        _decode(source, spec, pixels_path, labels_path)
    pixels = np.load(pixels_path, mmap_mode="r" if pixels_path.stat().st_size > 4 << 30 else None)
    labels = np.load(labels_path)
    return Images(pixels, labels if source.classes else None, source.classes)


def hold_out(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Split off a validation part, the same for the same seed: (training, validation)."""
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(images))
    held = round(len(images) * share)
    if held < 1 or held >= len(images):
        raise DataError(f"data.validation = {share} of {len(images)} images leaves a part empty")
    return images.subset(np.sort(order[held:])), images.subset(np.sort(order[:held]))


def same_classes(images: Images, trained: tuple[str, ...], where: str) -> Images:
    """The images with their labels numbered as in training.

    Raises DataError for images without labels, or of a class that training never saw.
    """
    if images.labels is None:
        raise DataError(f"{where}: no labels")
    if len(images.classes) == len(trained) and all(name.isdecimal() for name in images.classes):
        return Images(images.pixels, images.labels, trained)  # data that numbers its classes, but names none
    unknown = [c for c in images.classes if c not in trained]
    if unknown:
        raise DataError(f"{where}: classes that training never saw: {', '.join(unknown)}")
    number = np.array([trained.index(c) for c in images.classes])
    return Images(images.pixels, number[images.labels], trained)


def _decode(source: Source, spec: ImageSpec, pixels_path: Path, labels_path: Path) -> None:
    def one(row: tuple[str, bytes, int]) -> tuple[np.ndarray | ImageError, str, int]:
        try:
            return load_image(row[1], spec, LIMITS), row[0], row[2]
        except ImageError as error:
            return error, row[0], row[2]

    temporary = pixels_path.with_name(pixels_path.name + ".tmp")
    pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (source.count, 3, spec.size, spec.size))
    labels = np.zeros(source.count, np.int64)
    bad: list[str] = []
    rows = source.rows()
    with ThreadPoolExecutor() as pool, track("decoding images", source.count) as bar:
        done = 0
        while batch := list(islice(rows, 512)):
            for result, name, label in pool.map(one, batch):
                if isinstance(result, ImageError):
                    bad.append(f"{name}: {result}")
                else:
                    pixels[done], labels[done] = result, label
                done += 1
            bar.advance(len(batch))
    if bad:
        temporary.unlink()
        shown = "\n  ".join(bad[:10]) + (f"\n  … and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise DataError(f"{len(bad)} of {source.count} files are no usable images; remove them:\n  {shown}")
    pixels.flush()
    del pixels
    os.replace(temporary, pixels_path)
    with labels_path.with_suffix(".tmp").open("wb") as file:
        np.save(file, labels)
    os.replace(labels_path.with_suffix(".tmp"), labels_path)


def _parquet_splits(files: list[Path]) -> dict[str, Source]:
    """Parquet as Hugging Face `datasets` writes it: columns image {bytes, path} and label, names in the schema."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(file)
    return {name: _parquet(parts) for name, parts in groups.items()}


def _parquet(files: list[Path]) -> Source:
    schema = pq.read_schema(files[0])
    if "image" not in schema.names:
        raise DataError(f"{files[0]}: no column 'image' (columns: {', '.join(schema.names)})")
    facts = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    label = facts.get("info", {}).get("features", {}).get("label", {})
    labelled = "label" in schema.names

    def rows() -> Iterator[tuple[str, bytes, int]]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(512):
                images = batch.column("image").to_pylist()
                labels = batch.column("label").to_pylist() if labelled else [0] * len(images)
                for i, (image, y) in enumerate(zip(images, labels, strict=True)):
                    yield image.get("path") or f"{file.name}, row {i}", image["bytes"], y

    classes = tuple(label.get("names", ()))
    if labelled and not classes:
        ids = {y for file in files for y in pq.read_table(file, columns=["label"])["label"].to_pylist()}
        classes = tuple(str(i) for i in range(max(ids) + 1))
    count = sum(pq.ParquetFile(f).metadata.num_rows for f in files)
    marks = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return Source(rows, count, classes, json.dumps(marks))


def _image_folder(folder: Path) -> dict[str, Source]:
    import datasets

    datasets.disable_progress_bars()  # it only lists the files; decoding has a bar of its own
    try:
        found = datasets.load_dataset("imagefolder", data_dir=str(folder))
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(f"{folder}: {error}") from None
    return {str(name): _dataset(split) for name, split in found.items()}


def _hub(name: str) -> dict[str, Source]:
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises whatever its transport does
        raise DataError(
            f"{name}: neither a folder here nor a dataset that the hub gives ({error}); "
            "name the folder with --data"
        ) from None
    return {str(split): _dataset(data) for split, data in found.items()}


def _dataset(data: Any) -> Source:
    """One split of a `datasets` dataset, its images left encoded."""
    import datasets

    column = next((k for k, f in data.features.items() if isinstance(f, datasets.Image)), None)
    if column is None:
        raise DataError(f"no column of images among {', '.join(data.features)}")
    label = next((k for k, f in data.features.items() if isinstance(f, datasets.ClassLabel)), None)
    raw = data.cast_column(column, datasets.Image(decode=False))

    def rows() -> Iterator[tuple[str, bytes, int]]:
        for i, row in enumerate(raw):
            image = row[column]
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            yield image["path"] or f"row {i}", content, row[label] if label else 0

    classes = tuple(data.features[label].names) if label else ()
    return Source(rows, len(data), classes, data._fingerprint)
