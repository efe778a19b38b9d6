"""Reproduce: a recipe's whole experiment in one run folder; what is done of it already stays as it is."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entry.config import read_entry, sha256, write_atomically
from prg.checkpoint import read_facts
from prg.recipe import Optimisation, Recipe, recipe_table
from prg.training import processes
from prg.training.data import Images
from prg.training.dry_run import (
    count_flops,
    flops,
    images_per_second,
    parts,
    random_images,
    training_count,
)
from prg.training.evaluate import BATCH, evaluate, record
from prg.training.figures import can_plot
from prg.training.finetune import finetune, finetuning_job
from prg.training.frozen import views
from prg.training.loop import Job, device_name, is_complete, refuse_other_settings, step_generator, steps_of
from prg.training.pretrain import pretrain, pretraining_job
from prg.training.publish import publish
from prg.training.run import Run, choose_device

GPU_FLOPS = 50e12
"""Sustained FLOP/s assumed of a data-centre GPU: a third of the 156 TFLOP/s that NVIDIA names for an A100 in TF32,
in which cuDNN computes fp32 convolutions by default; kernels of this size seldom reach more."""
PROBE_FLOPS = 2e11
"""Of one timed step on a processor: seconds, also for networks whose whole batch takes minutes there."""


@dataclass(frozen=True)
class Stage:
    """What one stage would cost."""

    name: str
    steps: int
    flops: float
    done: int = 0
    """Steps done already."""


def reproduce(run: Run) -> Iterator[str]:
    """Pretrain, fine-tune, export to the run's `entry` and evaluate that; yields a line after each stage.

    Of several processes all train, and the writer does the rest. Raises whatever the stages raise,
    CheckpointError also where a checkpoint is of another recipe.
    """
    run.check_classes()
    name, images = run.test_images()  # decoded before hours go by: what it can't be judged by is said now
    job = pretraining_job(run)
    yield from _stage("pretrain", lambda: finished(job, "trajectory.png"), lambda: pretrain(run))
    tuning = finetuning_job(run, run.pretrained, *run.training_images())
    drawn = "metrics.jsonl" if run.recipe.finetune.freeze or not can_plot() else "curves.png"
    yield from _stage("finetune", lambda: finished(tuning, drawn), lambda: finetune(run))
    entry = run.folder / "entry"
    yield from _stage(
        "export",
        lambda: is_exported(run.finetuned, entry),
        lambda: processes.told(lambda: publish(run, "finetune", entry, "fp32", compact=False)),
    )
    judged = run.folder / "evaluation.json"
    yield from _stage(
        "evaluate",
        lambda: bool(measured(judged, entry, name, images)),
        lambda: processes.told(lambda: measure(judged, entry, name, images)),
    )
    yield json.dumps(processes.told(lambda: measured(judged, entry, name, images)))


def _stage(name: str, was_done: Callable[[], bool], work: Callable[[], object]) -> Iterator[str]:
    done = processes.told(was_done)
    if not done:
        work()
    yield f"{name}: done{' already' if done else ''}"


def finished(job: Job, last: str) -> bool:
    """Whether the job's checkpoint is that of its last step, and `last`, the file written after it, is there.

    Raises CheckpointError where the checkpoint was begun with other settings.
    """
    if job.checkpoint.exists():
        refuse_other_settings(job, read_facts(job.checkpoint))
    return is_complete(job.checkpoint) and (job.folder / last).exists()


def is_exported(checkpoint: Path, directory: Path) -> bool:
    """Whether the entry's highest version was made of this very checkpoint."""
    if not (directory / "config.pbtxt").is_file():
        return False
    entry = read_entry(directory)
    return entry.prg.versions[entry.default_version].training.get("checkpoint") == sha256(checkpoint)


def measure(path: Path, directory: Path, name: str, images: Images) -> None:
    """Evaluate the entry on images of that name; into the entry, and into `path` with what it was measured of."""
    evaluation = evaluate(directory, images, name)
    record(directory, evaluation)
    told = {"accuracy": evaluation.accuracy.model_dump(), "of": _identity(directory, images)}
    write_atomically(path, (json.dumps(told, indent=2) + "\n").encode())


