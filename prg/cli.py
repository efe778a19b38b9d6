"""The offline scripts: prg pretrain | finetune | evaluate | export | import | embed | reproduce."""

import argparse
import sys

from prg.commands import embed, evaluate, export, imports, reproduce, train

EXAMPLE = """
a whole run, on your own images (one sub-folder a class):
  prg pretrain runs/mine --recipe images-64 --data photos/
  prg finetune runs/mine
  prg evaluate runs/mine
  prg export   runs/mine model_repository/mine
  prg-serve
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error that was explained, 130 after an interruption."""
    arguments = parser().parse_args(argv)
    try:
        from entry.config import EntryError
        from prg.client import ServiceError
        from prg.errors import Interrupted, PrgError

        try:
            _run(arguments)
        except (PrgError, EntryError, ServiceError) as error:
            return _explain(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _explain(f"{where}{error.strerror or error}")
        except Interrupted as error:
            _explain(str(error))
            return 130
    except ModuleNotFoundError as missing:  # the service alone is installed without them
        if str(missing.name).partition(".")[0] in ("prg", "entry"):
            raise
        return _explain(
            f"{missing.name} is not installed; run `make setup`, or pip install -e '.[embedded,train]'"
        )
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
    if not getattr(arguments, "several", False) or arguments.dry_run:
        from prg.training.processes import refuse_several

        refuse_several()
    arguments.command(arguments)


def _explain(error: str) -> int:
    print(f"prg: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
