"""A study's answer in a folder: one JSON, one Markdown page with its table, figures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prg.machine import choose_device, device_name
from prg.publish import commit

Draw = Callable[[Path], None]
"""draw(path): write a PNG there."""
Cell = str | int | float | None


@dataclass(frozen=True)
class Report:
    """One study's answer."""

    title: str
    about: str
    """What was done, in a sentence or two: what a reader must know to judge the figures."""
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    figures: dict[str, Draw] = field(default_factory=dict)
    """Drawings by what is added to the study's name: "" for its one figure."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further results, for the JSON alone."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """What the figures hold for: model, data, numbers of images, machine, command."""


def write(report: Report, folder: Path, name: str) -> list[Path]:
    """NAME.json, NAME.md and the figures NAME….png into `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {suffix: folder / f"{name}{'-' if suffix else ''}{suffix}.png" for suffix in report.figures}
    for suffix, path in drawn.items():
        report.figures[suffix](path)
    table = {
        "study": name,
        "conditions": report.conditions,
        "results": [dict(zip(report.columns, row, strict=True)) for row in report.rows],
        **report.facts,
    }
    written = [folder / f"{name}.json", folder / f"{name}.md", *drawn.values()]
    written[0].write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    written[1].write_text(page(report, [p.name for p in drawn.values()]), "utf-8")
    return written


def conditions() -> dict[str, Any]:
    """This machine and this day, for the record."""
    return {"device": device_name(choose_device()), "torch": torch.__version__, "commit": commit()}


def page(report: Report, figures: Sequence[str]) -> str:
    """The Markdown page."""
    facts = [f"- {k.replace('_', ' ')}: {cell(v)}" for k, v in report.conditions.items() if k != "command"]
    command = [f"```\n{report.conditions['command']}\n```", ""] if "command" in report.conditions else []
    pictures = [f"![{report.title}]({name})" for name in figures]
    parts = [f"# {report.title}", "", report.about, "", *command, *facts, "", table(report)]
    return "\n".join(parts) + "".join(f"\n\n{p}" for p in pictures) + "\n"


def table(report: Report) -> str:
    """The results as a Markdown table; columns of numbers to the right."""
    numeric = [all(not isinstance(row[i], str) for row in report.rows) for i in range(len(report.columns))]
    lines = [
        "| " + " | ".join(report.columns) + " |",
        "|" + "|".join("---:" if n else "---" for n in numeric) + "|",
    ]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in report.rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A cell: four significant digits of a float, thousands parted, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def draw_axes(paint: Callable[[Any], None], panels: int = 1, width: float = 5.5) -> Draw:
    """A drawing of so many panels side by side; `paint` is given the list of their axes."""

    def draw(path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, panels, figsize=(width * panels, 3.8), squeeze=False)
        paint(list(axes[0]))
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)

    return draw
