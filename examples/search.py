"""Image search: an index of the vectors that `prg embed` wrote, and the pictures nearest to a picture.

prg embed photos/ --entry model_repository/prg-everyday --out vectors/
python examples/search.py index vectors/ photos.usearch
python examples/search.py query photos.usearch photo.jpg --entry model_repository/prg-everyday

After new photos, the first two again: only what is new is embedded and added, and what was removed goes.
"""

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import httpx
import numpy as np

# Before usearch: with the C++ library that usearch would load instead, PyTorch's compiler never ends.
import pyarrow  # noqa: F401
from PIL import Image, ImageOps
from usearch.index import Index

from entry.errors import EntryError, ImageError, PackageError, needs
from entry.files import atomic_file
from prg.client import EmbedOptions, ServiceError
from prg.embed.engines import Embedder
from prg.embed.outputs import read_file
from prg.embed.partitions import check_same
from prg.embed.remote import Remote

Found = list[tuple[str, float]]
"""Paths with their cosine similarity, nearest first."""


@dataclass(frozen=True)
class About:
    """What an index is of; written beside it as NAME.json."""

    made_by: dict[str, object]
    """What the vectors are of: fingerprint, feature, t_end …"""
    keys: dict[str, int] = field(default_factory=dict)
    """The key in the index of each picture."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of each picture's bytes, when it was embedded."""

    @classmethod
    def read(cls, index: Path) -> "About":
        """Of this index. Raises ValueError where it is not of this index."""
        beside = index.with_suffix(".json")
        if not beside.exists():
            raise ValueError(f"{beside}: not there, and goes with {index}; remove that and index again")
        facts = json.loads(beside.read_text("utf-8"))
        if facts.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{index}: made by another version of this program; remove it and index again")
        return cls(**facts)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("index", help="make an index of vectors, or bring one up to date")
    sub.add_argument(
        "vectors", type=Path, help="what `prg embed` wrote: a folder of partitions, a .parquet or a .npy"
    )
    sub.add_argument("index", type=Path, help="the index to write; a .json of the same name goes with it")
    sub.set_defaults(command=update)
    sub = commands.add_parser("query", help="find the pictures nearest to some pictures")
    sub.add_argument("index", type=Path)
    sub.add_argument("images", nargs="+", help="pictures; those that are in the index need no model")
    sub.add_argument("-k", type=int, default=8, help="how many to find (default: 8)")
    sub.add_argument("--exact", action="store_true", help="look at every vector, not by the graph")
    sub.add_argument("--grid", type=Path, help="also draw them as a picture, a row a query")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--entry", type=Path, help="the model repository entry that made the vectors")
    where.add_argument("--url", help="or a service that serves it")
    sub.set_defaults(command=query)
    arguments = parser.parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError, EntryError, PackageError, ServiceError, httpx.TransportError) as error:
        print(f"search: {error}", file=sys.stderr)
        return 1
    return 0


def update(arguments: argparse.Namespace) -> None:
    """vectors -> index: pictures that are new or changed are added, those that are gone or changed removed."""
    made_by, rows = read_file(arguments.vectors)
    vectors = {i: row for row, (i, error) in enumerate(zip(rows.ids, rows.errors, strict=True)) if not error}
    if not vectors:
        raise ValueError(f"{arguments.vectors}: no vectors in it")
    if arguments.index.exists():
        about = About.read(arguments.index)
        check_same(about.made_by, made_by)
        index = restored(arguments.index, about)
    else:
        about = About(made_by)
        index = Index(ndim=rows.vectors.shape[1], metric="cos", dtype="f32")
    old = [i for i, digest in about.digests.items() if i not in vectors or rows.digests[vectors[i]] != digest]
    first = max(about.keys.values(), default=-1) + 1
    for i in old:
        index.remove(about.keys.pop(i))
        del about.digests[i]
    new = [i for i in vectors if i not in about.keys]
    for key, i in enumerate(new, first):
        about.keys[i], about.digests[i] = key, rows.digests[vectors[i]]
    if new:
        added = np.array([about.keys[i] for i in new], np.uint64)
        index.add(added, rows.vectors[[vectors[i] for i in new]].astype(np.float32))
    with atomic_file(arguments.index) as file:
        index.save(file.name)
    with atomic_file(arguments.index.with_suffix(".json")) as file:
        file.write(json.dumps(asdict(about)).encode())
    print(f"{arguments.index}: {len(index)} pictures, {len(new)} added and {len(old)} removed")


