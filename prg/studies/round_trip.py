"""Round trip: images reversed to t_end and generated back, the error by solver and steps."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prg.images.material import Material
from prg.images.sets import Pixels, sample
from prg.studies.report import Cell, Draw, Report, draw_axes
from prg.studies.subject import BATCH, Solve, Subject
from prg.training.figures import save_grid

LEVELS = (0.8, 0.4, 0.0)
SOLVES = tuple(
    Solve(solver, steps)
    for solver, steps in (
        *(("euler", n) for n in (1, 2, 4, 8, 16, 32)),
        *(("midpoint", n) for n in (1, 4, 16)),
        *(("heun", n) for n in (1, 4, 16)),
        *(("rk4", n) for n in (1, 4, 8)),
    )
)
SHOWN = 8
COLUMNS = ("t_end", "solver", "steps", "evaluations", "relative error", "PSNR, dB")


def round_trip(subject: Subject, material: Material, limit: int | None) -> Report:
    """There and back by the same solve: the flow is invertible, so what is lost is the solver's error."""
    images = sample(material.training()[1], limit)
    rows: list[tuple[Cell, ...]] = []
    for level in LEVELS:
        for solve in SOLVES:
            error, psnr = _error(subject, images.pixels, level, solve)
            rows.append((level, solve.solver, solve.steps, 2 * solve.nfe, error, psnr))
    return Report(
        title="Round trip: reversed to t_end and generated back",
        about="Each image is reversed to t_end and brought back to t = 1 by the same solver with as many steps. "
        "Relative error: length of the difference over length of the image, in the network's units, mean over "
        "images. PSNR: of pixels. Evaluations are those of both ways.",
        columns=COLUMNS,
        rows=rows,
        figures={
            "": draw_axes(lambda axes: _paint(axes, rows), panels=len(LEVELS), width=4.5),
            "pictures": _pictures(subject, images.pixels[:SHOWN]),
        },
        conditions={"images": len(images)},
    )


def _there_and_back(subject: Subject, x: Tensor, level: float, solve: Solve) -> Tensor:
    return subject.flow(subject.flow(x, 1.0, level, solve), level, 1.0, solve)


def _error(subject: Subject, pixels: Pixels, level: float, solve: Solve) -> tuple[float, float]:
    """Relative error and PSNR, means over the images."""
    errors, psnrs = [], []
    for start in range(0, len(pixels), BATCH):
        part = pixels[start : start + BATCH]
        x = subject.latents(part)
        back = _there_and_back(subject, x, level, solve)
        errors.append(((back - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).cpu().numpy())
        difference = subject.pixels(back).astype(float) - part
        mse = np.maximum((difference**2).mean(axis=(1, 2, 3)), 1 / 255)
        psnrs.append(10 * np.log10(255**2 / mse))
    return float(np.concatenate(errors).mean()), float(np.concatenate(psnrs).mean())


def _pictures(subject: Subject, pixels: np.ndarray) -> Draw:
    """First row the images, then back from noise (t_end = 0) by Euler with 1, 4, 16 steps, and by RK4 with 8."""

    def draw(path: Path) -> None:
        x = subject.latents(pixels)
        shown = (Solve("euler", 1), Solve("euler", 4), Solve("euler", 16), Solve("rk4", 8))
        back = [subject.pixels(_there_and_back(subject, x, 0.0, solve)) for solve in shown]
        save_grid(np.concatenate([pixels, *back]), len(pixels), path)

    return draw


def _paint(axes: Any, rows: list[tuple[Cell, ...]]) -> None:
    for axis, level in zip(axes, LEVELS, strict=True):
        for solver in dict.fromkeys(s.solver for s in SOLVES):
            points = [(r[3], r[4]) for r in rows if r[0] == level and r[1] == solver]
            axis.loglog(*zip(*points, strict=True), marker="o", label=solver)
        axis.set_title(f"t_end = {level:g}")
        axis.set_xlabel("network evaluations, both ways")
        axis.set_ylabel("relative error")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
