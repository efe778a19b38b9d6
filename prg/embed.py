"""Embeddings of folders of images, in process or by a service, resumable; a bad file is a row with its error."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from entry.config import write_atomically
from entry.images import ImageError, load_image
from prg.client import Client, EmbedOptions
from prg.training.data import LIMITS
from prg.training.processes import note
from prg.training.progress import track
from prg.training.sources import SUFFIXES, DataError, passed_over, refuse_linked_folders

PART = 256
"""Images between two writes: what a kill can cost."""
BATCH = 32


@dataclass(frozen=True)
class Rows:
    """Vectors float32 [N, D] of N files, a row of NaN for each that has an error."""

    vectors: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    fingerprint: str = ""
    """Of the weights: only vectors with the same may be compared."""


class Embedder(Protocol):
    """What computes."""

    identity: dict[str, Any]
    """Weights and options: rows of another identity must not stand in one file."""

    def embed(self, files: list[Path]) -> Rows:
        """Embeddings of these files."""

    def close(self) -> None:
        """Free what it holds."""


class Local:
    """An entry in this process."""

    def __init__(
        self,
        directory: Path,
        t_end: float | None = None,
        feature: Literal["state", "hidden"] | None = None,
        normalize: bool = False,
    ) -> None:
        from entry.runner import Runner  # here: a service's client needs no torch

        self._runner = Runner(directory)
        entry, prg = self._runner.entry, self._runner.entry.prg
        self._t_end = prg.t_end if t_end is None else t_end
        self._feature = feature or prg.feature
        self._normalize = normalize
        self._pool = ThreadPoolExecutor()
        self.identity = {
            "fingerprint": entry.fingerprint(self._runner.version),
            "t_end": self._t_end,
            "feature": self._feature,
            "normalize": normalize,
        }

    def embed(self, files: list[Path]) -> Rows:
        """Embeddings of these files."""
        decoded = list(self._pool.map(self._decode, files))
        good = {i: image for i, image in enumerate(decoded) if isinstance(image, np.ndarray)}
        vectors = np.full((len(files), self._dim()), np.nan, np.float32)
        for start in range(0, len(good), BATCH):
            rows = list(good)[start : start + BATCH]
            images = np.stack([good[i] for i in rows])
            outputs = self._runner.run(images, np.full(len(rows), self._t_end, np.float32))
            vectors[rows] = outputs.state if self._feature == "state" else outputs.hidden
        if self._normalize:
            length = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = np.divide(vectors, length, out=vectors, where=length > 0)
        errors = {i: str(d) for i, d in enumerate(decoded) if not isinstance(d, np.ndarray)}
        return Rows(vectors, errors, str(self.identity["fingerprint"]))

    def close(self) -> None:
        """End the decoding threads."""
        self._pool.shutdown()

    def _dim(self) -> int:
        features = self._runner.entry.prg.features
        return features.state.dim if self._feature == "state" else features.hidden.dim

    def _decode(self, file: Path) -> np.ndarray | Exception:
        try:
            return load_image(file.read_bytes(), self._runner.entry.prg.image, LIMITS)
        except (ImageError, OSError) as error:
            return error


class Remote:
    """A running service."""

    def __init__(self, url: str, key: str | None, options: EmbedOptions) -> None:
        self._client = Client(url, key)
        self._options = options
        models = self._client.models()
        name = options.get("model", models["default"])
        facts: dict[str, Any] = next((m for m in models["data"] if m["name"] == name), {})
        self.identity = {
            "model": name,
            "version": facts.get("default_version"),
            "t_end": facts.get("t_end"),
            "feature": facts.get("feature"),
            **options,
        }

    def embed(self, files: list[Path]) -> Rows:
        """Embeddings of these files."""
        errors: dict[int, str] = {}

        def contents() -> Iterator[bytes]:  # one after the other: a portion of photos would fill the memory
            for i, file in enumerate(files):
                try:
                    yield file.read_bytes()
                except OSError as error:
                    errors[i] = str(error)
                    yield b""

        found = self._client.embed(contents(), **self._options)
        return Rows(found.vectors, found.errors | errors, found.fingerprint)

    def close(self) -> None:
        """Close the connections."""
        self._client.__exit__()


def embed(sources: Sequence[str], out: Path, embedder: Embedder) -> int:
    """Write embeddings of all images of `sources` to `out` (.npy or .parquet); returns how many failed.

    A .npy has a .jsonl beside it with each row's path, and its error, and an .about.json that says which weights,
    feature and level its vectors are of; a .parquet has the first two as columns, the other in its metadata, as
    "prg". What was done before an interruption is kept in OUT.parts. Raises DataError where there is nothing to
    embed, or the parts are of something else.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise DataError(f"{out}: must end in .npy or .parquet")
    files = list(find_images(sources))
    if not files:
        raise DataError(f"no images in {', '.join(sources)} (files ending in {', '.join(SUFFIXES)})")
    for folder in filter(Path.is_dir, map(Path, sources)):
        if others := passed_over(folder):
            note(others)
    parts = _parts(out, files, embedder.identity)
    with track("embedding", len(files)) as bar:
        for start in range(0, len(files), PART):
            portion = files[start : start + PART]
            path = parts / f"{start:09}.npz"
            if not path.exists():
                _save(path, embedder.embed(portion))
            bar.advance(len(portion))
    rows = [_load(path) for path in sorted(parts.glob("*.npz"))]
    fingerprints = sorted({part.fingerprint for part in rows})
    if len(fingerprints) > 1:
        raise DataError(
            f"{parts}: the service's model was replaced meanwhile (weights {' and '.join(fingerprints)}), "
            "and vectors of different weights must not be mixed; remove it and begin again"
        )
    vectors = np.concatenate([part.vectors for part in rows])
    errors = {k * PART + i: text for k, part in enumerate(rows) for i, text in part.errors.items()}
    _write(out, files, vectors, errors, embedder.identity | {"fingerprint": fingerprints[0]})
    shutil.rmtree(parts)
    return len(errors)


