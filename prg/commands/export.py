"""prg export: a run's model, or an entry's, as an entry."""

import argparse
from pathlib import Path

from prg.commands.options import Commands, add_data, images


def add(commands: Commands) -> None:
    """Its options."""
    sub = commands.add_parser(
        "export",
        help="write a model repository entry",
        description="Write the run's model as a new version of an entry that Triton or prg-serve loads. Given an entry "
        "instead of a run, fit its embedding to the images of --data, and write that.",
    )
    sub.add_argument("source", type=Path, metavar="RUN", help="folder of the run, or of an entry")
    sub.add_argument("entry", type=Path, help="folder of the entry to write, such as model_repository/mine")
    sub.add_argument(
        "--stage",
        choices=("finetune", "pretrain"),
        help="pretrain: an entry without head, for /embed alone (default: finetune)",
    )
    add_data(sub, "where RUN is an entry: images to fit the embedding to, with a head labelled ones")
    sub.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32, or that of the entry"
    )
    sub.add_argument(
        "--compact",
        action="store_true",
        help="round the weights to bfloat16 and compress the file, to about half its bytes",
    )
    sub.add_argument(
        "--prune",
        type=_positive,
        metavar="KEEP",
        help="keep so many versions, the newest, and remove older ones",
    )
    sub.add_argument(
        "--pt2",
        action="store_true",
        help="write model.pt2 too, for a PyTorch that has no TorchScript",
    )
    sub.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> None:
    from prg.errors import DataError

    source, target, how = (
        arguments.source,
        arguments.entry,
        (arguments.compact, arguments.prune, arguments.pt2),
    )
    if (source / "config.pbtxt").is_file():
        from prg.recipe import Data
        from prg.reexport import reexport

        if arguments.stage:
            raise DataError(f"{source}: an entry, which has one model; --stage is for a run")
        if not arguments.data:
            raise DataError(f"{source}: an entry; say with --data which images to fit the embedding to")
        version = reexport(source, target, Data.model_validate(images(arguments)), arguments.precision, *how)
    else:
        from prg.publish import publish
        from prg.training.run import open_run

        if images(arguments):
            raise DataError(f"{source}: a run, whose embedding is fitted already; --data is for an entry")
        run = open_run(source)
        version = publish(run, arguments.stage or "finetune", target, arguments.precision or "fp32", *how)
    path = target / version / "model.pt"
    print(f"exported: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 version is kept")
    return number
