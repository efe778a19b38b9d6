"""Levels: how much a linear probe and nearest neighbours read from each feature, over t_end and steps."""

from typing import Any

from prg.console import track
from prg.errors import DataError
from prg.images.material import Material
from prg.images.sets import same_classes, sample
from prg.studies.probes import NEIGHBOURS, linear_probe, nearest_neighbours, top1
from prg.studies.report import Cell, Report, draw_axes
from prg.studies.subject import Solve, Subject

LEVELS = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
STEPS = (1, 2, 4)
COLUMNS = ("t_end", "steps", "feature", "linear probe", "k-NN")


def levels(subject: Subject, material: Material, limit: int | None) -> Report:
    """Probes fitted on `limit` training images, evaluated on a quarter as many of those held out."""
    training, held = material.training()
    if training.labels is None:
        raise DataError(f"{material.source}: no labels; this study needs them")
    classes = len(training.classes)
    training = sample(training, limit)
    if len(training) < 4 * classes:
        raise DataError(
            f"{len(training)} images are too few to fit probes of {classes} classes to and to evaluate them on a "
            f"quarter as many: at least {4 * classes} are needed"
        )
    held = sample(held, max(1, len(training) // 4))
    held = same_classes(held, training.classes, material.source)
    assert training.labels is not None
    assert held.labels is not None
    rows: list[tuple[Cell, ...]] = []
    cells = [
        (level, Solve(subject.prg.solver, steps))
        for level in LEVELS
        for steps in (STEPS if level < subject.t_start else STEPS[:1])
    ]
    total = sum(subject.evaluations(*cell) for cell in cells) * (len(training) + len(held))
    with track(f"{subject.name}: levels", total, "evaluations") as bar:
        for level, solve in cells:
            fitted = subject.features(training.pixels, level, solve, bar)
            evaluated = subject.features(held.pixels, level, solve, bar)
            for name in features_of(subject):
                a = fitted[name.upper()]
                b = evaluated[name.upper()]
                probe = top1(linear_probe(a, training.labels, b, classes), held.labels)
                votes = top1(nearest_neighbours(a, training.labels, b, classes), held.labels)
                rows.append((level, solve.steps if level < subject.t_start else 0, name, probe, votes))
    return Report(
        title="Levels: what the features tell about the class",
        about="Accuracy of a linear probe (logistic regression by LBFGS, its penalty chosen on a part of its own "
        f"training features) and of {NEIGHBOURS} nearest neighbours by cosine of the centred features, for the "
        "state at t_end, the activations there, and their projection. Probes are fitted on images of the training "
        "split and evaluated on images held out of it; the test split is not read. t_end = 1 is the image itself, "
        "without a solve.",
        columns=COLUMNS,
        rows=rows,
        figures={"": draw_axes(lambda axes: _paint(axes, rows), panels=2)},
        conditions={"images_fitted": len(training), "images_evaluated": len(held)},
    )


def features_of(subject: Subject) -> tuple[str, ...]:
    """What /embed can answer with of it, the weakest first."""
    features = subject.prg.features
    return ("state", "hidden", "embedding") if features.embedding else ("state", "hidden")


def _paint(axes: Any, rows: list[tuple[Cell, ...]]) -> None:
    for axis, place in zip(axes, (3, 4), strict=True):
        for feature, line in (("hidden", "-"), ("embedding", "-."), ("state", "--")):
            for i, steps in enumerate(STEPS):
                points = [(r[0], r[place]) for r in rows if r[2] == feature and r[1] in (0, steps)]
                if not points:
                    continue
                axis.plot(
                    *zip(*points, strict=True),
                    line,
                    marker=".",
                    color=f"C{i}",
                    label=f"{feature}, {steps} steps",
                )
        axis.invert_xaxis()
        axis.set_xlabel("t_end (1: the image, 0: noise)")
        axis.set_ylabel(f"accuracy, {COLUMNS[place]}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