def restored(path: Path, about: About) -> Index:
    """An index that was saved. Raises ValueError where its .json is of another."""
    index = Index.restore(str(path))
    if index is None or set(map(int, index.keys)) != set(about.keys.values()):
        raise ValueError(f"{path}: does not fit its .json; remove it and index again")
    return index


def query(arguments: argparse.Namespace) -> None:
    """Pictures -> the nearest of the index."""
    if not arguments.index.exists():
        raise ValueError(f"{arguments.index}: no index; make one with `search.py index`")
    about = About.read(arguments.index)
    index = restored(arguments.index, about)
    names = {key: name for name, key in about.keys.items()}
    vectors = query_vectors(index, about, arguments)
    rows = []
    for image, vector in zip(arguments.images, vectors, strict=True):
        # One more than asked for: a picture of the index is its own nearest.
        found = index.search(vector, arguments.k + 1, exact=arguments.exact)
        hits = [(names[int(m.key)], 1 - float(m.distance)) for m in found]
        hits = [hit for hit in hits if Path(hit[0]).resolve() != Path(image).resolve()][: arguments.k]
        rows.append(hits)
        print(image)
        for path, similarity in hits:
            print(f"  {similarity:.3f}  {path}")
    if arguments.grid:
        draw(arguments.images, rows, arguments.grid)


def query_vectors(index: Index, about: About, arguments: argparse.Namespace) -> np.ndarray:
    """float32 [N, D] in the index's feature. Raises ValueError where a picture has none."""
    known = {Path(path).resolve(): key for path, key in about.keys.items()}
    missing = [image for image in arguments.images if Path(image).resolve() not in known]
    if not missing:
        return np.stack([index[known[Path(image).resolve()]] for image in arguments.images])
    made_by = about.made_by
    embedder: Embedder
    if arguments.entry:
        with needs("embedded"):
            from prg.embed.local import Local
        embedder = Local(arguments.entry, made_by["t_end"], made_by["feature"], made_by["normalize"])  # type: ignore[arg-type]
    elif arguments.url:
        options = EmbedOptions(**{k: made_by[k] for k in ("feature", "t_end", "normalize")})  # type: ignore[typeddict-item]
        embedder = Remote(arguments.url, os.environ.get("PRG_KEY"), options)
    else:
        raise ValueError(f"{missing[0]} is not in the index; name the model with --entry or --url")
    with closing(embedder):
        if embedder.identity["fingerprint"] != made_by["fingerprint"]:
            raise ValueError(
                f"the index is of encoder {made_by['fingerprint']}, the model's is "
                f"{embedder.identity['fingerprint']}: embed again"
            )
        return np.stack([embedded(embedder, Path(image)) for image in arguments.images])


def embedded(embedder: Embedder, image: Path) -> np.ndarray:
    """float32 [D]. Raises ValueError where the picture can't be used."""
    try:
        [vector] = embedder.embed([embedder.prepare(image.read_bytes())])
    except ImageError as error:
        raise ValueError(f"{image}: {error}") from None
    if isinstance(vector, str):
        raise ValueError(f"{image}: {vector}")
    return vector


def draw(images: list[str], rows: list[Found], path: Path, side: int = 64, gap: int = 4) -> None:
    """A row a query: the picture, then what was found."""
    columns = 1 + max(map(len, rows))
    sheet = Image.new("RGB", (columns * (side + gap) + 3 * gap, len(rows) * (side + gap) - gap), "white")
    for y, (image, hits) in enumerate(zip(images, rows, strict=True)):
        for x, file in enumerate([image, *(hit[0] for hit in hits)]):
            with Image.open(file) as picture:
                small = ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (side, side))
            sheet.paste(small, (x * (side + gap) + (3 * gap if x else 0), y * (side + gap)))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
