"""prg evaluate: accuracy of a run or an entry, or one of the studies."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from entry.config import EntryError, read_entry
from prg.commands.options import Commands, add_skip_unreadable, overrides, source
from prg.recipe import load_recipe
from prg.studies.catalogue import STUDIES

if TYPE_CHECKING:
    from prg.studies.report import Report
    from prg.training.data import Images

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
    sub.add_argument("--data", help="images with labels; by default those of the run")
    add_skip_unreadable(sub)
    sub.add_argument("--split", help="by default test, else validation, else (of a run) the images held back")
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
        help="entry in whose HIDDEN generated images are compared; by default the target",
    )
    sub.set_defaults(command=_evaluate)


def _count(text: str) -> int:
    """A number of images: argparse names the flag where this raises."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} images: at least one is needed")
    return number


def _check_target(target: Path) -> None:
    """Raise EntryError where it is neither a run nor an entry."""
    if not any((target / name).is_file() for name in ("recipe.json", "config.pbtxt")):
        there = "no run and no entry" if target.is_dir() else "no such folder"
        raise EntryError(
            f"{target}: {there}; name the folder of a run, or of an entry such as model_repository/prg-cifar10"
        )


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.study:
        _study(arguments)
        return
    from prg.studies.subject import some
    from prg.training.data import load_split
    from prg.training.evaluate import evaluate, record
    from prg.training.publish import publish
    from prg.training.run import demand_test, open_run
    from prg.training.sources import splits

    _check_out(arguments)
    _check_target(arguments.target)
    for flag in ("stage", "judge"):
        if getattr(arguments, flag):
            raise EntryError(f"--{flag} goes with --study")
    if arguments.write and arguments.limit:
        raise EntryError("--write goes without --limit: an entry's figures are of the whole split")
    target: Path = arguments.target
    with tempfile.TemporaryDirectory() as temporary:
        if (target / "recipe.json").is_file():
            if arguments.write:
                raise EntryError(f"{target}: is a run; --write needs an entry, so export it first")
            run = open_run(target, load_recipe(str(target / "recipe.json"), overrides(arguments)))
            entry = Path(temporary) / "run"
            publish(run, "finetune", entry, "fp32", compact=False)
            name, images = run.test_images(arguments.split)
        else:
            entry = target
            spec = read_entry(entry).prg.image
            if not arguments.data:
                raise EntryError(f"{target}: say with --data which images to evaluate it on")
            data = source(arguments.data)
            found = splits(data)
            split = demand_test(found, arguments.split or "", data)
            name = f"{Path(data).name}/{split}"
            images = load_split(found[split], spec, Path(temporary), arguments.skip_unreadable)
        _check_seen(entry, arguments.model_version, name, images, arguments.write)
        images = some(images, arguments.limit)
        result = evaluate(entry, images, name, arguments.model_version)
    if arguments.write:
        record(target, result)
    if arguments.out:
        from prg.studies.accuracy import accuracy

        fingerprint = result.entry.fingerprint(result.version)
        model = {"model": target.resolve().name, "fingerprint": fingerprint}
        _write(accuracy(result), arguments, "accuracy", model)
    figures = result.accuracy.model_dump() | {"ece": result.calibration.ece, "nll": result.calibration.nll}
    _show(figures, result.entry.prg.labels or (), result.confusion.tolist())


def _check_seen(entry: Path, number: str | None, name: str, images: "Images", write: bool) -> None:
    """Say where the model was trained on these images. Raises EntryError where that were its written figures."""
    from prg.training.held_back import gave_some_of, told_by_entry
    from prg.training.processes import note

    told = read_entry(entry)
    version = told.prg.versions.get(number or told.default_version)
    if version is None or not gave_some_of(images, told_by_entry(version.training)):
        return
    if write:
        raise EntryError(f"{name}: the model was trained on these images; --write is for others")
    note(f"the model was trained on {name} but for a share held back: it is judged too well by it")


def _study(arguments: argparse.Namespace) -> None:
    from prg.studies.target import open_target

    study = STUDIES[arguments.study]
    if not arguments.out:
        raise EntryError(f"--study {arguments.study}: say with --out which folder the answer goes to")
    if arguments.write:
        raise EntryError(f"--study {arguments.study}: --write is for accuracy alone")
    if arguments.split and not study.test:
        raise EntryError(f"--study {arguments.study}: is made on the training split, so it takes no --split")
    _check_out(arguments)
    _check_target(arguments.target)
    with tempfile.TemporaryDirectory() as scratch:
        subject, material = open_target(
            arguments.target,
            arguments.stage or study.stage,
            Path(scratch),
            source(arguments.data) if arguments.data else None,
            arguments.skip_unreadable,
            arguments.split,
            arguments.model_version,
            arguments.judge,
        )
        report = study.run(subject, material, arguments.limit or study.limit)
    weights = {"fingerprint": subject.entry.fingerprint(subject.version)}
    if (arguments.target / "recipe.json").is_file():  # what it was exported to is gone
        weights = {"checkpoint": subject.prg.versions[subject.version].training["checkpoint"][:12]}
    model = {"model": subject.name, **weights, "data": material.source}
    _write(report, arguments, arguments.study, model)


def _check_out(arguments: argparse.Namespace) -> None:
    """Raises OSError, before any work, where --out is no folder that can be written to."""
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.out).close()


def _write(report: "Report", arguments: argparse.Namespace, name: str, model: dict[str, str]) -> None:
    """The answer into --out, with what it holds for; the paths written, one a line."""
    from prg.studies.report import conditions, write

    command = ["prg evaluate", _told(arguments.target)]
    command += ["--data", Path(arguments.data).name] if arguments.data else []
    for flag in ("split", "study", "stage", "limit", "judge"):
        value = getattr(arguments, flag)
        command += [f"--{flag}", _told(value) if isinstance(value, Path) else str(value)] if value else []
    command += ["--out", _told(arguments.out)]
    facts = {"command": " ".join(command), **model, **report.conditions, **conditions()}
    for path in write(replace(report, conditions=facts), arguments.out, name):
        print(path)


def _told(path: Path) -> str:
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
