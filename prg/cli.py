"""The offline scripts: prg pretrain | finetune | evaluate | export | import | embed | reproduce."""

import argparse
import sys

from entry.config import EntryError

try:
    from prg.checkpoint import CheckpointError
    from prg.commands import embed, evaluate, export, imports, reproduce, train
    from prg.recipe import RecipeError
except ModuleNotFoundError as missing:  # the service alone is installed without them
    raise SystemExit(
        f"prg: {missing.name} is not installed; run `make setup`, or pip install -e '.[embedded,train]'"
    ) from None

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
    import httpx

    from prg.client import ServiceError
    from prg.export import ExportError
    from prg.training.processes import Interrupted, ProcessError, be_alone
    from prg.training.sources import DataError

    try:
        if not getattr(arguments, "several", False) or arguments.dry_run:
            be_alone()
        arguments.command(arguments)
    except (
        RecipeError,
        CheckpointError,
        DataError,
        EntryError,
        ExportError,
        ServiceError,
        ProcessError,
        FloatingPointError,
    ) as error:
        print(f"prg: {error}", file=sys.stderr)
        return 1
    except httpx.TransportError as error:
        where = f"no service answers at {error.request.url} ({error})"
        print(f"prg: {where}; start one with prg-serve, or name another with --url", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"prg: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"prg: {error}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
