"""Image sets on disk or on the hub, decoded once into arrays of the network's own size."""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
    labels: Callable[[], set[int]]
    """The labels that occur; no image is read for it."""


def splits(source: str) -> dict[str, Source]:
    """The splits of a source, by name. Raises DataError where there is nothing to read."""
    folder = Path(source)
    if folder.is_dir():
        refuse_linked_folders(folder)
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


def refuse_linked_folders(folder: Path) -> None:
    """Raises DataError where a folder in it is a link: what is listed here would lack its images."""
    for parent, folders, _ in os.walk(folder):
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                raise DataError(
                    f"{path}: a link to {path.resolve()}, and folders that are links are not followed; "
                    "put the folder itself there (a bind mount does)"
                )


def load_split(
    source: Source, spec: ImageSpec, cache: Path, skip_unreadable: bool = False, enlarge: bool = True
) -> Images:
    """Decode a split by the service's own preprocessing, or read what an earlier call left in `cache`.

    skip_unreadable: leave files out that are no images, and say which. enlarge: take images that are smaller
    than the network's size (as serving does). Raises DataError that lists what is not taken.
    """
    kind = f"{source.fingerprint}|{spec.model_dump_json()}|{skip_unreadable}|{enlarge}"
    key = hashlib.sha256(kind.encode()).hexdigest()[:16]
    pixels_path, labels_path = cache / f"{key}-pixels.npy", cache / f"{key}-labels.npy"
    if not labels_path.exists():  # written last, so its presence says that both are whole
        cache.mkdir(parents=True, exist_ok=True)
        _decode(source, spec, pixels_path, labels_path, skip_unreadable, enlarge)
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


def check_classes_were_seen(training: Images, held_back: Images, splits: dict[str, Source]) -> None:
    """Raise DataError for a class that is only in images to be judged by: no head could ever name it.

    splits: those besides the training images, by name.
    """
    assert training.labels is not None
    assert held_back.labels is not None
    seen = {training.classes[i] for i in np.unique(training.labels)}
    lonely = {training.classes[i] for i in np.unique(held_back.labels)} - seen
    if lonely:
        raise DataError(
            f"classes {', '.join(sorted(lonely))}: so few images that all of them are held back; "
            "add images, or lower data.validation"
        )
    for name, source in splits.items():
        numbered = all(c.isdecimal() for c in source.classes) and len(source.classes) == len(training.classes)
        classes = training.classes if numbered else source.classes
        unseen = {classes[i] for i in source.labels()} - seen if classes else set()
        if unseen:
            raise DataError(
                f"split {name!r} has classes that training never saw: {', '.join(sorted(unseen))}; "
                "add images of them to the training split, or remove them"
            )


def _decode(
    source: Source, spec: ImageSpec, pixels_path: Path, labels_path: Path, skip: bool, enlarge: bool
) -> None:
    def one(row: tuple[str, bytes, int]) -> tuple[np.ndarray | ImageError, str, int]:
        try:
            pixels = load_image(row[1], spec, LIMITS)
            if not enlarge:
                _check_size(row[1], spec.size)
        except ImageError as error:
            return error, row[0], row[2]
        return pixels, row[0], row[2]

    temporary = pixels_path.with_name(pixels_path.name + ".tmp")
    labels: list[int] = []
    bad: list[str] = []
    small: list[str] = []
    rows = source.rows()
    try:
        # Written, not mapped: on a full disk a write is an error, but a mapped page is the process's end.
        with (
            temporary.open("wb") as file,
            ThreadPoolExecutor() as pool,
            track("decoding images", source.count) as bar,
        ):
            _write_header(file, source.count, spec.size)
            while batch := list(islice(rows, 512)):
                for result, name, label in pool.map(one, batch):
                    if isinstance(result, _TooSmall):
                        small.append(f"{name}: {result}")
                    elif isinstance(result, ImageError):
                        bad.append(f"{name}: {result}")
                    else:
                        file.write(result.tobytes())
                        labels.append(label)
                bar.advance(len(batch))
            file.seek(0)
            _write_header(file, len(labels), spec.size)
        if bad and (not skip or not labels):
            raise DataError(
                f"{len(bad)} of {source.count} files are no usable images; remove them, "
                f"or leave them out with --skip-unreadable:\n  {_shown(bad)}"
            )
        if small:
            raise DataError(
                f"{len(small)} of {source.count} images are smaller than the network's {spec.size} pixels; choose "
                f"a recipe of their size, or enlarge them with --set data.enlarge=true:\n  {_shown(small)}"
            )
        if bad:
            print(f"left out {len(bad)} of {source.count} files:\n  {_shown(bad)}", file=sys.stderr)
        os.replace(temporary, pixels_path)
        with labels_path.with_suffix(".tmp").open("wb") as file:
            np.save(file, np.array(labels, np.int64))
        os.replace(labels_path.with_suffix(".tmp"), labels_path)
    finally:
        temporary.unlink(missing_ok=True)
        labels_path.with_suffix(".tmp").unlink(missing_ok=True)


class _TooSmall(ImageError):
    """An image that would have to be enlarged."""


def _check_size(content: bytes, size: int) -> None:
    with Image.open(io.BytesIO(content)) as picture:
        if min(picture.size) < size:
            raise _TooSmall(422, "Image too small", f"{picture.width} x {picture.height}")


def _write_header(file: IO[bytes], count: int, size: int) -> None:
    """A .npy's header; numpy leaves room in it for any count, so that it can be written again over itself."""
    shape = (count, 3, size, size)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _shown(lines: list[str]) -> str:
    return "\n  ".join(lines[:10]) + (f"\n  … and {len(lines) - 10} more" if len(lines) > 10 else "")


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

    def present() -> set[int]:
        columns = [pq.read_table(f, columns=["label"])["label"] for f in files] if labelled else []
        return {y for column in columns for y in column.unique().to_pylist()}

    return Source(rows, count, classes, json.dumps(marks), present)


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
    return Source(rows, len(data), classes, data._fingerprint, lambda: set(data[label] if label else ()))
