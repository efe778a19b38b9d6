"""Options that several commands share, and the overrides of a recipe that they mean."""

import argparse
import json
from pathlib import Path
from typing import TypeAlias

from prg.recipes import shipped_recipes

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

RECIPES = f"a .toml file or one of {', '.join(shipped_recipes())}"
IMAGES = "images: a folder, parquet files, or a dataset's name on the hub"


def add_overrides(sub: argparse.ArgumentParser, data: str = IMAGES) -> None:
    """--data and --set."""
    sub.add_argument("--data", help=data)
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, such as finetune.epochs=3; may be repeated",
    )


def add_skip_unreadable(sub: argparse.ArgumentParser) -> None:
    """--skip-unreadable."""
    sub.add_argument(
        "--skip-unreadable", action="store_true", help="leave out files that are no images, and list them"
    )


def overrides(arguments: argparse.Namespace) -> list[str]:
    """What --set, --data and --skip-unreadable change of the recipe."""
    changes = list(arguments.set)
    if arguments.data:
        changes.append(f"data.source={json.dumps(source(arguments.data))}")
    if getattr(arguments, "skip_unreadable", False):
        changes.append("data.skip_unreadable=true")
    return changes


def source(data: str) -> str:
    """A folder as an absolute path, so that the run finds it from anywhere; a hub name as it is."""
    return str(Path(data).resolve()) if Path(data).exists() else data
