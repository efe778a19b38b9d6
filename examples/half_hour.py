"""A GPU for half an hour: CIFAR-10 to exported entries, in sittings that end by themselves, the result in small parts.

python examples/half_hour.py --data cifar10/ --run runs/gpu --out parts/

Each call works for at most --sitting minutes, writes what there is into --out and ends: with status 75 where the
same call is to be made again, with 0 once all is done. How many epochs fit into --minutes, which count from the first
call, is found by a few real steps before each stage, and remembered in the run: however often it is interrupted, it
stays one run. The parts are joined where they arrive:

cat result.tar.[0-9][0-9] > result.tar && sha256sum -c result.tar.sha256 && tar xf result.tar
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from entry.config import EntryError, read_entry, sha256, write_atomically
from entry.runner import Runner
from prg.checkpoint import CheckpointError, read_facts
from prg.export import ExportError, least_cosine, relative_difference
from prg.recipe import RecipeError, load_recipe
from prg.training.data import Images
from prg.training.evaluate import evaluate, record
from prg.training.finetune import finetune, finetuning_job
from prg.training.loop import Job, Trainer, device_name
from prg.training.precision import choose_precision
from prg.training.pretrain import pretrain, pretraining_job
from prg.training.processes import Interrupted
from prg.training.publish import publish
from prg.training.reproduce import finished, is_exported
from prg.training.run import Run, choose_device
from prg.training.sources import DataError

Stage = Literal["pretrain", "finetune"]

AGAIN = 75
"""Exit status (sysexits' EX_TEMPFAIL): not done yet, make the same call again."""
STAGES: dict[Stage, float] = {"pretrain": 0.3, "finetune": 1.0}
"""Each stage's share of the training time left when it begins."""
LAST: dict[Stage, str] = {"pretrain": "trajectory.png", "finetune": "metrics.jsonl"}
"""The file of a stage by which it is known to have ended."""
ENDING_S = 60.0
"""Kept for export, evaluation and packing."""
RESTART_S = 45.0
"""Kept for each further call: its start, imports, images, packing."""
MARGIN = 0.95
"""Share of the time that is planned: a GPU is not equally fast all the time."""
WARM_UP_STEPS, PROBE_S = 10, 4.0
COMPARED = 256
"""Images on which the devices are compared."""
PART_BYTES = 15 << 20


@dataclass
class Plan:
    """What a run decided once, kept in its folder."""

    begun: float
    """Of the first call, in seconds since 1970."""
    minutes: float
    epochs: dict[Stage, float] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.begun + self.minutes * 60 - time.time()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0 when all is done, 75 when it is to be called again, 1 for an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, kept between the calls")
    parser.add_argument("--out", type=Path, required=True, help="where the parts of the result go")
    parser.add_argument("--recipe", default="cifar10-gpu", help="(default: cifar10-gpu)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of it")
    parser.add_argument("--name", default="prg-cifar10", help="of the entry (default: prg-cifar10)")
    parser.add_argument("--minutes", type=float, default=23.0, help="from the first call on (default: 23)")
    parser.add_argument(
        "--sitting", type=float, default=8.25, help="minutes that one call trains (default: 8.25)"
    )
    asked = parser.parse_args(argv)
    if min(asked.minutes, asked.sitting) <= 0:
        parser.error("--minutes and --sitting must be above 0")
    torch.backends.cudnn.benchmark = True
    try:
        return work(asked)
    except (
        RecipeError,
        CheckpointError,
        DataError,
        EntryError,
        ExportError,
        FloatingPointError,
        OSError,
    ) as error:
        print(f"half_hour: {error}", file=sys.stderr)
        return 1


def work(asked: argparse.Namespace) -> int:
    """One call: train until the clock stops it, then pack; if it is not stopped, evaluate first."""
    path = asked.run / "half-hour.json"
    plan = load_plan(path, asked.minutes)
    try:
        with clock(asked.sitting * 60):
            for stage in STAGES:
                if stage not in plan.epochs:
                    plan.epochs[stage] = fitting_epochs(
                        open_run(asked, plan), stage, plan, asked.sitting * 60
                    )
                    save_plan(path, plan)
                train(open_run(asked, plan), stage)
    except Interrupted as stopped:
        run = open_run(asked, plan)
        export_entries(run, asked.name)
        pack(run, asked.out, report(run, plan, finished=False))
        print(f"{stopped}; {plan.left_s / 60:.1f} of {plan.minutes:g} minutes are left")
        print("NOT DONE: make the same call again")
        return AGAIN
    run = open_run(asked, plan)
    export_entries(run, asked.name)
    entry = result_folder(run) / asked.name
    name, images = run.test_images()
    judged = evaluate(entry, images, name, device=choose_device().type)
    record(entry, judged)
    differs = compare_devices(entry, images)
    found = report(run, plan, finished=True)
    found |= {"accuracy": judged.accuracy.model_dump(), "ece": judged.calibration.ece, "devices": differs}
    for part in pack(run, asked.out, found):
        print(f"{part} ({part.stat().st_size / 1e6:.1f} MB)")
    print(json.dumps(found))
    if not differs["within_tolerance"]:
        print(
            "half_hour: this device's answers are outside the entry's tolerance of the processor's",
            file=sys.stderr,
        )
        return 1
    print("DONE")
    return 0


def load_plan(path: Path, minutes: float) -> Plan:
    """The run's plan, or that of a run that begins now."""
    if path.is_file():
        return Plan(**json.loads(path.read_text("utf-8")))
    plan = Plan(time.time(), minutes)
    save_plan(path, plan)
    return plan


def save_plan(path: Path, plan: Plan) -> None:
    """Write it, whatever interrupts this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(plan)) + "\n").encode())


def open_run(asked: argparse.Namespace, plan: Plan) -> Run:
    """The run, by its recipe and the epochs that are settled."""
    settled = [f"{stage}.epochs={epochs}" for stage, epochs in plan.epochs.items()]
    source = f"data.source={json.dumps(str(asked.data.resolve()))}"
    return Run(asked.run, load_recipe(asked.recipe, [*asked.set, source, *settled]))


@contextmanager
def clock(seconds: float) -> Iterator[None]:
    """SIGTERM to this process after so many seconds: a training loop ends after its step, all else is interrupted."""

    def stop(*_: object) -> None:
        raise Interrupted("stopped between two trainings")

    handlers = {
        signal.SIGTERM: stop,
        signal.SIGALRM: lambda *_: os.kill(os.getpid(), signal.SIGTERM),
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def stage_job(run: Run, stage: Stage) -> Job:
    """What a stage trains."""
    if stage == "pretrain":
        return pretraining_job(run)
    return finetuning_job(run, run.pretrained, *run.training_images())


def train(run: Run, stage: Stage) -> None:
    """A stage, from its checkpoint where there is one; nothing where it has ended."""
    if finished(stage_job(run, stage), LAST[stage]):
        return
    if stage == "pretrain":
        pretrain(run)
    else:
        finetune(run)


def fitting_epochs(run: Run, stage: Stage, plan: Plan, sitting_s: float) -> float:
    """The recipe's epochs, or as many as the stage's share of the time left allows; at least one."""
    job = stage_job(run, stage)
    each = epoch_seconds(job)
    left = plan.left_s - ENDING_S
    seconds = STAGES[stage] * MARGIN * (left - RESTART_S * max(0, left // sitting_s))
    epochs = min(job.config.epochs, max(1.0, round(seconds / each, 2)))
    print(
        f"plan: {stage} {epochs:g} epochs of {each:.2f} s ({plan.left_s / 60:.1f} minutes left)", flush=True
    )
    return epochs


def epoch_seconds(job: Job) -> float:
    """Time of an epoch and its validation, by real steps of a trainer that is thrown away."""
    job = replace(job, config=replace(job.config, epochs=1000))
    with closing(Trainer(job)) as trainer:
        trainer.model.train()
        wanted = job.config.precision
        trainer.precision = (
            choose_precision(lambda p: trainer.loss(trainer.step, p), trainer.model, None)
            if wanted == "auto"
            else wanted
        )
        for _ in range(WARM_UP_STEPS):
            trainer.advance()
        step = seconds_each(trainer.advance, job.device)
        with trainer.averaged() as model:
            job.validate(model)  # the first one has its kernels to choose
            validation = seconds_each(lambda: job.validate(model), job.device, at_most=1)
    return step * job.steps_per_epoch + validation


def seconds_each(action: Any, device: torch.device, at_most: int = 200) -> float:
    """Mean time of an action, over some seconds."""
    count, start = 0, time.perf_counter()
    while count < at_most and (count == 0 or time.perf_counter() - start < PROBE_S):
        action()
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def result_folder(run: Run) -> Path:
    """What is packed."""
    return run.folder / "result"


def export_entries(run: Run, name: str) -> None:
    """The entry NAME, and NAME-pretrained, of the checkpoints as they are now."""
    stages: dict[Stage, tuple[Path, str]] = {
        "finetune": (run.finetuned, name),
        "pretrain": (run.pretrained, f"{name}-pretrained"),
    }
    for stage, (checkpoint, label) in stages.items():
        entry = result_folder(run) / label
        if checkpoint.is_file() and not is_exported(checkpoint, entry):
            shutil.rmtree(entry, ignore_errors=True)
            publish(run, stage, entry, "fp32", compact=True)


def compare_devices(entry: Path, images: Images) -> dict[str, Any]:
    """This device's answers beside the processor's: largest relative difference and least cosine of each output."""
    tolerance = read_entry(entry).prg.tolerance
    pixels = images.pixels[:COMPARED]
    answers = []
    for device in ("cpu", choose_device().type):
        runner = Runner(entry, device=device)
        levels = np.full(len(pixels), (runner.entry.prg.classify_t_end or (1.0,))[0], np.float32)
        found = runner.run(pixels, levels)
        assert found.logits is not None
        answers.append({"STATE": found.state, "HIDDEN": found.hidden, "LOGITS": found.logits})
    expected, here = answers
    relative = {k: relative_difference(here[k], expected[k]) for k in expected}
    cosine = {k: least_cosine(here[k], expected[k]) for k in expected}
    return {
        "images": len(pixels),
        "relative": relative,
        "cosine": cosine,
        "same_class": float((here["LOGITS"].argmax(1) == expected["LOGITS"].argmax(1)).mean()),
        "within_tolerance": max(relative.values()) <= tolerance.relative
        and min(cosine.values()) >= tolerance.cosine,
    }


def report(run: Run, plan: Plan, *, finished: bool) -> dict[str, Any]:
    """How far the run is, and on what."""
    stages = {}
    for stage, checkpoint in (("pretrain", run.pretrained), ("finetune", run.finetuned)):
        if checkpoint.is_file():
            facts = read_facts(checkpoint)
            stages[stage] = {k: facts[k] for k in ("step", "steps", "seconds", "precision")}
    return {
        "finished": finished,
        "device": device_name(choose_device()),
        "torch": torch.__version__,
        "plan": asdict(plan),
        "stages": stages,
    }


def pack(run: Run, out: Path, found: dict[str, Any]) -> list[Path]:
    """Entries, figures and the report as result.tar, in parts with its checksum; what was in `out` of it goes."""
    folder = result_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    for stage in STAGES:
        for file in sorted((run.folder / stage).glob("*.*")):
            if file.suffix in (".jsonl", ".png"):
                (folder / stage).mkdir(exist_ok=True)
                shutil.copy(file, folder / stage)
    archive = run.folder / "result.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, folder.name)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("result.tar.*"):
        old.unlink()
    parts: list[Path] = []
    with archive.open("rb") as content:
        while piece := content.read(PART_BYTES):
            parts.append(out / f"result.tar.{len(parts):02}")
            parts[-1].write_bytes(piece)
    digest = out / "result.tar.sha256"
    digest.write_text(f"{sha256(archive)}  {archive.name}\n")
    return [*parts, digest]


if __name__ == "__main__":
    sys.exit(main())
