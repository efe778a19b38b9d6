"""A step of fine-tuning: images a second and memory against steps of the solve, by plain autograd and checkpointed."""

import torch

from benchmarks.curves.fresh import call_s, fresh
from benchmarks.curves.model import RECIPE, STEPS, Rows
from prg.machine import training_precision
from prg.recipe import load_recipe
from prg.training.costs import parts, random_images
from prg.training.loop import step_generator
from prg.training.optimisers import optimisers

BATCH = 32
WAYS = {
    "plain autograd": ("finetune.save_memory=false", "finetune.optimiser=adamw", "finetune.precision=fp32"),
    "checkpointed": ("finetune.save_memory=true", "finetune.optimiser=adamw", "finetune.precision=fp32"),
}
OFFICIAL = ("plain autograd", 31)


def run() -> dict[str, Rows]:
    """The one curve; its last row is the recipe as it is."""
    rows: Rows = []
    for way, settings in WAYS.items():
        for steps in STEPS:
            rows.append(row(way, steps, *fresh(step_s, [*settings, f"encoder.steps={steps}"])))
    rows.append(row(f"recipe {RECIPE}", 1, *fresh(step_s, [])))
    [official] = [r["images/s"] for r in rows if (r["gradient"], r["steps"]) == OFFICIAL]
    return {"training": [r | {"times official": round(r["images/s"] / official, 2)} for r in rows]}  # type: ignore[operator]


def row(way: str, steps: int, seconds: float, memory_mb: float) -> dict[str, str | int | float]:
    """Of one way."""
    figures = {"images/s": round(BATCH / seconds, 1), "memory, MB": round(memory_mb)}
    return {"gradient": way, "steps": steps} | figures


def step_s(settings: list[str]) -> float:
    """Seconds of one step of optimisation on a batch that is ready."""
    recipe, cpu = load_recipe(RECIPE, settings), torch.device("cpu")
    model, prepare, loss = parts(recipe, "finetune", cpu)
    batch = prepare(*random_images(recipe.image.size, BATCH, cpu), step_generator(0, 0, cpu))
    chosen = optimisers(model, recipe.finetune)
    in_bf16 = training_precision(recipe.finetune.precision, cpu) == "bf16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            value = loss(model, batch)
        model.zero_grad()
        value.backward()
        for optimiser in chosen:
            optimiser.step()

    return call_s(step, warm=1)
