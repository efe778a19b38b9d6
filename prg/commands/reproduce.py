"""prg reproduce: all stages of a recipe."""

import argparse
from pathlib import Path

from prg.commands.options import RECIPES, Commands, add_overrides, add_skip_unreadable, overrides


def add(commands: Commands) -> None:
    """Its options."""
    sub = commands.add_parser(
        "reproduce",
        help="a recipe's whole experiment: pretrain, finetune, export, evaluate",
        description="Run all stages of a recipe, the entry written to RUN/entry with its figures on the test split. "
        "The same command again continues it, and does nothing anew.",
    )
    sub.add_argument("recipe", help=RECIPES)
    sub.add_argument("run", type=Path, help="folder of the run")
    add_overrides(sub)
    add_skip_unreadable(sub)
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, and of each stage the steps, the hours here and estimated GPU-hours; stop",
    )
    sub.set_defaults(command=_reproduce, several=True)


def _reproduce(arguments: argparse.Namespace) -> None:
    from prg.console import is_main_process
    from prg.recipe import load_recipe
    from prg.reproduce import reproduce
    from prg.training.costs import plan
    from prg.training.processes import joined
    from prg.training.run import Run

    run = Run(arguments.run, load_recipe(arguments.recipe, overrides(arguments)))
    if arguments.dry_run:
        run.check_classes()
        print(plan(run, ("pretrain", "finetune", "evaluate")))
        return
    with joined():
        for line in reproduce(run):
            if is_main_process():
                print(line, flush=True)
