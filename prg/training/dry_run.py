"""What a run would do: the resolved recipe, the network's size, and the hours it takes on this machine."""

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prg.encoder import Encoder
from prg.recipe import Recipe, recipe_table
from prg.training.data import held_count
from prg.training.finetune import build_classifier, finetuning_batch, finetuning_loss
from prg.training.frozen import views
from prg.training.loop import Loss, Prepare, device_name, step_generator, steps_of
from prg.training.pretrain import pretraining_batch, pretraining_loss
from prg.training.run import choose_device, choose_split
from prg.training.sources import splits
from prg.unet import UNet

PROBE_CLASSES = 10
"""The head's size hardly matters for the time; the data's own number of classes is not known beforehand."""
PROBE_BATCH = 1024
"""At most: more images a step are no faster, and may not fit."""
EXTRACTION_BATCH = 64


def describe(recipe: Recipe, stage: str) -> str:
    """The whole recipe as JSON, then parameters, FLOPs an image, and the time that `stage` takes here."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(recipe.unet).parameters())
    once, whole = flops(recipe)
    device = choose_device()
    name = recipe.network if isinstance(recipe.network, str) else "of this shape"
    lines = [
        json.dumps(recipe_table(recipe), indent=2),
        "",
        f"network {name}: {parameters:,} parameters, {once / 1e9:.3f} GFLOP an evaluation",
        f"extraction: {recipe.encoder.nfe} evaluations, {whole / 1e9:.3f} GFLOP an image",
        f"device: {device_name(device)}",
    ]
    return "\n".join([*lines, f"{stage}: {_work(recipe, stage, device)}"])


def _work(recipe: Recipe, stage: str, device: torch.device) -> str:
    """What the stage does, at which speed, and the hours where the recipe names images."""
    config = recipe.pretrain if stage == "pretrain" else recipe.finetune
    frozen = stage == "finetune" and recipe.finetune.freeze
    count = training_count(recipe)
    batch = min(config.batch, count or PROBE_BATCH)
    rate = (
        extractions_per_second(recipe, device)
        if frozen
        else images_per_second(recipe, stage, device, min(batch, PROBE_BATCH))
    )
    if count is None:
        return f"{rate:.0f} images/s; name the images with --data to know the hours"
    if frozen:
        each = len(views(recipe))
        hours = count * each / rate / 3600
        return (
            f"features of {count:,} images, {each} views of each, at {rate:.0f} images/s: {hours:.2f} hours; "
            "then a head is fitted to them, in seconds or minutes"
        )
    steps = steps_of(config, count)
    return (
        f"{steps:,} steps of {batch:,} images ({config.epochs:g} epochs of {count:,}) at {rate:.0f} images/s: "
        f"{steps * batch / rate / 3600:.2f} hours"
    )


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


def parts(recipe: Recipe, stage: str, device: torch.device) -> tuple[nn.Module, Prepare, Loss]:
    """A stage's model with fresh weights, what prepares its batches, and its loss."""
    if stage == "pretrain":
        with device:
            return UNet(recipe.unet), pretraining_batch(recipe), pretraining_loss(recipe)
    with device:
        model = build_classifier(recipe, PROBE_CLASSES)
    return model, finetuning_batch(recipe, PROBE_CLASSES), finetuning_loss(recipe)


def images_per_second(recipe: Recipe, stage: str, device: torch.device, batch: int) -> float:
    """Training speed of a stage in fp32, from a few steps of `batch` random images."""
    model, prepare, loss = parts(recipe, stage, device)
    pixels, labels = random_images(recipe, batch, device)
    generator = step_generator(0, 0, device)
    return batch / _seconds(lambda: loss(model, prepare(pixels, labels, generator)).backward(), device)


def extractions_per_second(recipe: Recipe, device: torch.device) -> float:
    """Images a second through the frozen encoder in fp32, from a few batches of random images."""
    with device:
        encoder = Encoder(UNet(recipe.unet), recipe.encoder).eval()
    side = recipe.image.size
    x = torch.randn(EXTRACTION_BATCH, 3, side, side, device=device)
    t_end = x.new_full((len(x),), recipe.finetune.t_end[0])
    with torch.no_grad():
        return len(x) / _seconds(lambda: encoder(x, t_end), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of doing it: the better of two times, after one to warm up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def random_images(recipe: Recipe, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels and labels, for a probe."""
    side = recipe.image.size
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device)
    return pixels, torch.randint(0, PROBE_CLASSES, (count,), device=device)


def training_count(recipe: Recipe) -> int | None:
    """Images that would be trained on, None where the recipe names no source. Raises DataError where there are none."""
    if not recipe.data.source:
        return None
    found = splits(recipe.data.source)
    count = found[choose_split(found, recipe.data.train, recipe.data.source)].count
    return count - held_count(count, recipe.data.validation)