def measured(path: Path, directory: Path, name: str, images: Images) -> dict[str, Any]:
    """What `measure` found, if it was of these very weights and images, and the entry says so; else nothing."""
    if not path.exists():
        return {}
    told: dict[str, Any] = json.loads(path.read_text())
    entry = read_entry(directory)
    accuracies = [a.model_dump() for a in entry.prg.versions[entry.default_version].accuracy]
    accuracy: dict[str, Any] = told["accuracy"]
    same = told["of"] == _identity(directory, images) and accuracy["data"] == name
    return accuracy if same and accuracy in accuracies else {}


def _identity(directory: Path, images: Images) -> dict[str, Any]:
    entry = read_entry(directory)
    return {"weights": entry.prg.versions[entry.default_version].sha256, "images": images.digests()}


def plan(run: Run) -> str:
    """The resolved recipe, and each stage's steps, hours here and GPU-hours elsewhere; begins nothing."""
    device = choose_device()
    stages = costs(run)
    each = stage_flops(run.recipe, "pretrain")
    batch = run.recipe.pretrain.batch
    if device.type == "cpu":
        batch = int(min(batch, max(1, PROBE_FLOPS // each)))
    speed = images_per_second(run.recipe, "pretrain", device, batch=batch) * each
    lines = [
        json.dumps(recipe_table(run.recipe), indent=2),
        "",
        f"device: {device_name(device)}, {speed / 1e9:.1f} GFLOP/s in a few steps of pretraining in fp32",
        f"{'stage':10} {'steps':>9} {'done':>9} {'PFLOP':>12} {'hours here':>11} {'GPU-hours':>10}",
    ]
    total = Stage(
        "all", sum(s.steps for s in stages), sum(s.flops for s in stages), sum(s.done for s in stages)
    )
    for s in (*stages, total):
        here, there = s.flops / speed / 3600, s.flops / GPU_FLOPS / 3600
        lines.append(
            f"{s.name:10} {s.steps:9,} {s.done:9,} {s.flops / 1e15:12,.4g} {here:11,.4g} {there:10,.3g}"
        )
    lines += [
        "hours here: the stage's FLOPs by the speed above. Export takes minutes at most.",
        "GPU-hours: an estimate: the stage's FLOPs by "
        f"{GPU_FLOPS / 1e12:.0f} TFLOP/s, a third of what an A100 is sold with for TF32.",
    ]
    return "\n".join(lines)


def costs(run: Run) -> list[Stage]:
    """Pretraining, fine-tuning and evaluation, from their beginning. Raises DataError where no images are named."""
    recipe = run.recipe
    run.check_classes()
    train, others = run.sources
    count = training_count(recipe) or 0
    split = run.test_split(others)
    test = others[split].count if split else train.count - count
    _, extraction = flops(recipe)
    stages = [
        _training("pretrain", recipe.pretrain, count, stage_flops(recipe, "pretrain"), run.pretrained),
        _training("finetune", recipe.finetune, count, stage_flops(recipe, "finetune"), run.finetuned),
        Stage("evaluate", -(-test // BATCH), test * extraction),
    ]
    if recipe.finetune.freeze:  # features once; fitting the head is nothing beside them
        stages[1] = Stage("finetune", 1, count * len(views(recipe)) * extraction, stages[1].done)
    return stages


def _training(name: str, config: Optimisation, count: int, each: float, checkpoint: Path) -> Stage:
    steps = steps_of(config, count)
    done = read_facts(checkpoint)["step"] if checkpoint.exists() else 0
    return Stage(name, steps, steps * min(config.batch, count) * each, done)


def stage_flops(recipe: Recipe, stage: str) -> float:
    """FLOPs of training on one image once, forward and back, checkpointed evaluations twice.

    Counted on shapes alone, of one and of two steps of the solve: every further step costs as much as the second.
    """
    if stage == "pretrain":
        return _counted(recipe, stage)
    one, two = (_counted(with_steps(recipe, n), stage) for n in (1, 2))
    return one + (recipe.encoder.steps - 1) * (two - one)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps of the solve."""
    return replace(recipe, encoder=replace(recipe.encoder, steps=steps))


def _counted(recipe: Recipe, stage: str) -> float:
    model, prepare, loss = parts(recipe, stage, torch.device("meta"))
    cpu = torch.device("cpu")
    batch = prepare(*random_images(recipe, 2, cpu), step_generator(0, 0, cpu))
    shapes = tuple(part.to("meta") for part in batch)
    return count_flops(lambda: loss(model, shapes).backward()) / 2
