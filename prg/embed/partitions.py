"""Images to partitions of vectors: what is there already is not computed again, and nothing is lost or doubled.

A partition is some rows of one shard. The shards are the archives, and groups of loose files by a hash of their id:
so an image that is added, changed or removed touches one partition, on every machine the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np

from entry.errors import ImageError
from prg.bounded import ahead
from prg.console import Bar, note
from prg.embed.archives import Archive, Item, display
from prg.embed.engines import Embedder
from prg.embed.rows import About, Form, Known, Rows
from prg.embed.sources import Found, file_item
from prg.embed.stores import Store
from prg.errors import DataError

ROWS = 2048
"""Of a partition, at most: what a kill can cost."""
AHEAD = 64
"""Images that are read and decoded before the model asks for them."""
ABOUT = "_about.json"
SUCCESS = "_SUCCESS"
DONE = "_done-"
"""Of a marker that one of several shards is done; with the names of its partitions."""
FEW = 10
"""Errors that are shown."""
IDENTITY = ("fingerprint", "feature", "t_end", "dim", "normalize", "dtype")


@dataclass(frozen=True)
class Shard:
    """Images whose partitions are written one after the other."""

    name: str
    items: Callable[[], Iterator[Item]]
    related: tuple[str, ...] = ()
    """Beginnings of the names of partitions that may know some of its vectors, besides its own."""


@dataclass
class Summary:
    """What was done."""

    images: int = 0
    computed: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    """The first few."""

    def add(self, other: "Summary") -> None:
        """What was done elsewhere too."""
        self.images += other.images
        self.computed += other.computed
        self.failed += other.failed
        self.errors = (self.errors + other.errors)[:FEW]


def shards_of(found: Found, number: int, count: int, names: Iterable[str]) -> Iterator[Shard]:
    """The shards that the run `number` of `count` does. names: of the partitions that are there."""
    groups = _groups(len(found.files))
    there = {
        tuple(map(int, name.split("-")[1:4:2]))
        for name in names
        if name.startswith("part-") and "-of-" in name
    }
    dealt: list[list[str]] = [[] for _ in range(groups)]
    for place in found.files:
        dealt[_hash(display(place)) % groups].append(place)
    for k, places in enumerate(dealt):
        if k % count == number and places:
            # Groups are powers of two: those that the folder was dealt to before hold these very images, or some.
            others = (
                _group(j, of) for j, of in sorted(there) if of != groups and (j - k) % min(of, groups) == 0
            )
            yield Shard(_group(k, groups), partial(_loose, sorted(places)), tuple(others))
    for i, archive in enumerate(found.archives):
        if i % count == number:
            yield Shard(_archive_name(archive), archive.items)


def one_shard(found: Found) -> Iterator[Shard]:
    """All images as one shard, in their order."""

    def items() -> Iterator[Item]:
        yield from map(file_item, found.files)
        for archive in found.archives:
            yield from archive.items()

    yield Shard("part", items)


def write_partitions(
    shards: Iterable[Shard],
    store: Store,
    form: Form,
    embedder: Embedder,
    about: About,
    bar: Bar,
    earlier: Known | None = None,
) -> tuple[list[str], Summary]:
    """(the names of all partitions of these shards, what was done); those that are as they should be stay.

    earlier: what else is known. Raises whatever the embedder does, and DataError for an archive that is broken.
    """
    summary, names = Summary(), []
    there = sorted(store.names())
    with_known = (_Work(shard, store, there, form, earlier) for shard in shards)
    images = ((work, item) for work in with_known for item in work.shard.items())
    results = _computed(ahead(partial(_begun, embedder), images, AHEAD), embedder)
    for work, rows in groupby(_counted(results, summary, bar), key=lambda row: row.work):
        number = 0
        while portion := list(islice(rows, ROWS)):
            name = f"{work.shard.name}-{number:05}{form.suffix}"
            whole = _rows(portion, about)
            if work.signatures.get(name) != whole.signature():
                store.write(name, form.encode(whole, about))
            names.append(name)
            number += 1
    return names, summary


def begin(store: Store, about: About, shard: str) -> None:
    """Check what is in the store, and say in it what it will hold. Raises DataError where that does not fit."""
    names = store.names()
    before = None
    if ABOUT in names:
        try:
            before = json.loads(store.read(ABOUT))
            if any(name.startswith("part-") for name in names):
                check_same(before, about)
        except (AttributeError, json.JSONDecodeError):
            raise DataError(f"--out: its {ABOUT} is damaged; remove the folder and begin again") from None
    elif names:
        raise DataError(f"--out is a folder of other files, such as {min(names)}; name a new one")
    for name in names & {SUCCESS, DONE + shard}:
        store.remove(name)
    if before != about:
        store.write(ABOUT, json.dumps(about).encode())


def check_same(before: About, about: About) -> None:
    """Raise DataError where vectors of the two must not be mixed, or images of a source would vanish."""
    for key in IDENTITY:
        if before.get(key) != about[key]:
            raise DataError(
                f"{key} differs: the vectors that are there are of {before.get(key)}, these of {about[key]}; "
                "name another output"
            )
    missing = [source for source in before.get("sources", []) if source not in about["sources"]]
    if missing:
        raise DataError(
            f"the vectors that are there are of {', '.join(missing)} too; name these again, or another output"
        )


def finish(store: Store, parts: list[str], found: Found, number: int, count: int) -> bool:
    """Say that this run's partitions are done; if all are, remove others, write _SUCCESS, and return True."""
    mine = {"listing": found.listing, "partitions": parts}
    store.write(DONE + shard_name(number, count), json.dumps(mine).encode())
    names = store.names()
    valid: set[str] = set()
    markers = {DONE + shard_name(i, count) for i in range(count)}
    for marker in markers:
        done = json.loads(store.read(marker)) if marker in names else {}
        if done.get("listing") != mine["listing"]:  # not yet, or before the images were others
            return False
        valid |= set(done["partitions"])
    for name in names:
        if name.startswith("part-") and name not in valid:
            store.remove(name)
    store.write(SUCCESS, b"")
    # The markers stay, for a shard that is done again; those of another count don't.
    for name in names - markers:
        if name.startswith(DONE):
            store.remove(name)
    return True


