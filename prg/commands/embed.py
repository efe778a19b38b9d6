"""prg embed: many images to vectors."""

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prg.commands.options import Commands
from prg.errors import DataError

if TYPE_CHECKING:
    from prg.embed.engines import Embedder
    from prg.embed.outputs import Done


def add(commands: Commands) -> None:
    """Its options."""
    sub = commands.add_parser(
        "embed",
        help="embed many images",
        description="Embed images into a folder of parquet partitions, one .parquet, or a .npy (with a .jsonl of ids "
        "beside it). The same command again computes only what is new, changed or failed before, and drops what was "
        "removed; a file that is no usable image is a row with an error.",
        epilog="example: prg embed photos/ --entry model_repository/prg-everyday --out vectors/",
    )
    sub.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folders (all levels of them), files, patterns in quotes, parquet with images, WebDataset .tar, "
        "a Lance dataset; also as URLs, such as s3://bucket/photos/",
    )
    sub.add_argument(
        "--out", required=True, help="a folder (or its URL), NAME.parquet, or NAME.npy with NAME.jsonl"
    )
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--entry", type=Path, help="compute here, with this entry, such as model_repository/mine"
    )
    where.add_argument(
        "--url", help="ask this service, such as http://127.0.0.1:8000; a key, if it needs one, in PRG_KEY"
    )
    sub.add_argument("--model", help="of the service; by default its own choice")
    sub.add_argument("--t-end", type=float, help="from 0 (noise) to 1 (the image); by default the model's")
    sub.add_argument("--feature", choices=("embedding", "hidden", "state"), help="by default the model's")
    sub.add_argument("--normalize", action="store_true", help="scale each embedding to length 1")
    sub.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the vectors written"
    )
    sub.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="do the part I, from 0, of N; the same command with each I, on any machines, does all",
    )
    sub.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on a Ray cluster, which RAY_ADDRESS names, or one that is started here; into a folder",
    )
    sub.add_argument("--image-column", default="", help="of parquet with several columns of images")
    sub.set_defaults(command=_embed, extra="embedded")


def _shard(text: str) -> tuple[int, int]:
    """argparse names the flag where this raises."""
    number, found, count = text.partition("/")
    if not (found and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: such as 0/4, the first of four, up to 3/4")
    return int(number), int(count)


def _embed(arguments: argparse.Namespace) -> None:
    from prg.embed.outputs import Job, Write, check, embed
    from prg.embed.partitions import write_partitions

    number, count = arguments.shard
    job = Job(arguments.sources, arguments.out, arguments.dtype, number, count, arguments.image_column)
    check(job)
    # Of strange files Pillow says more than can be read, for each of thousands.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    make = _maker(arguments)
    write: Write = write_partitions
    if arguments.engine == "ray":
        if job.form:
            raise DataError(f"--out {job.out}: with --engine ray name a folder, which gets partitions")
        from prg.embed.cluster import OnRay

        write = OnRay(job.out, make)
    with closing(make()) as embedder:
        done = embed(job, embedder, write)
    _show(arguments.out, done)
    if done.summary.images and done.summary.failed == done.summary.images:
        raise DataError("no image could be used")


def _maker(arguments: argparse.Namespace) -> "Callable[[], Embedder]":
    """What makes the embedder, here or in another process."""
    if arguments.t_end is not None and not 0 <= arguments.t_end <= 1:
        raise DataError(f"--t-end {arguments.t_end}: must be from 0 to 1")
    if arguments.url:
        from prg.client import EmbedOptions
        from prg.embed.remote import Remote

        options = EmbedOptions(normalize=arguments.normalize)
        for name in ("model", "t_end", "feature"):
            if getattr(arguments, name) is not None:
                options[name] = getattr(arguments, name)
        return partial(Remote, arguments.url, os.environ.get("PRG_KEY", "").strip() or None, options)
    if arguments.model:
        raise DataError("--model goes with --url; --entry names the model itself")
    from prg.embed.local import Local  # needs torch

    return partial(Local, arguments.entry.resolve(), arguments.t_end, arguments.feature, arguments.normalize)


def printable(text: str) -> str:
    """On one line, and without what a terminal would obey: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show(out: str, done: "Done") -> None:
    summary = done.summary
    print(f"{out}: {summary.images:,} images, {summary.computed:,} of them computed now")
    if summary.failed:
        print(f"{summary.failed:,} could not be used, and have no vector:")
        print("\n".join(f"  {printable(line)}" for line in summary.errors))
        if summary.failed > len(summary.errors):
            print(f"  … and {summary.failed - len(summary.errors):,} more; see the column error")
    for line in done.skipped:
        print(line)
    if not done.complete:
        print("not complete: other shards are not done yet")
