"""The extractor by itself: images a second and memory against batch, steps of the solve and image size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.curves.fresh import call_s, fresh
from entry.runner import Runner
from prg.encoder import Encoder
from prg.extractor import Extractor
from prg.recipe import load_recipe
from prg.unet import ResBlock, UNet, time_embedding

ENTRIES = ("prg-everyday", "prg-cifar10")
RECIPE = "everyday-small"
"""Of prg-everyday. Networks of other steps and sizes are made by it, with fresh weights."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCH = 32
STEPS = (1, 2, 4, 8, 16, 31)
SIZES = (32, 64, 128, 224)
Rows = list[dict[str, str | int | float]]


def run() -> dict[str, Rows]:
    """All curves by name."""
    return {
        "batch": [
            {"entry": entry, "batch": batch} | figures(batch, *fresh(served, entry, batch))
            for entry in ENTRIES
            for batch in BATCHES
        ],
        "steps": [{"steps": steps} | figures(BATCH, *fresh(scripted, 64, steps)) for steps in STEPS],
        "image size": [{"size": side} | figures(BATCH, *fresh(scripted, side, 1)) for side in SIZES],
        "time embedding": [time_share(batch) for batch in (1, BATCH)],
    }


def figures(images: int, seconds: float, memory_mb: float) -> dict[str, str | int | float]:
    """Of a call with so many images."""
    return {
        "ms": round(seconds * 1e3, 1),
        "images/s": round(images / seconds, 1),
        "memory, MB": round(memory_mb),
    }


def served(entry: str, batch: int) -> float:
    """Seconds of a batch, as the service computes it."""
    runner = Runner(Path("model_repository") / entry)
    size = runner.entry.prg.image.size
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
    levels = np.full(batch, runner.entry.prg.t_end, np.float32)
    return call_s(lambda: runner.run(images, levels))


def extractor(side: int, steps: int) -> Extractor:
    """By the recipe but for these, with fresh weights."""
    recipe = load_recipe(RECIPE)
    net = UNet(replace(recipe.unet, image_size=side))
    encoder = Encoder(net, replace(recipe.encoder, steps=steps), save_memory=False)
    return Extractor(encoder, recipe.image.spec).eval()


def scripted(side: int, steps: int) -> float:
    """Seconds of a batch, by TorchScript."""
    module = torch.jit.script(extractor(side, steps))
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8)
    with torch.inference_mode():
        return call_s(lambda: module(images, torch.full((BATCH, 1), 0.8)))


def time_share(batch: int) -> dict[str, str | int | float]:
    """What depends on t alone, beside the whole; eager, both in this process.

    Counted for every block in each evaluation, though the last one, for HIDDEN, ends at the middle block.
    """
    whole = extractor(64, 1)
    net = whole.encoder.net
    blocks = [block for block in net.modules() if isinstance(block, ResBlock)]
    images, t = torch.zeros(batch, 3, 64, 64, dtype=torch.uint8), torch.full((batch,), 0.8)

    def of_t() -> None:
        emb = net.time_embed(time_embedding(t, net.channels))
        for block in blocks:
            block.emb_layers(emb)

    with torch.inference_mode():
        part = call_s(of_t) * whole.encoder.config.nfe
        total = call_s(lambda: whole(images, t[:, None]))
    return {
        "batch": batch,
        "of t alone, ms": round(part * 1e3, 2),
        "extraction, ms": round(total * 1e3, 1),
        "share, %": round(100 * part / total, 1),
    }
