"""Rows of vectors and their two forms on disk; and what is known of earlier ones."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np

About = dict[str, Any]
"""What vectors are of: fingerprint, feature, t_end, dim, normalize, dtype, and the sources that were named."""


@dataclass(frozen=True)
class Rows:
    """Vectors [N, D] and where they are from; a row of NaN for each that has an error."""

    ids: list[str]
    digests: list[str]
    """SHA-256 of each image's bytes, in hex; empty where they could not be read."""
    errors: list[str | None]
    vectors: np.ndarray

    def signature(self) -> bytes:
        """Equal where the rows are: an id and a digest decide the vector."""
        return hashlib.sha256(json.dumps([self.ids, self.digests, self.errors]).encode()).digest()


def to_npz(rows: Rows, about: About) -> bytes:
    """As a .npz."""
    facts = {"ids": rows.ids, "digests": rows.digests, "errors": rows.errors, "about": about}
    file = io.BytesIO()
    np.savez(file, vectors=rows.vectors, facts=np.array(json.dumps(facts)))
    return file.getvalue()


def from_npz(content: bytes) -> Rows:
    """Raises ValueError for what is none."""
    try:
        with np.load(io.BytesIO(content)) as saved:
            facts = json.loads(str(saved["facts"]))
            return Rows(facts["ids"], facts["digests"], facts["errors"], saved["vectors"])
    except (BadZipFile, EOFError, OSError, KeyError) as error:
        raise ValueError(str(error)) from None


def to_table(rows: Rows, about: About) -> Any:
    """As a table of pyarrow: id, digest, embedding (null where there is an error), error."""
    import pyarrow as pa

    flat = pa.array(rows.vectors.ravel())
    embedding = pa.FixedSizeListArray.from_arrays(
        flat, rows.vectors.shape[1], mask=pa.array([error is not None for error in rows.errors])
    )
    columns = {
        "id": pa.array(rows.ids, pa.string()),
        "digest": pa.array([digest or None for digest in rows.digests], pa.string()),
        "embedding": embedding,
        "error": pa.array(rows.errors, pa.string()),
    }
    return pa.table(columns, metadata={"prg": json.dumps(about)})


def to_parquet(rows: Rows, about: About) -> bytes:
    """As a .parquet."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(to_table(rows, about), file)
    return file.getvalue()


def from_table(table: Any) -> Rows:
    """Of such a table."""
    embedding = table["embedding"].combine_chunks()
    width = embedding.type.list_size
    good = embedding.is_valid().to_numpy(zero_copy_only=False)
    vectors = np.full((len(good), width), np.nan, embedding.type.value_type.to_pandas_dtype())
    vectors[good] = embedding.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    digests = [digest or "" for digest in table["digest"].to_pylist()]
    return Rows(table["id"].to_pylist(), digests, table["error"].to_pylist(), vectors)


def from_parquet(content: bytes) -> Rows:
    """Raises ValueError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return from_table(pq.read_table(io.BytesIO(content)))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Form:
    """A way to write rows."""

    suffix: str
    encode: Callable[[Rows, About], bytes]
    decode: Callable[[bytes], Rows]


NPZ = Form(".npz", to_npz, from_npz)
PARQUET = Form(".parquet", to_parquet, from_parquet)


class Known:
    """Vectors that were computed before, by id and digest; rows with an error are not among them."""

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._blocks: list[np.ndarray] = []

    def add(self, rows: Rows) -> None:
        """Rows of an earlier run."""
        block = len(self._blocks)
        self._blocks.append(rows.vectors)
        for row, (name, digest, error) in enumerate(zip(rows.ids, rows.digests, rows.errors, strict=True)):
            if error is None:
                self._places[_key(name, digest)] = (block, row)

    def find(self, name: str, digest: str) -> np.ndarray | None:
        """The vector of that image, if it is known."""
        place = self._places.get(_key(name, digest))
        return None if place is None else self._blocks[place[0]][place[1]]


def _key(name: str, digest: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{digest}".encode(), digest_size=16).digest()