def shard_name(number: int, count: int) -> str:
    """In names of files."""
    return f"{number:05}-of-{count:05}"


class _Work:
    """A shard, with what is known of it."""

    def __init__(
        self, shard: Shard, store: Store, there: list[str], form: Form, earlier: Known | None
    ) -> None:
        self.shard = shard
        self.known = earlier or Known()
        self.signatures: dict[str, bytes] = {}
        beginnings = tuple(f"{name}-" for name in (shard.name, *shard.related))
        for name in there:
            if name.startswith(beginnings) and name.endswith(form.suffix):
                try:
                    rows = form.decode(store.read(name))
                except ValueError as error:
                    note(f"{name} is damaged ({error}), and made again")
                    continue
                self.known.add(rows)
                self.signatures[name] = rows.signature()


@dataclass
class _Row:
    """An image on its way to a vector."""

    work: _Work
    id: str
    digest: str = ""
    error: str | None = None
    vector: np.ndarray | None = None
    prepared: Any = None
    computed: bool = False


def _begun(embedder: Embedder, image: tuple[_Work, Item]) -> _Row:
    """What needs no model: reading, and, unless the vector is known, decoding."""
    work, item = image
    row = _Row(work, item.id)
    try:
        content = item.read()
        row.digest = hashlib.sha256(content).hexdigest()
        row.vector = work.known.find(item.id, row.digest)
        if row.vector is None:
            row.prepared = embedder.prepare(content)
    except (ImageError, DataError, OSError) as error:
        row.error = display(str(error))
    return row


def _computed(rows: Iterable[_Row], embedder: Embedder) -> Iterator[_Row]:
    """The same rows, in the same order, with their vectors."""
    held: list[_Row] = []
    waiting: list[_Row] = []

    def compute() -> None:
        found = embedder.embed([row.prepared for row in waiting]) if waiting else []
        for row, vector in zip(waiting, found, strict=True):
            if isinstance(vector, str):
                row.error = vector
            else:
                row.vector, row.computed = vector, True
            row.prepared = None

    for row in rows:
        held.append(row)
        if row.prepared is not None:
            waiting.append(row)
        if len(waiting) == embedder.batch or len(held) == ROWS:
            compute()
            yield from held
            held, waiting = [], []
    compute()
    yield from held


def _counted(rows: Iterable[_Row], summary: Summary, bar: Bar) -> Iterator[_Row]:
    for row in rows:
        summary.images += 1
        summary.computed += row.computed
        if row.error is not None:
            summary.failed += 1
            if len(summary.errors) < FEW:
                summary.errors.append(f"{row.id}: {row.error}")
        bar.advance(1)
        yield row


def _rows(portion: list[_Row], about: About) -> Rows:
    vectors = np.full((len(portion), about["dim"]), np.nan, about["dtype"])
    for i, row in enumerate(portion):
        if row.vector is not None:
            vectors[i] = row.vector
    return Rows(
        [row.id for row in portion],
        [row.digest for row in portion],
        [row.error for row in portion],
        vectors,
    )


def _loose(places: list[str]) -> Iterator[Item]:
    return map(file_item, places)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _groups(count: int) -> int:
    """A power of two, of groups that are mostly one partition each."""
    groups = 1
    while count > groups * ROWS * 3 // 4:
        groups *= 2
    return groups


def _group(k: int, of: int) -> str:
    return f"part-{shard_name(k, of)}"


def _archive_name(archive: Archive) -> str:
    name = display(archive.place)
    stem = "".join(
        c if c.isalnum() else "_" for c in name.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    )
    return f"part-{stem[:40]}-{_hash(name):016x}"
