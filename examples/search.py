"""Image search: an index of the vectors that `prg embed` wrote, and the pictures nearest to a picture.

prg embed photos/ --entry model_repository/prg-cifar10 --out vectors.parquet
python examples/search.py index vectors.parquet photos.usearch
python examples/search.py query photos.usearch photo.jpg --entry model_repository/prg-cifar10
"""

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from usearch.index import Index

from entry.errors import EntryError, PackageError, needs
from prg.client import EmbedOptions, ServiceError
from prg.embed.engines import Embedder
from prg.embed.remote import Remote

Found = list[tuple[str, float]]
"""Paths with their cosine similarity, nearest first."""


@dataclass(frozen=True)
class About:
    """What an index is of; written beside it as NAME.json."""

    paths: list[str]
    made_by: dict[str, object]
    """Weights, feature and level, where the vectors say so."""

    @classmethod
    def read(cls, index: Path) -> "About":
        """Of this index. Raises ValueError where another version of this program wrote it."""
        facts = json.loads(index.with_suffix(".json").read_text("utf-8"))
        if facts.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{index}: made by another version of this program; index the vectors again")
        return cls(**facts)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("index", help="make an index of vectors")
    sub.add_argument(
        "vectors", type=Path, help="what `prg embed` wrote: a .parquet, or a .npy with its .jsonl"
    )
    sub.add_argument("index", type=Path, help="the index to write; a .json of the same name goes with it")
    sub.set_defaults(command=make)
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


def make(arguments: argparse.Namespace) -> None:
    """vectors -> index."""
    vectors, paths, made_by = read_vectors(arguments.vectors)
    good = np.isfinite(vectors).all(1)  # a file that could not be used is a row of NaN
    if not good.any():
        raise ValueError(f"{arguments.vectors}: no vectors in it")
    about = About(paths, made_by)
    index = Index(ndim=vectors.shape[1], metric="cos", dtype="f32")
    index.add(np.flatnonzero(good), vectors[good])
    index.save(str(arguments.index))
    arguments.index.with_suffix(".json").write_text(json.dumps(asdict(about)), "utf-8")
    print(f"indexed: {len(index)} pictures in {arguments.index}")


def read_vectors(path: Path) -> tuple[np.ndarray, list[str], dict[str, object]]:
    """(vectors float32 [N, D], their files' paths, what they were made by) as `prg embed` wrote them."""
    if path.suffix == ".npy":
        lines = path.with_suffix(".jsonl").read_text("utf-8").splitlines()
        about = path.with_suffix(".about.json")
        made_by = json.loads(about.read_text("utf-8")) if about.exists() else {}
        return np.load(path), [json.loads(line)["path"] for line in lines], made_by
    table = pq.read_table(path)
    made_by = json.loads((table.schema.metadata or {}).get(b"prg", b"{}"))
    vectors = np.asarray(table["embedding"].combine_chunks().flatten())
    return vectors.reshape(table.num_rows, -1), table["path"].to_pylist(), made_by


def query(arguments: argparse.Namespace) -> None:
    """Pictures -> the nearest of the index."""
    index = Index.restore(str(arguments.index))
    if index is None:
        raise ValueError(f"{arguments.index}: no index; make one with `search.py index`")
    about = About.read(arguments.index)
    vectors = query_vectors(index, about, arguments)
    rows = []
    for image, vector in zip(arguments.images, vectors, strict=True):
        # One more than asked for: a picture of the index is its own nearest.
        found = index.search(vector, arguments.k + 1, exact=arguments.exact)
        hits = [(about.paths[int(m.key)], 1 - float(m.distance)) for m in found]
        hits = [hit for hit in hits if Path(hit[0]).resolve() != Path(image).resolve()][: arguments.k]
        rows.append(hits)
        print(image)
        for path, similarity in hits:
            print(f"  {similarity:.3f}  {path}")
    if arguments.grid:
        draw(arguments.images, rows, arguments.grid)


def query_vectors(index: Index, about: About, arguments: argparse.Namespace) -> np.ndarray:
    """float32 [N, D] in the index's feature. Raises ValueError where a picture has none."""
    known = {Path(path).resolve(): row for row, path in enumerate(about.paths) if row in index}
    missing = [image for image in arguments.images if Path(image).resolve() not in known]
    if not missing:
        return np.stack([index[known[Path(image).resolve()]] for image in arguments.images])
    made_by = about.made_by
    feature, t_end = made_by.get("feature"), made_by.get("t_end")
    embedder: Embedder
    if arguments.entry:
        with needs("embedded"):
            from prg.embed.local import Local
        embedder = Local(arguments.entry, t_end, feature, bool(made_by.get("normalize")))  # type: ignore[arg-type]
    elif arguments.url:
        options = EmbedOptions(
            **{k: made_by[k] for k in ("model", "feature", "t_end", "normalize") if made_by.get(k)}
        )  # type: ignore[typeddict-item]
        embedder = Remote(arguments.url, os.environ.get("PRG_KEY"), options)
    else:
        raise ValueError(f"{missing[0]} is not in the index; name the model with --entry or --url")
    with closing(embedder):
        rows = embedder.embed([Path(image) for image in arguments.images])
    if rows.errors:
        i, reason = next(iter(rows.errors.items()))
        raise ValueError(f"{arguments.images[i]}: {reason}")
    if made_by.get("fingerprint", rows.fingerprint) != rows.fingerprint:
        raise ValueError(
            f"the index is of weights {made_by['fingerprint']}, the model has {rows.fingerprint}: embed again"
        )
    return rows.vectors


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
