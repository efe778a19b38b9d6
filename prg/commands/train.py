"""prg pretrain and prg finetune."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prg.commands.options import RECIPES, Commands, add_overrides, add_skip_unreadable, overrides
from prg.recipe import Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from prg.training.run import Run

FREEZE = ["finetune.freeze=true", "finetune.head=linear", "finetune.head_input=hidden"]


def add(commands: Commands) -> None:
    """Both, with the options that they share."""
    for name, command, text in (
        ("pretrain", _pretrain, "train a velocity network on images without labels"),
        ("finetune", _finetune, "train encoder and head together, through the reverse ODE"),
    ):
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("run", type=Path, help="folder of the run; the same command again continues it")
        sub.add_argument("--recipe", help=f"{RECIPES}; by default the run's own")
        add_overrides(sub)
        add_skip_unreadable(sub)
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="print the resolved recipe, the network's size and the hours it will take here, and stop",
        )
        if name == "finetune":
            sub.add_argument(
                "--init",
                type=Path,
                help="what to begin from: a checkpoint of `prg pretrain` or `prg finetune`, or an entry's folder; "
                "by default the run's own pretraining",
            )
            sub.add_argument(
                "--freeze",
                action="store_const",
                const=FREEZE,
                default=[],
                help="keep the encoder and fit a linear head on its hidden features, in minutes: for few labels "
                f"(short for {' '.join(f'--set {item}' for item in FREEZE)}, which --set overrides)",
            )
        sub.set_defaults(command=command, several=True)


def _pretrain(arguments: argparse.Namespace) -> None:
    from prg.training.pretrain import pretrain

    _train(
        arguments,
        "pretrain",
        pretrain,
        f"next: prg finetune {arguments.run} (with --data LABELLED/ where these images have no labels)",
    )


def _finetune(arguments: argparse.Namespace) -> None:
    from prg.training.finetune import finetune

    _train(
        arguments,
        "finetune",
        lambda run: finetune(run, arguments.init),
        f"next: prg evaluate {arguments.run}",
    )


def _train(arguments: argparse.Namespace, stage: str, work: "Callable[[Run], None]", then: str) -> None:
    from prg.training import processes
    from prg.training.dry_run import describe
    from prg.training.finetune import check
    from prg.training.loop import is_complete
    from prg.training.memory import keep_freed_memory
    from prg.training.run import open_run

    if arguments.dry_run:
        run = open_run(arguments.run, _recipe(arguments))
        if stage == "finetune":
            check(run, arguments.init)
        print(describe(run.recipe, stage))
        return
    keep_freed_memory()
    with processes.joined():
        run = open_run(arguments.run, _recipe(arguments))
        checkpoint = arguments.run / stage / "checkpoint.safetensors"
        done = is_complete(checkpoint)
        work(run)
        if processes.writes():
            print(f"{'done already' if done else 'trained'}: {checkpoint}\n{then}")


def _recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe that the flags describe, None if they leave it to the run."""
    changes = [*getattr(arguments, "freeze", []), *overrides(arguments)]
    own = arguments.run / "recipe.json"
    if arguments.recipe is None and not changes:
        return None
    if arguments.recipe is None and not own.is_file():
        raise RecipeError(
            f"{own}: no run here yet; begin one by `prg pretrain` or `prg finetune` with --recipe"
        )
    return load_recipe(arguments.recipe or str(own), changes)
