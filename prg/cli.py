"""The offline scripts: prg pretrain | finetune | evaluate | export | import | embed | reproduce."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from entry.config import EntryError, read_entry

try:
    from prg.checkpoint import CheckpointError
    from prg.recipe import Recipe, RecipeError, load_recipe, shipped_recipes
    from prg.studies.catalogue import STUDIES
except ModuleNotFoundError as missing:  # the service alone is installed without them
    raise SystemExit(
        f"prg: {missing.name} is not installed; run `make setup`, or pip install -e '.[embedded,train]'"
    ) from None

if TYPE_CHECKING:
    from prg.studies.report import Report
    from prg.training.evaluate import Evaluation

EXAMPLE = """
a whole run, on your own images (one sub-folder a class):
  prg pretrain runs/mine --recipe images-64 --data photos/
  prg finetune runs/mine
  prg evaluate runs/mine
  prg export   runs/mine model_repository/mine
  prg-serve
"""
MODELS = {"pretrain": "pretrained model", "finetune": "fine-tuned model"}
FREEZE = ["finetune.freeze=true", "finetune.head=linear", "finetune.head_input=hidden"]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error that was explained, 130 after an interruption."""
    arguments = _parser().parse_args(argv)
    import httpx

    from prg.client import ServiceError
    from prg.export import ExportError
    from prg.training.data import DataError
    from prg.training.processes import Interrupted, ProcessError, be_alone

    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        if command not in (_pretrain, _finetune, _reproduce) or arguments.dry_run:
            be_alone()
        command(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prg",
        description="Pretrain, fine-tune, evaluate and export reversed generative flows.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, command, text in (
        ("pretrain", _pretrain, "train a velocity network on images without labels"),
        ("finetune", _finetune, "train encoder and head together, through the reverse ODE"),
    ):
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("run", type=Path, help="folder of the run; the same command again continues it")
        sub.add_argument(
            "--recipe",
            help=f"a .toml file or one of {', '.join(shipped_recipes())}; by default the run's own",
        )
        sub.add_argument("--data", help="images: a folder, parquet files, or a dataset's name on the hub")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a key of the recipe, such as finetune.epochs=3; may be repeated",
        )
        sub.add_argument(
            "--skip-unreadable", action="store_true", help="leave out files that are no images, and list them"
        )
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
        sub.set_defaults(command=command)

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

    sub = commands.add_parser(
        "export",
        help="write a model repository entry",
        description="Write the run's model as a new version of an entry that Triton or prg-serve loads.",
    )
    sub.add_argument("run", type=Path, help="folder of the run")
    sub.add_argument("entry", type=Path, help="folder of the entry, such as model_repository/mine")
    sub.add_argument(
        "--stage",
        choices=("finetune", "pretrain"),
        default="finetune",
        help="pretrain: an entry without head, for /embed alone (default: finetune)",
    )
    sub.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    sub.add_argument(
        "--compact",
        action="store_true",
        help="round the weights to bfloat16 and compress the file, to about half its bytes",
    )
    sub.set_defaults(command=_export)

    _add_import(commands)

    sub = commands.add_parser(
        "embed",
        help="embed folders of images into one file",
        description="Embed images into a .npy (with a .jsonl of paths beside it) or a .parquet. The same command "
        "again continues an interrupted one; a bad file is a row of NaN with its error.",
        epilog="example: prg embed photos/ --entry model_repository/prg-cifar10 --out vectors.parquet",
    )
    sub.add_argument("paths", nargs="+", help="folders (all levels of them), files, or patterns in quotes")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="NAME.parquet, or NAME.npy with NAME.jsonl and NAME.about.json",
    )
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--entry", type=Path, help="compute here, with this entry, such as model_repository/mine"
    )
    where.add_argument(
        "--url", help="ask this service, such as http://127.0.0.1:8000; a key, if it needs one, in PRG_KEY"
    )
    sub.add_argument("--model", help="of the service; by default its own choice")
    sub.add_argument("--t-end", type=float, help="from 0 (noise) to 1 (the image); by default the model's")
    sub.add_argument("--feature", choices=("state", "hidden"), help="by default the model's")
    sub.add_argument("--normalize", action="store_true", help="scale each embedding to length 1")
    sub.set_defaults(command=_embed)

    sub = commands.add_parser(
        "reproduce",
        help="a recipe's whole experiment: pretrain, finetune, export, evaluate",
        description="Run all stages of a recipe, the entry written to RUN/entry with its figures on the test split. "
        "The same command again continues it, and does nothing anew.",
    )
    sub.add_argument("recipe", help=f"a .toml file or one of {', '.join(shipped_recipes())}")
    sub.add_argument("run", type=Path, help="folder of the run")
    sub.add_argument("--data", help="images: a folder, parquet files, or a dataset's name on the hub")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe"
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, and of each stage the steps, the hours here and estimated GPU-hours; stop",
    )
    sub.set_defaults(command=_reproduce)
    return parser


