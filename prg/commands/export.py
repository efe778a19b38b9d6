"""prg export: a run's model as an entry."""

import argparse
from pathlib import Path

from prg.commands.options import Commands


def add(commands: Commands) -> None:
    """Its options."""
    sub = commands.add_parser(
        "export",
        help="write a model repository entry",
        description="Write the run's model as a new version of an entry that Triton or prg-serve loads.",
    )
    sub.add_argument("run", type=Path, help="folder of the run")
    sub.add_argument("entry", type=Path, help="folder of the entry, such as model_repository/mine")
    sub.add_argument(
        "--stage",
        choices=("finetune", "pretrain"),
        default="finetune",
        help="pretrain: an entry without head, for /embed alone (default: finetune)",
    )
    sub.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    sub.add_argument(
        "--compact",
        action="store_true",
        help="round the weights to bfloat16 and compress the file, to about half its bytes",
    )
    sub.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> None:
    from prg.publish import publish
    from prg.training.run import open_run

    run = open_run(arguments.run)
    version = publish(run, arguments.stage, arguments.entry, arguments.precision, arguments.compact)
    path = arguments.entry / version / "model.pt"
    print(f"exported: {path} ({path.stat().st_size / 1e6:.1f} MB)")
