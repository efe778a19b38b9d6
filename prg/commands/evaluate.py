"""prg evaluate: accuracy of a run or an entry, or the answer of a study."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prg.commands.options import Commands, add_data, add_skip_unreadable, images
from prg.commands.studies import STUDIES, answer

if TYPE_CHECKING:
    from prg.studies.report import Report

MODELS = {"pretrain": "pretrained model", "finetune": "fine-tuned model"}


def add(commands: Commands) -> None:
    """Its options."""
    sub = commands.add_parser(
        "evaluate",
        help="measure top-1, top-5 and calibration, or answer another question with --study",
        description="Classify a test split with the exported module itself, on the preprocessing that is served; "
        "or, with --study, answer one of these:\n"
        + "\n".join(
            f"  {name:11} {s.question} (of a run: its {MODELS[s.stage]}; {s.limit} images)"
            for name, s in STUDIES.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("target", type=Path, help="a run folder, or an entry of a model repository")
    add_data(sub, "images with labels; by default those of the run")
    add_skip_unreadable(sub)
    sub.add_argument(
        "--split", default="", help="by default test, else validation, else the images held out from training"
    )
    sub.add_argument(
        "--seen",
        action="store_true",
        help="evaluate on the training split although the model may have been trained on it; the figures say so",
    )
    sub.add_argument("--model-version", help="of an entry; by default the highest")
    sub.add_argument("--write", action="store_true", help="write the figures into the entry")
    sub.add_argument("--out", type=Path, help="folder for JSON, Markdown table and figures")
    sub.add_argument("--study", choices=STUDIES, help="needs --out")
    sub.add_argument("--limit", type=_count, help="at most so many images")
    sub.add_argument(
        "--stage", choices=("pretrain", "finetune"), help="of a run, for a study: which of its models"
    )
    sub.add_argument(
        "--judge",
        type=Path,
        help="entry in whose features generated images are compared; by default the target",
    )
    sub.set_defaults(command=_evaluate)


def _count(text: str) -> int:
    """A number of images: argparse names the flag where this raises."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} images: at least one is needed")
    return number


def _evaluate(arguments: argparse.Namespace) -> None:
    _check(arguments)
    from prg.recipe import Data
    from prg.target import open_target

    study = STUDIES[arguments.study] if arguments.study else None
    with tempfile.TemporaryDirectory() as scratch:
        target = open_target(
            arguments.target,
            arguments.stage or (study.stage if study else "finetune"),
            Path(scratch),
            Data.model_validate(images(arguments)),
            arguments.model_version,
            arguments.seen,
        )
        if study:
            report = answer(
                arguments.study, target, arguments.judge, arguments.split, arguments.limit or study.limit
            )
            _write(report, arguments, arguments.study)
            return
        from prg.evaluation import evaluate, record
        from prg.images.sets import sample

        name, found = target.material.evaluated(arguments.split)
        result = evaluate(target.entry, sample(found, arguments.limit), name, target.version)
    if arguments.write:
        record(arguments.target, result)
    if arguments.out:
        from prg.studies.accuracy import accuracy

        _write(accuracy(result, arguments.target.resolve().name), arguments, "accuracy")
    figures = result.accuracy.model_dump() | {"ece": result.reliability.ece, "nll": result.reliability.nll}
    _show(figures, result.entry.prg.labels or (), result.confusion.tolist())


def _check(arguments: argparse.Namespace) -> None:
    """Raise what can be known before any work: EntryError for flags that don't go together, OSError for --out."""
    from entry.config import EntryError

    study = STUDIES[arguments.study] if arguments.study else None
    for flag in ("stage", "judge"):
        if getattr(arguments, flag) and not study:
            raise EntryError(f"--{flag} goes with --study")
    if arguments.write and arguments.limit:
        raise EntryError("--write goes without --limit: an entry's figures are of the whole split")
    if arguments.write and (arguments.target / "recipe.json").is_file():
        raise EntryError("--write needs an entry, so export the run first")
    about = f"--study {arguments.study}: "
    if study and not arguments.out:
        raise EntryError(f"{about}say with --out which folder the answer goes to")
    if study and arguments.write:
        raise EntryError(f"{about}--write is for accuracy alone")
    if study and arguments.split and not study.test:
        raise EntryError(f"{about}is made on the training split, so it takes no --split")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.out).close()


def _write(report: "Report", arguments: argparse.Namespace, name: str) -> None:
    """The answer into --out, with what it holds for; the paths written, one a line."""
    from prg.studies.report import conditions, write

    command = ["prg evaluate", _typed(arguments.target)]
    command += ["--data", Path(arguments.data).name] if arguments.data else []
    for flag in ("image-column", "label-column", "split", "study", "stage", "limit", "judge"):
        value = getattr(arguments, flag.replace("-", "_"))
        command += [f"--{flag}", _typed(value) if isinstance(value, Path) else str(value)] if value else []
    command += [
        f"--{flag}" for flag in ("skip-unreadable", "seen") if getattr(arguments, flag.replace("-", "_"))
    ]
    command += ["--out", _typed(arguments.out)]
    facts = {"command": " ".join(command), **report.conditions, **conditions()}
    for path in write(replace(report, conditions=facts), arguments.out, name):
        print(path)


def _typed(path: Path) -> str:
    """A path as others may type it: one from elsewhere on this machine by its name alone."""
    return path.name if path.is_absolute() else str(path)


def _show(accuracy: dict[str, object], labels: tuple[str, ...], confusion: list[list[int]]) -> None:
    """Per-class accuracy for a person, then one JSON line for a program."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{accuracy['data']}: {accuracy['images']} images")
    for column in ("class", "images", "right", "most often taken for"):
        table.add_column(column, justify="left" if column[0] in "cm" else "right")
    for i, label in enumerate(labels):
        row = confusion[i]
        wrong = max((n, labels[j]) for j, n in enumerate(row) if j != i) if len(labels) > 1 else (0, "")
        taken = f"{wrong[1]} ({wrong[0]})" if wrong[0] else ""
        table.add_row(label, str(sum(row)), f"{row[i] / sum(row):.1%}" if sum(row) else "–", taken)
    Console(stderr=True).print(table)
    print(json.dumps(accuracy))
