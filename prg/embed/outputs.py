"""Where `prg embed` writes: a folder of partitions, or one file, which is put together from such a folder beside it."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entry.errors import needs
from entry.files import atomic_file, write_atomically
from prg.console import Bar, track
from prg.embed.engines import Embedder
from prg.embed.partitions import (
    ABOUT,
    SUCCESS,
    Shard,
    Summary,
    begin,
    check_same,
    finish,
    one_shard,
    shard_name,
    shards_of,
    write_partitions,
)
from prg.embed.rows import NPZ, PARQUET, About, Form, Known, Rows, from_table, to_table
from prg.embed.sources import Found, find
from prg.embed.stores import Folder, Store, is_url, open_store
from prg.errors import DataError

FORMS = {".npy": NPZ, ".parquet": PARQUET}
"""Of files; anything else is a folder."""


Write = Callable[[Iterable[Shard], Store, Form, Embedder, About, Bar], tuple[list[str], Summary]]


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    sources: Sequence[str]
    out: str
    dtype: str = "float32"
    number: int = 0
    """Which of `count` runs this is, each of which does a part."""
    count: int = 1
    image_column: str = ""

    @property
    def form(self) -> Form | None:
        """Of a single file; None for a folder."""
        return FORMS.get(Path(self.out).suffix)


@dataclass(frozen=True)
class Done:
    """What was done."""

    summary: Summary
    skipped: list[str]
    complete: bool
    """Whether all shards are done."""


def check(job: Job) -> None:
    """Raise what can be known before any model is loaded: DataError, PackageError."""
    if job.form and (job.count > 1 or is_url(job.out)):
        raise DataError(
            f"--out {job.out}: with --shard, and behind a URL, name a folder, which gets partitions"
        )
    folder = is_url(job.out) or job.out.endswith("/") or Path(job.out).is_dir()
    if not job.form and not folder and (Path(job.out).suffix or Path(job.out).is_file()):
        raise DataError(f"--out {job.out}: must end in .npy or .parquet, or be a folder")
    if job.form is not NPZ:
        with needs("search"):
            import pyarrow  # noqa: F401


def embed(job: Job, embedder: Embedder, write: Write = write_partitions) -> Done:
    """Write embeddings of all images; what is there already and still right is kept. Raises DataError.

    write: what computes the partitions of a folder, as `write_partitions` does.

    A folder gets `part-*.parquet` with the columns id, digest (SHA-256), embedding (null where there is an error) and
    error, and `_SUCCESS` when it is complete. A .parquet is the same in one file, a .npy has a .jsonl beside it with
    each row's id, digest and error, and an .about.json. What the vectors are of (fingerprint, feature, t_end, dim,
    normalize, dtype) is in each parquet's metadata, as "prg", or in the .about.json.
    """
    found = find(job.sources, job.image_column, job.out)
    about = {
        **embedder.identity,
        "dtype": job.dtype,
        "sources": [source.rstrip("/") or "/" for source in job.sources],
    }
    if job.form:
        return _file(job, found, embedder, about, job.form)
    store = open_store(job.out)
    shard = shard_name(job.number, job.count)
    with store.alone(shard if job.count > 1 else ""):
        begin(store, about, shard)
        shards = shards_of(found, job.number, job.count, store.names())
        with track("embedding", found.count if job.count == 1 else None) as bar:
            parts, summary = write(shards, store, PARQUET, embedder, about, bar)
        complete = finish(store, parts, found, job.number, job.count)
    return Done(summary, found.skipped, complete)


def _file(job: Job, found: Found, embedder: Embedder, about: About, form: Form) -> Done:
    """One file: the partitions lie in OUT.parts until all are there."""
    out = Path(job.out)
    parts = out.with_name(out.name + ".parts")
    earlier = Known()
    if out.exists():
        before, rows = read_file(out)
        check_same(before, about)
        earlier.add(rows)
    elif form is NPZ and not parts.exists():
        for beside in (out.with_suffix(".jsonl"), out.with_suffix(".about.json")):
            if beside.exists():
                raise DataError(
                    f"{beside}: is there without {out.name}, and would be replaced; name another --out"
                )
    store = Folder(parts)
    with store.alone(""):
        begin(store, about, shard_name(0, 1))
        with track("embedding", found.count) as bar:
            names, summary = write_partitions(one_shard(found), store, form, embedder, about, bar, earlier)
        write = _write_npy if form is NPZ else _write_parquet
        write(out, store, names, about, summary.images)
        for name in store.names() - {ABOUT}:  # that one last: by it a folder of ours is known
            store.remove(name)
        shutil.rmtree(parts)
    return Done(summary, found.skipped, True)


def read_file(path: Path) -> tuple[About, Rows]:
    """What `prg embed` wrote: a .npy, a .parquet or a folder of partitions. Raises DataError for what is none."""
    try:
        if path.suffix == ".npy":
            text = path.with_suffix(".jsonl").read_text("utf-8")
            lines = [json.loads(line) for line in text.split("\n") if line]  # splitlines knows other ends too
            about = json.loads(path.with_suffix(".about.json").read_text("utf-8"))
            ids, digests, errors = ([line.get(key) for line in lines] for key in ("id", "digest", "error"))
            return about, Rows(ids, digests, errors, np.load(path, mmap_mode="r"))
        import pyarrow.parquet as pq

        if path.is_dir() and not (path / SUCCESS).exists():
            raise DataError(f"{path}: not complete; run the same prg embed again")
        table = pq.read_table(path)
        return json.loads(table.schema.metadata[b"prg"]), from_table(table)
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not what prg embed writes ({error}); name another") from None


def _write_npy(out: Path, store: Store, names: list[str], about: About, count: int) -> None:
    """The vectors last, and the old ones away first: beside them are never rows that are not theirs."""
    out.unlink(missing_ok=True)
    with atomic_file(out.with_suffix(".jsonl")) as file:
        for rows in _parts(store, names, NPZ):
            for id, digest, error in zip(rows.ids, rows.digests, rows.errors, strict=True):
                line = {"id": id, "digest": digest} | ({"error": error} if error is not None else {})
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    write_atomically(out.with_suffix(".about.json"), json.dumps(about).encode())
    with atomic_file(out) as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(about["dtype"]))
        header = {"descr": descr, "fortran_order": False, "shape": (count, about["dim"])}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in _parts(store, names, NPZ):
            file.write(rows.vectors.tobytes())


def _write_parquet(out: Path, store: Store, names: list[str], about: About, count: int) -> None:
    import pyarrow.parquet as pq

    tables = (to_table(rows, about) for rows in _parts(store, names, PARQUET))
    first = next(tables)
    with atomic_file(out) as file, closing(pq.ParquetWriter(file, first.schema)) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _parts(store: Store, names: list[str], form: Form) -> Iterator[Rows]:
    return (form.decode(store.read(name)) for name in names)
