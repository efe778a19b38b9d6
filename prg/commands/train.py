"""prg pretrain and prg finetune."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prg.commands.options import RECIPES, Commands, add_overrides, add_skip_unreadable, overrides

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
    from prg.training.costs import plan
    from prg.training.loop import is_complete
    from prg.training.pretrain import pretrain
    from prg.training.processes import joined

    if arguments.dry_run:
        print(plan(_run(arguments, []), ("pretrain",)))
        return
    with joined():
        run = _run(arguments, [])
        done = is_complete(run.pretrained)
        pretrain(run)
        then = f"next: prg finetune {run.folder} (with --data LABELLED/ where these images have no labels)"
        _say(run.pretrained, done, then)


def _finetune(arguments: argparse.Namespace) -> None:
    from prg.training.costs import plan
    from prg.training.finetune import begin, finetune
    from prg.training.loop import is_complete
    from prg.training.processes import joined

    if arguments.dry_run:
        run = _run(arguments, arguments.freeze)
        if run.recipe.data.source and (arguments.init or run.pretrained.exists()):
            run.check_classes()
            begin(run, arguments.init)
        print(plan(run, ("finetune",)))
        return
    with joined():
        run = _run(arguments, arguments.freeze)
        done = is_complete(run.finetuned)
        finetune(run, arguments.init)
        frozen = run.recipe.finetune.freeze  # all its images were trained on
        then = (
            f"export {run.folder} model_repository/{run.folder.name}" if frozen else f"evaluate {run.folder}"
        )
        _say(run.finetuned, done, f"next: prg {then}")


def _run(arguments: argparse.Namespace, more: list[str]) -> "Run":
    """The run that the flags describe; without any, as it was begun."""
    from prg.training.run import open_run

    return open_run(arguments.run, arguments.recipe, [*more, *overrides(arguments)])


def _say(checkpoint: Path, done: bool, then: str) -> None:
    from prg.console import is_main_process

    if is_main_process():
        print(f"{'done already' if done else 'trained'}: {checkpoint}\n{then}")
