"""What a run would cost: FLOPs counted on shapes alone, hours from the speed of a few steps on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prg.checkpoint import Stage, read_facts
from prg.encoder import Encoder, EncoderConfig
from prg.machine import best_time, choose_device, device_name
from prg.paths import PATHS
from prg.recipe import Optimisation, Recipe
from prg.trained import build_classifier
from prg.training.finetune import finetuning_batch, finetuning_loss
from prg.training.frozen import views
from prg.training.loop import Loss, Prepare, step_generator, steps_of
from prg.training.pretrain import flow_loss, pretraining_batch
from prg.training.run import Run
from prg.unet import UNet

PROBE_CLASSES = 10
"""The head's size hardly matters for the time; the data's own number of classes is not known beforehand."""
PROBE_IMAGES = 1024
"""At most: more images a step are no faster, and may not fit."""
PROBE_FLOPS = 2e11
"""Of one timed step on a processor: seconds, also for networks whose whole batch takes minutes there."""
GPU_FLOPS = 50e12
"""Sustained FLOP/s assumed of a data-centre GPU: a third of the 156 TFLOP/s that NVIDIA names for an A100 in TF32,
in which cuDNN computes fp32 convolutions by default; kernels of this size seldom reach more."""
EVALUATED_BATCH = 64


@dataclass(frozen=True)
class Cost:
    """What one stage costs from its beginning."""

    name: str
    steps: int
    flops: float
    done: int = 0
    """Steps done already."""


def plan(run: Run, stages: Sequence[str]) -> str:
    """The resolved recipe, the network's size, and steps, FLOPs and hours of the stages; begins nothing.

    stages: of pretrain, finetune, evaluate. Raises DataError where the images can't be used.
    """
    recipe, device = run.recipe, choose_device()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(recipe.unet).parameters())
    once, whole = flops(recipe)
    speed = flops_per_second(recipe, device)
    lines = [
        recipe.model_dump_json(indent=2),
        "",
        f"network {recipe.network}: {parameters:,} parameters, {once / 1e9:.3f} GFLOP an evaluation",
        f"extraction: {recipe.encoder.nfe} evaluations, {whole / 1e9:.3f} GFLOP an image",
        f"device: {device_name(device)}, {speed / 1e9:.1f} GFLOP/s in a few steps of pretraining in fp32",
    ]
    if not recipe.data.source:
        return "\n".join([*lines, "name the images with --data to know the hours"])
    found = [cost for cost in costs(run) if cost.name in stages]
    if len(found) > 1:
        found.append(Cost("all", *(sum(getattr(c, k) for c in found) for k in ("steps", "flops", "done"))))
    lines.append(f"{'stage':10} {'steps':>9} {'done':>9} {'PFLOP':>12} {'hours here':>11} {'GPU-hours':>10}")
    for cost in found:
        here, there = cost.flops / speed / 3600, cost.flops / GPU_FLOPS / 3600
        lines.append(
            f"{cost.name:10} {cost.steps:9,} {cost.done:9,} {cost.flops / 1e15:12,.4g} {here:11,.4g} {there:10,.3g}"
        )
    lines.append("hours here: the stage's FLOPs by the speed above.")
    tera = GPU_FLOPS / 1e12
    lines.append(
        f"GPU-hours: an estimate: the stage's FLOPs by {tera:.0f} TFLOP/s, a third of an A100's in TF32."
    )
    return "\n".join(lines)


def costs(run: Run) -> list[Cost]:
    """Pretraining, fine-tuning and evaluation. Raises DataError where no images are named."""
    recipe = run.recipe
    train, found = run.sources
    everything = found[train].count
    count = max(1, round(everything * (1 - recipe.data.validation)))
    evaluated = found[run.evaluated].count if run.evaluated != train else everything - count
    extraction = flops(recipe)[1]
    pretraining = _training("pretrain", recipe.pretrain, count, training_flops(recipe, "pretrain"), run)
    if recipe.finetune.freeze:  # features once; fitting the head is nothing beside them
        tuning = Cost("finetune", 1, everything * len(views(recipe.finetune)) * extraction)
    else:
        tuning = _training("finetune", recipe.finetune, count, training_flops(recipe, "finetune"), run)
    return [pretraining, tuning, Cost("evaluate", -(-evaluated // EVALUATED_BATCH), evaluated * extraction)]


def _training(stage: Stage, config: Optimisation, count: int, each: float, run: Run) -> Cost:
    steps, path = steps_of(config, count), run.checkpoint(stage)
    trained = read_facts(path).trained if path.exists() else None
    return Cost(stage, steps, steps * min(config.batch, count) * each, trained.step if trained else 0)


def flops(recipe: Recipe) -> tuple[int, int]:
    """FLOPs of one network evaluation, and of the extraction of one image; counted on shapes alone."""
    with torch.device("meta"), torch.no_grad():
        encoder = Encoder(UNet(recipe.unet), recipe.encoder)
        x = torch.zeros(1, 3, recipe.image.size, recipe.image.size)
        return count_flops(encoder.field, x, torch.ones(1)), count_flops(encoder, x, torch.zeros(1))


def count_flops(work: Callable[..., object], *inputs: Tensor) -> int:
    """FLOPs of calling `work` with these; a multiply-add counts two."""
    with FlopCounterMode(display=False) as counter:
        work(*inputs)
    return counter.get_total_flops()


def training_flops(recipe: Recipe, stage: Stage) -> float:
    """FLOPs of training on one image once, forward and backward, checkpointed evaluations twice.

    Counted on shapes alone, of one and of two steps of the solve: every further step costs as much as the second.
    """
    if stage == "pretrain":
        return _counted(recipe, stage, recipe.encoder)
    one, two = (_counted(recipe, stage, replace(recipe.encoder, steps=n)) for n in (1, 2))
    return one + (recipe.encoder.steps - 1) * (two - one)


def _counted(recipe: Recipe, stage: Stage, encoder: EncoderConfig) -> float:
    recipe = recipe.model_copy(update={"encoder": encoder})
    model, prepare, loss = parts(recipe, stage, torch.device("meta"))
    cpu = torch.device("cpu")
    batch = prepare(*random_images(recipe.image.size, 2, cpu), step_generator(0, 0, cpu))
    shapes = tuple(part.to("meta") for part in batch)
    return count_flops(lambda: loss(model, shapes).backward()) / 2


def flops_per_second(recipe: Recipe, device: torch.device) -> float:
    """Speed of pretraining in fp32 here, from a few steps on random images."""
    each = training_flops(recipe, "pretrain")
    count = min(recipe.pretrain.batch, PROBE_IMAGES)
    if device.type == "cpu":
        count = int(min(count, max(1, PROBE_FLOPS // each)))
    model, prepare, loss = parts(recipe, "pretrain", device)
    pixels, labels = random_images(recipe.image.size, count, device)
    generator = step_generator(0, 0, device)
    return (
        count * each / best_time(lambda: loss(model, prepare(pixels, labels, generator)).backward(), device)
    )


def parts(recipe: Recipe, stage: Stage, device: torch.device) -> tuple[nn.Module, Prepare, Loss]:
    """A stage's model with fresh weights, what prepares its batches, and its loss."""
    with device:
        if stage == "pretrain":
            return UNet(recipe.unet), pretraining_batch(recipe), flow_loss(PATHS[recipe.encoder.path])
        model = build_classifier(UNet(recipe.unet), recipe, PROBE_CLASSES)
    return model, finetuning_batch(recipe, PROBE_CLASSES), finetuning_loss(recipe)


def random_images(side: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels and labels, for a probe."""
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device)
    return pixels, torch.randint(0, PROBE_CLASSES, (count,), device=device)