def _count(text: str) -> int:
    """A number of images: argparse names the flag where this raises."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} images: at least one is needed")
    return number


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    kinds = commands.add_parser(
        "import",
        help="make a run of a network that others trained",
        description="Make a run of a network that others trained; finetune, evaluate and export take it as their own.",
    ).add_subparsers(required=True, metavar="KIND")
    for kind, command, metavar, text in (
        ("official", _import_official, "FILE", "a checkpoint (.pt) of the official PRG release"),
        (
            "diffusers",
            _import_diffusers,
            "DIR",
            "a folder of a diffusers UNet2DModel that was trained as a DDPM",
        ),
    ):
        sub = kinds.add_parser(kind, help=text, description=f"Import {text}.")
        sub.add_argument("source", type=Path, metavar=metavar, help=text)
        sub.add_argument("run", type=Path, help="folder of the new run")
        sub.add_argument(
            "--recipe", required=True, help=f"a .toml file or one of {', '.join(shipped_recipes())}"
        )
        sub.add_argument("--data", help="images for what comes next; a head's classes are named after them")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe"
        )
        sub.set_defaults(command=command)


def _recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe that the flags describe, None if they leave it to the run."""
    overrides = [*getattr(arguments, "freeze", []), *arguments.set, *_data_override(arguments.data)]
    if arguments.skip_unreadable:
        overrides.append("data.skip_unreadable=true")
    own = arguments.run / "recipe.json"
    if arguments.recipe is None and not overrides:
        return None
    if arguments.recipe is None and not own.is_file():
        raise RecipeError(f"{own}: no run here yet; begin one with --recipe")
    return load_recipe(arguments.recipe or str(own), overrides)


def _source(data: str) -> str:
    """A folder as an absolute path, so that the run finds it from anywhere; a hub name as it is."""
    return str(Path(data).resolve()) if Path(data).exists() else data


def _pretrain(arguments: argparse.Namespace) -> None:
    from prg.training import processes
    from prg.training.memory import keep_freed_memory
    from prg.training.pretrain import pretrain
    from prg.training.run import open_run

    if arguments.dry_run:
        _dry_run(arguments, "pretrain")
        return
    keep_freed_memory()
    with processes.joined():
        run = open_run(arguments.run, _recipe(arguments))
        pretrain(run)
        if processes.writes():
            print(f"pretrained: {run.pretrained}\nnext: prg finetune {arguments.run}")


def _finetune(arguments: argparse.Namespace) -> None:
    from prg.training import processes
    from prg.training.finetune import finetune
    from prg.training.memory import keep_freed_memory
    from prg.training.run import open_run

    if arguments.dry_run:
        _dry_run(arguments, "finetune")
        return
    keep_freed_memory()
    with processes.joined():
        run = open_run(arguments.run, _recipe(arguments))
        finetune(run, arguments.init)
        if processes.writes():
            print(f"fine-tuned: {run.finetuned}\nnext: prg evaluate {arguments.run}")


def _dry_run(arguments: argparse.Namespace, stage: str) -> None:
    from prg.training.dry_run import describe

    recipe = _recipe(arguments) or load_recipe(str(arguments.run / "recipe.json"))
    print(describe(recipe, stage))


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.study:
        _study(arguments)
        return
    from prg.studies.subject import some
    from prg.training.data import load_split, splits
    from prg.training.evaluate import evaluate, record
    from prg.training.publish import publish
    from prg.training.run import choose_split, open_run

    target: Path = arguments.target
    with tempfile.TemporaryDirectory() as temporary:
        if (target / "recipe.json").is_file():
            if arguments.write:
                raise EntryError(f"{target}: is a run; --write needs an entry, so export it first")
            recipe = load_recipe(str(target / "recipe.json"), _data_override(arguments.data))
            run = open_run(target, None if not arguments.data else recipe)
            entry = Path(temporary) / "run"
            publish(run, "finetune", entry, "fp32", compact=False)
            name, images = run.test_images(arguments.split)
        else:
            entry = target
            spec = read_entry(entry).prg.image
            if not arguments.data:
                raise EntryError(f"{target}: say with --data which images to evaluate it on")
            source = _source(arguments.data)
            found = splits(source)
            split = choose_split(found, arguments.split or "", source)
            if split is None:
                raise EntryError(f"{source}: no split test or validation; name one with --split")
            name = f"{Path(source).name}/{split}"
            images = load_split(found[split], spec, Path(temporary))
        if arguments.write and arguments.limit:
            raise EntryError("--write goes without --limit: an entry's figures are of the whole split")
        images = some(images, arguments.limit)
        result = evaluate(entry, images, name, arguments.model_version)
    if arguments.write:
        record(target, result)
    if arguments.out:
        from prg.studies.accuracy import accuracy

        _write(accuracy(result), arguments, "accuracy", _model(target.resolve().name, result))
    figures = result.accuracy.model_dump() | {"ece": result.calibration.ece, "nll": result.calibration.nll}
    _print(figures, result.entry.prg.labels or (), result.confusion.tolist())


