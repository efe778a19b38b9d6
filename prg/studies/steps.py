"""Steps: accuracy of the classifier against network evaluations and solver, at the level of its head."""

from typing import Any

from prg.console import track
from prg.evaluation import reliability
from prg.images.material import Material
from prg.images.sets import same_classes, sample
from prg.solver import TABLEAUS
from prg.studies.probes import top1
from prg.studies.report import Cell, Report, draw_axes
from prg.studies.subject import Solve, Subject

STEPS = (1, 2, 3, 4, 8, 16)
MOST_EVALUATIONS = 16
COLUMNS = ("solver", "steps", "evaluations", "top-1", "NLL")


def steps(subject: Subject, material: Material, limit: int | None) -> Report:
    """The head as it was trained, behind other solves than its own, on images held out."""
    level = subject.classify_t_end
    labels = subject.prg.labels or ()
    held = same_classes(sample(material.training()[1], limit), labels, material.source)
    assert held.labels is not None
    rows: list[tuple[Cell, ...]] = []
    solves = [s for solver in TABLEAUS for n in STEPS if (s := Solve(solver, n)).nfe <= MOST_EVALUATIONS]
    total = sum(subject.evaluations(level, solve) for solve in solves) * len(held)
    with track(f"{subject.name}: steps", total, "evaluations") as bar:
        for solve in solves:
            logits = subject.features(held.pixels, level, solve, bar)["LOGITS"]
            nll = reliability(logits, held.labels).nll
            rows.append((solve.solver, solve.steps, solve.nfe + 1, top1(logits, held.labels), nll))
    own = subject.own
    return Report(
        title="Steps: accuracy against network evaluations",
        about=f"The classifier at its own level t_end = {level:g}, reversed by other solvers and numbers of steps "
        f"than the {own} it was fine-tuned with. Evaluations include the further "
        "one for the activations.",
        columns=COLUMNS,
        rows=rows,
        figures={"": draw_axes(lambda axes: _paint(axes, rows, own))},
        conditions={"images": len(held)},
    )


def _paint(axes: Any, rows: list[tuple[Cell, ...]], own: Solve) -> None:
    for solver in TABLEAUS:
        points = [(r[2], r[3]) for r in rows if r[0] == solver]
        axes[0].plot(*zip(*points, strict=True), marker="o", label=solver)
    axes[0].axvline(own.nfe + 1, color="grey", linestyle=":", label=f"as trained ({own})")
    axes[0].set_xlabel("network evaluations")
    axes[0].set_ylabel("top-1")
    axes[0].grid(alpha=0.3)
    axes[0].legend()
