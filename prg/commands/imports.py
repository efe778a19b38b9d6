"""prg import: networks that others trained, as runs."""

import argparse
from pathlib import Path

from prg.commands.options import RECIPES, Commands, add_overrides, overrides


def add(commands: Commands) -> None:
    """A command a kind of checkpoint."""
    kinds = commands.add_parser(
        "import",
        help="make a run of a network that others trained",
        description="Make a run of a network that others trained; finetune, evaluate and export take it as their own.",
    ).add_subparsers(required=True, metavar="KIND")
    for kind, command, metavar, text in (
        ("official", _official, "FILE", "a checkpoint (.pt) of the official PRG release"),
        (
            "diffusers",
            _diffusers,
            "DIR",
            "a folder of a diffusers UNet2DModel that was trained as a DDPM",
        ),
    ):
        sub = kinds.add_parser(kind, help=text, description=f"Import {text}.")
        sub.add_argument("source", type=Path, metavar=metavar, help=text)
        sub.add_argument("run", type=Path, help="folder of the new run")
        sub.add_argument("--recipe", required=True, help=RECIPES)
        add_overrides(sub, "images that the embedding is fitted to; a head's classes are named after them")
        sub.set_defaults(command=command)


def _official(arguments: argparse.Namespace) -> None:
    from prg.importers.imported import write_run
    from prg.importers.official import import_official
    from prg.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides(arguments))
    run = write_run(arguments.run, import_official(arguments.source, recipe))
    what, then = ("network and head", "evaluate") if run.finetuned.exists() else ("network", "finetune")
    print(f"imported {what}: {run.folder}\nnext: prg {then} {run.folder}")


def _diffusers(arguments: argparse.Namespace) -> None:
    from prg.importers.diffusers import import_diffusers
    from prg.importers.imported import write_run

    run = write_run(arguments.run, import_diffusers(arguments.source, arguments.recipe, overrides(arguments)))
    print(f"imported network: {run.folder}\nnext: prg finetune {run.folder}")
