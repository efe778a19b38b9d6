"""The offline scripts: prg pretrain | finetune | evaluate | export | import | embed | reproduce."""

import argparse
import sys

from entry.errors import DeviceError, EntryError, PackageError, needs
from prg.commands import embed, evaluate, export, imports, reproduce, train
from prg.console import world_size
from prg.errors import Interrupted, PrgError, ProcessError

EXAMPLE = """
a whole run, on your own images (one sub-folder a class):
  prg pretrain runs/mine --recipe images-32 --data photos/
  prg finetune runs/mine
  prg evaluate runs/mine
  prg export   runs/mine model_repository/mine
  PRG_DEFAULT_MODEL=mine prg-serve
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error that was explained, 130 after an interruption."""
    arguments = parser().parse_args(argv)
    from prg.client import ServiceError

    try:
        with needs(getattr(arguments, "extra", "train")):
            _run(arguments)
    except (PrgError, DeviceError, EntryError, ServiceError, PackageError) as error:
        return _explain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _explain(f"{where}{error.strerror or error}")
    except Interrupted as error:
        _explain(str(error))
        return 130
    except KeyboardInterrupt:
        _explain("stopped")
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    whole = argparse.ArgumentParser(
        prog="prg",
        description="Pretrain, fine-tune, evaluate and export reversed generative flows.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, evaluate, export, imports, embed, reproduce):
        command.add(commands)
    return whole


def _run(arguments: argparse.Namespace) -> None:
    """The command; of several processes only where it is made for them."""
    if world_size() > 1 and (not getattr(arguments, "several", False) or arguments.dry_run):
        raise ProcessError(
            f"WORLD_SIZE = {world_size()}: this is done by one process, start it without torchrun; "
            "several are for prg pretrain, finetune and reproduce"
        )
    arguments.command(arguments)


def _explain(error: str) -> int:
    print(f"prg: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