def _study(arguments: argparse.Namespace) -> None:
    from prg.studies.target import open_target

    study = STUDIES[arguments.study]
    if not arguments.out:
        raise EntryError(f"--study {arguments.study}: say with --out which folder the answer goes to")
    if arguments.write:
        raise EntryError(f"--study {arguments.study}: --write is for accuracy alone")
    data = _source(arguments.data) if arguments.data else None
    with tempfile.TemporaryDirectory() as scratch:
        subject, material = open_target(
            arguments.target,
            arguments.stage or study.stage,
            Path(scratch),
            data,
            arguments.split,
            arguments.model_version,
            arguments.judge,
        )
        report = study.run(subject, material, arguments.limit or study.limit)
    fingerprint = subject.entry.fingerprint(subject.version)
    model = {"model": subject.name, "fingerprint": fingerprint, "data": material.source}
    _write(report, arguments, arguments.study, model)


def _write(report: "Report", arguments: argparse.Namespace, name: str, model: dict[str, str]) -> None:
    """The answer into --out, with what it holds for; the paths written, one a line."""
    from prg.studies.report import conditions, write

    command = ["prg evaluate", _told(arguments.target)]
    command += ["--data", Path(arguments.data).name] if arguments.data else []
    for flag in ("split", "study", "stage", "limit", "judge"):
        value = getattr(arguments, flag)
        command += [f"--{flag}", _told(value) if isinstance(value, Path) else str(value)] if value else []
    command += ["--out", _told(arguments.out)]
    told = {"command": " ".join(command), **model, **report.conditions, **conditions()}
    for path in write(replace(report, conditions=told), arguments.out, name):
        print(path)


def _told(path: Path) -> str:
    """A path as others may type it: one from elsewhere on this machine by its name alone."""
    return path.name if path.is_absolute() else str(path)


def _model(name: str, result: "Evaluation") -> dict[str, str]:
    return {"model": name, "fingerprint": result.entry.fingerprint(result.version)}


def _data_override(data: str | None) -> list[str]:
    return [f"data.source={json.dumps(_source(data))}"] if data else []


def _print(accuracy: dict[str, object], labels: tuple[str, ...], confusion: list[list[int]]) -> None:
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
        table.add_row(label, str(sum(row)), f"{row[i] / max(1, sum(row)):.1%}", taken)
    Console(stderr=True).print(table)
    print(json.dumps(accuracy))


def _export(arguments: argparse.Namespace) -> None:
    from prg.training.publish import publish
    from prg.training.run import open_run

    run = open_run(arguments.run, None)
    version = publish(run, arguments.stage, arguments.entry, arguments.precision, arguments.compact)
    path = arguments.entry / version / "model.pt"
    print(f"exported: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _import_official(arguments: argparse.Namespace) -> None:
    from prg.importers.imported import write_run
    from prg.importers.official import import_official

    recipe = load_recipe(arguments.recipe, [*arguments.set, *_data_override(arguments.data)])
    run = write_run(arguments.run, import_official(arguments.source, recipe))
    what, then = ("network and head", "evaluate") if run.finetuned.exists() else ("network", "finetune")
    print(f"imported {what}: {run.folder}\nnext: prg {then} {run.folder}")


def _import_diffusers(arguments: argparse.Namespace) -> None:
    from prg.importers.diffusers import import_diffusers
    from prg.importers.imported import write_run

    overrides = [*arguments.set, *_data_override(arguments.data)]
    run = write_run(arguments.run, import_diffusers(arguments.source, arguments.recipe, overrides))
    print(f"imported network: {run.folder}\nnext: prg finetune {run.folder}")


def _embed(arguments: argparse.Namespace) -> None:
    from prg.client import EmbedOptions
    from prg.embed import Embedder, Local, Remote, embed
    from prg.training.data import DataError

    if arguments.t_end is not None and not 0 <= arguments.t_end <= 1:
        raise DataError(f"--t-end {arguments.t_end}: must be from 0 to 1")
    embedder: Embedder
    if arguments.url:
        options = EmbedOptions(normalize=arguments.normalize)
        for name in ("model", "t_end", "feature"):
            if getattr(arguments, name) is not None:
                options[name] = getattr(arguments, name)
        embedder = Remote(arguments.url, os.environ.get("PRG_KEY"), options)
    elif arguments.model:
        raise DataError("--model goes with --url; --entry names the model itself")
    else:
        embedder = Local(arguments.entry, arguments.t_end, arguments.feature, arguments.normalize)
    with closing(embedder):
        failed = embed(arguments.paths, arguments.out, embedder)
    print(f"embedded: {arguments.out}" + (f"; {failed} files could not be used" if failed else ""))


def _reproduce(arguments: argparse.Namespace) -> None:
    from prg.training import processes
    from prg.training.memory import keep_freed_memory
    from prg.training.reproduce import plan, reproduce
    from prg.training.run import open_run

    overrides = [*arguments.set, *_data_override(arguments.data)]
    run = open_run(arguments.run, load_recipe(arguments.recipe, overrides))
    if arguments.dry_run:
        print(plan(run))
        return
    keep_freed_memory()
    with processes.joined():
        for line in reproduce(run):
            if processes.writes():
                print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