def find_images(sources: Iterable[str]) -> Iterator[Path]:
    """Files of folders (all levels), of patterns, and named ones, each once, in a fixed order."""
    seen: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            refuse_linked_folders(path)
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and (p.is_file() or dangles(p))
            )
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
            if not found:
                raise DataError(f"{source}: no such file or folder")
        for file in found:
            if file not in seen:
                seen.add(file)
                yield file


def dangles(path: Path) -> bool:
    """Whether it is a link to nothing: a row with an error, not a file less."""
    return path.is_symlink() and not path.exists()


def shown(path: Path) -> str:
    """The path as text; bytes of it that are no UTF-8 as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _parts(out: Path, files: list[Path], identity: dict[str, Any]) -> Path:
    """The folder of what is done, made or found. Raises DataError where it is of other images or options."""
    listing = hashlib.sha256(b"\n".join(map(os.fsencode, files))).hexdigest()
    about = json.dumps({"images": len(files), "listing": listing, **identity}, sort_keys=True)
    parts = out.with_name(out.name + ".parts")
    note = parts / "about.json"
    if note.exists() and note.read_text("utf-8") != about:
        raise DataError(
            f"{parts}: begun with other images, weights or options; remove it, or name another --out"
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_atomically(note, about.encode())
    return parts


def _save(path: Path, rows: Rows) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        facts = {"errors": rows.errors, "fingerprint": rows.fingerprint}
        np.savez(file, vectors=rows.vectors, facts=np.array(json.dumps(facts)))
    os.replace(temporary, path)


def _load(path: Path) -> Rows:
    with np.load(path) as saved:
        facts = json.loads(str(saved["facts"]))
        errors = {int(i): text for i, text in facts["errors"].items()}
        return Rows(saved["vectors"], errors, facts["fingerprint"])


def _write(
    out: Path, files: list[Path], vectors: np.ndarray, errors: dict[int, str], about: dict[str, Any]
) -> None:
    temporary = out.with_name(out.name + ".tmp")
    if out.suffix == ".npy":
        lines = [
            {"path": shown(f)} | ({"error": errors[i]} if i in errors else {}) for i, f in enumerate(files)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(out.with_suffix(".jsonl"), text.encode())
        write_atomically(out.with_suffix(".about.json"), json.dumps(about).encode())
        with temporary.open("wb") as file:
            np.save(file, vectors)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(vectors.ravel(), pa.float32())
        columns = {
            "path": pa.array(map(shown, files)),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "error": pa.array([errors.get(i) for i in range(len(files))], pa.string()),
        }
        pq.write_table(pa.table(columns, metadata={"prg": json.dumps(about)}), temporary)
    os.replace(temporary, out)
