"""prg embed: folders of images to one file of vectors."""

import argparse
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from prg.commands.options import Commands
from prg.errors import DataError

if TYPE_CHECKING:
    from prg.embed.engines import Embedder


def add(commands: Commands) -> None:
    """Its options."""
    sub = commands.add_parser(
        "embed",
        help="embed folders of images into one file",
        description="Embed images into a .npy (with a .jsonl of paths beside it) or a .parquet. The same command "
        "again continues an interrupted one; a bad file is a row of NaN with its error.",
        epilog="example: prg embed photos/ --entry model_repository/prg-cifar10 --out vectors.parquet",
    )
    sub.add_argument("paths", nargs="+", help="folders (all levels of them), files, or patterns in quotes")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="NAME.parquet, or NAME.npy with NAME.jsonl and NAME.about.json",
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
    sub.set_defaults(command=_embed, extra="embedded")


def _embed(arguments: argparse.Namespace) -> None:
    from prg.client import EmbedOptions
    from prg.embed.partitions import embed
    from prg.embed.remote import Remote

    if arguments.t_end is not None and not 0 <= arguments.t_end <= 1:
        raise DataError(f"--t-end {arguments.t_end}: must be from 0 to 1")
    embedder: Embedder
    if arguments.url:
        options = EmbedOptions(normalize=arguments.normalize)
        for name in ("model", "t_end", "feature"):
            if getattr(arguments, name) is not None:
                options[name] = getattr(arguments, name)
        embedder = Remote(arguments.url, os.environ.get("PRG_KEY"), options)
    elif arguments.model:
        raise DataError("--model goes with --url; --entry names the model itself")
    else:
        from prg.embed.local import Local  # needs torch

        embedder = Local(arguments.entry, arguments.t_end, arguments.feature, arguments.normalize)
    with closing(embedder):
        failed = embed(arguments.paths, arguments.out, embedder)
    print(f"embedded: {arguments.out}" + (f"; {failed} files could not be used" if failed else ""))
