"""Vectors into one file, a portion at a time: what an interruption leaves is kept, and a bad file is a row."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entry.errors import needs
from entry.files import atomic_file, write_atomically
from prg.console import note, track
from prg.embed.engines import Embedder, Rows
from prg.embed.sources import find_images
from prg.errors import DataError
from prg.images.walk import SUFFIXES, other_files

PART = 256
"""Images between two writes: what a kill can cost."""


def embed(sources: Sequence[str], out: Path, embedder: Embedder) -> int:
    """Write embeddings of all images of `sources` to `out` (.npy or .parquet); returns how many failed.

    A .npy has a .jsonl beside it with each row's path, and its error, and an .about.json that says which weights,
    feature and level its vectors are of; a .parquet has the first two as columns, the other in its metadata, as
    "prg". What was done before an interruption is kept in OUT.parts. Raises DataError where there is nothing to
    embed, or the parts are of something else.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise DataError(f"{out}: must end in .npy or .parquet")
    if out.suffix == ".parquet":
        with needs("search"):  # said before the first image is embedded, not after the last
            import pyarrow  # noqa: F401
    files = list(find_images(sources))
    if not files:
        raise DataError(f"no images in {', '.join(sources)} (files ending in {', '.join(SUFFIXES)})")
    for folder in filter(Path.is_dir, map(Path, sources)):
        if others := other_files(folder):
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


def display(path: Path) -> str:
    """The path as text; bytes of it that are no UTF-8 as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _parts(out: Path, files: list[Path], identity: dict[str, Any]) -> Path:
    """The folder of what is done, made or found. Raises DataError where it is of other images or options."""
    listing = hashlib.sha256(b"\n".join(map(os.fsencode, files))).hexdigest()
    about = json.dumps({"images": len(files), "listing": listing, **identity}, sort_keys=True)
    parts = out.with_name(out.name + ".parts")
    described = parts / "about.json"
    if described.exists() and described.read_text("utf-8") != about:
        raise DataError(
            f"{parts}: begun with other images, weights or options; remove it, or name another --out"
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_atomically(described, about.encode())
    return parts


def _save(path: Path, rows: Rows) -> None:
    with atomic_file(path) as file:
        facts = {"errors": rows.errors, "fingerprint": rows.fingerprint}
        np.savez(file, vectors=rows.vectors, facts=np.array(json.dumps(facts)))


def _load(path: Path) -> Rows:
    with np.load(path) as saved:
        facts = json.loads(str(saved["facts"]))
        errors = {int(i): text for i, text in facts["errors"].items()}
        return Rows(saved["vectors"], errors, facts["fingerprint"])


def _write(
    out: Path, files: list[Path], vectors: np.ndarray, errors: dict[int, str], about: dict[str, Any]
) -> None:
    if out.suffix == ".npy":
        lines = [
            {"path": display(f)} | ({"error": errors[i]} if i in errors else {}) for i, f in enumerate(files)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(out.with_suffix(".jsonl"), text.encode())
        write_atomically(out.with_suffix(".about.json"), json.dumps(about).encode())
        with atomic_file(out) as file:
            np.save(file, vectors)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(vectors.ravel(), pa.float32())
        columns = {
            "path": pa.array(map(display, files)),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "error": pa.array([errors.get(i) for i in range(len(files))], pa.string()),
        }
        with atomic_file(out) as file:
            pq.write_table(pa.table(columns, metadata={"prg": json.dumps(about)}), file)
