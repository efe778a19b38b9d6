"""Options that several commands share, and the overrides of a recipe that they mean."""

import argparse
import json
from pathlib import Path
from typing import TypeAlias

from prg.recipes import shipped_recipes

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

RECIPES = f"a .toml file or one of {', '.join(shipped_recipes())}"
IMAGES = "images: a folder, parquet files, or a dataset's name on the hub"


def add_data(sub: argparse.ArgumentParser, text: str = IMAGES) -> None:
    """--data, and which columns of it are read."""
    sub.add_argument("--data", help=text)
    for what in ("image", "label"):
        sub.add_argument(
            f"--{what}-column",
            metavar="NAME",
            help=f"of parquet: the column of {what}s, where several could be",
        )


def add_overrides(sub: argparse.ArgumentParser, data: str = IMAGES) -> None:
    """--data and --set."""
    add_data(sub, data)
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
    """What --set and the flags about images change of the recipe."""
    return [*arguments.set, *(f"data.{key}={json.dumps(value)}" for key, value in images(arguments).items())]


def images(arguments: argparse.Namespace) -> dict[str, str | bool]:
    """What --data, the columns and --skip-unreadable change of a recipe's `data`."""
    given = {
        "source": source(arguments.data) if arguments.data else "",
        "image_column": arguments.image_column,
        "label_column": arguments.label_column,
        "skip_unreadable": getattr(arguments, "skip_unreadable", False),
    }
    return {key: value for key, value in given.items() if value}


def source(data: str) -> str:
    """A folder as an absolute path, so that the run finds it from anywhere; a hub name as it is."""
    return str(Path(data).resolve()) if Path(data).exists() else data
