"""Accuracy: top-1, top-5, calibration and the confusion matrix as a study's answer."""

from typing import Any

from prg.evaluation import BINS, Evaluation
from prg.studies.report import Cell, Draw, Report, draw_axes


def accuracy(evaluation: Evaluation, model: str) -> Report:
    """One evaluation as JSON, table and figure; `model` names what was evaluated."""
    figures, calibrated = evaluation.accuracy, evaluation.reliability
    labels = evaluation.entry.prg.labels or ()
    rows: list[tuple[Cell, ...]] = [
        ("top-1", figures.images, figures.top1),
        ("top-5", figures.images, figures.top5),
        (f"expected calibration error, {BINS} bins", figures.images, calibrated.ece),
        ("negative log-likelihood, nats", figures.images, calibrated.nll),
        *((f"top-1 of {label}", count, top1) for label, count, top1 in evaluation.by_class),
    ]
    return Report(
        title="Accuracy",
        about=f"The exported module on {figures.data}, with the preprocessing that is served. The figure shows "
        "which class is taken for which (rows the true one), and how often the model is right where it is so sure.",
        columns=("what", "images", "value"),
        rows=rows,
        figures={"": _drawing(evaluation)},
        facts={
            "confusion": evaluation.confusion.tolist(),
            "labels": list(labels),
            "bins": {
                "confidence": calibrated.confidence,
                "accuracy": calibrated.accuracy,
                "images": calibrated.counts,
            },
        },
        conditions={
            "model": model,
            "fingerprint": evaluation.entry.fingerprints(evaluation.version).model,
            "data": figures.data,
            "images": figures.images,
        },
    )


def _drawing(evaluation: Evaluation) -> Draw:
    labels = evaluation.entry.prg.labels or ()
    share = evaluation.confusion / evaluation.confusion.sum(1, keepdims=True).clip(1)

    def paint(axes: Any) -> None:
        axes[0].imshow(share, cmap="Blues", vmin=0, vmax=1)
        if len(labels) <= 20:
            places = range(len(labels))
            axes[0].set_xticks(places, labels, rotation=60, ha="right", fontsize=8)
            axes[0].set_yticks(places, labels, fontsize=8)
            for i, row in enumerate(share):
                for j, value in enumerate(row):
                    colour = "white" if value > 0.5 else "black"
                    axes[0].text(
                        j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour
                    )
        axes[0].set_xlabel("answered")
        axes[0].set_ylabel("true")
        found = evaluation.reliability
        full = [i for i, n in enumerate(found.counts) if n]
        axes[1].plot([0, 1], [0, 1], ":", color="grey")
        axes[1].plot([found.confidence[i] for i in full], [found.accuracy[i] for i in full], "o-")
        axes[1].set_xlabel("confidence")
        axes[1].set_ylabel("accuracy")
        axes[1].set_title(f"ECE {found.ece:.3f}")
        axes[1].grid(alpha=0.3)

    return draw_axes(paint, panels=2)
