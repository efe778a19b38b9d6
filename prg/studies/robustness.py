"""Robustness: accuracy on corrupted test images, by corruption and severity."""

from typing import Any

import numpy as np

from prg.console import Bar, track
from prg.errors import DataError
from prg.images.material import Material
from prg.images.sets import Pixels, same_classes, sample
from prg.studies.corruptions import CORRUPTIONS, PUBLISHED, SEVERITIES, corrupted
from prg.studies.probes import top1
from prg.studies.report import Cell, Draw, Report, draw_axes
from prg.studies.subject import Subject
from prg.training.figures import save_grid

COLUMNS = ("corruption", "group", *(f"severity {s}" for s in SEVERITIES), "mean")


def robustness(subject: Subject, material: Material, split: str, limit: int | None) -> Report:
    """The served classifier, its own solve and level, on every corruption of the test images."""
    level = subject.classify_t_end
    side = subject.prg.image.size
    if side not in PUBLISHED:
        sides = " and ".join(map(str, PUBLISHED))
        raise DataError(f"{subject.name}: takes {side}-pixel images; severities are published for {sides}")
    name, images = material.evaluated(split)
    images = same_classes(sample(images, limit), subject.prg.labels or (), material.source)
    assert images.labels is not None

    def accuracy(pixels: Pixels, bar: Bar) -> float:
        logits = subject.features(pixels, level, subject.own, bar)["LOGITS"]
        assert images.labels is not None
        return top1(logits, images.labels)

    rows: list[tuple[Cell, ...]] = []
    times = 1 + len(CORRUPTIONS) * len(SEVERITIES)
    total = times * len(images) * subject.evaluations(level, subject.own)
    with track(f"{subject.name}: robustness", total, "evaluations") as bar:
        clean = accuracy(images.pixels, bar)
        for corruption, row in CORRUPTIONS.items():
            found = [accuracy(corrupted(images.pixels[:], corruption, s), bar) for s in SEVERITIES]
            rows.append((corruption, row.group, *found, float(np.mean(found))))
    means = [float(np.mean([r[i] for r in rows])) for i in range(2, len(COLUMNS))]
    rows.append((f"all {len(rows)}", "", *means))
    return Report(
        title="Robustness: accuracy on corrupted images",
        about=f"Top-1 on {name} under the corruptions of Hendrycks and Dietterich (2019) at the severities of "
        f"{PUBLISHED[side]}, without frost, which needs photographs; motion is our own filter, close to the published "
        "one. The model never saw a corrupted image in training. "
        f"On the same images without corruption: {clean:.4f}.",
        columns=COLUMNS,
        rows=rows,
        figures={
            "": draw_axes(lambda axes: _paint(axes, rows[: len(CORRUPTIONS)], clean), width=9),
            "pictures": _pictures(images.pixels[0]),
        },
        facts={"clean": clean},
        conditions={"data": name, "images": len(images)},
    )


def _pictures(image: np.ndarray) -> Draw:
    """One image under every corruption (a column each), severity from top to bottom."""
    shown = [corrupted(image[None], name, s)[0] for s in SEVERITIES for name in CORRUPTIONS]
    return lambda path: save_grid(np.stack(shown), len(CORRUPTIONS), path, zoom=2)


def _paint(axes: Any, rows: list[tuple[Cell, ...]], clean: float) -> None:
    place = np.arange(len(rows))
    for i, severity in enumerate(SEVERITIES):
        axes[0].bar(place + 0.16 * (i - 2), [r[2 + i] for r in rows], 0.15, color=f"{0.8 - 0.17 * i:.2f}")
        axes[0].plot([], [], "s", color=f"{0.8 - 0.17 * i:.2f}", label=f"severity {severity}")
    axes[0].axhline(clean, color="C3", linestyle=":", label="clean")
    axes[0].set_xticks(
        place, [str(r[0]).replace("_", " ") for r in rows], rotation=60, ha="right", fontsize=8
    )
    axes[0].set_ylabel("top-1")
    axes[0].set_ylim(0, 1.15)
    axes[0].legend(fontsize=7, ncols=6, loc="upper left")
