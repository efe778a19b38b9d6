"""The curves as figures."""

from pathlib import Path
from typing import Any

from benchmarks.curves.model import Rows
from prg.studies.report import draw_axes

FOLDER = Path("docs/results")


def draw(curves: dict[str, Rows]) -> None:
    """curves-model.png and curves-service.png."""
    draw_axes(lambda axes: _model(axes, curves), panels=3, width=4.2)(FOLDER / "curves-model.png")
    draw_axes(lambda axes: _service(axes, curves), panels=2)(FOLDER / "curves-service.png")


def _model(axes: list[Any], curves: dict[str, Rows]) -> None:
    axes[1].set_yscale("log")
    for entry, rows in _parted(curves["batch"], "entry"):
        _line(axes[0], rows, "batch", "images/s", entry)
    solves = [("extraction", curves["steps"])]
    solves += [(f"training, {way}", rows) for way, rows in _parted(curves["training"], "gradient")]
    for label, rows in solves:
        if len(rows) > 1:
            _line(axes[1], rows, "steps", "images/s", label)
            _line(axes[2], rows, "steps", "memory, MB", label)
    for axis in (axes[0], axes[2]):
        axis.set_ylim(bottom=0)
    for axis in axes:
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=8)


def _service(axes: list[Any], curves: dict[str, Rows]) -> None:
    sizes = [row | {"megapixels": _megapixels(str(row["photo"]))} for row in curves["photo size"]]
    panels = ((sizes, "megapixels", "center left"), (curves["callers"], "callers", "lower right"))
    for axis, (rows, x, place) in zip(axes, panels, strict=True):
        _line(axis, rows, x, "images/s", "images/s")
        axis.set_ylim(bottom=0)
        other = axis.twinx()
        other.set(yscale="log", ylabel="ms")
        other.yaxis.set_major_formatter("{x:g}")
        other.yaxis.set_minor_formatter("{x:g}" if x == "megapixels" else "")
        for name, style in (("p50, ms", ":"), ("p99, ms", "--")):
            other.plot([r[x] for r in rows], [r[name] for r in rows], "C1" + style, marker=".", label=name)
        lines = [*axis.get_lines(), *other.get_lines()]
        axis.legend(lines, [line.get_label() for line in lines], fontsize=8, loc=place)


def _line(axis: Any, rows: Rows, x: str, y: str, label: str) -> None:
    places = [row[x] for row in rows]
    axis.plot(places, [row[y] for row in rows], marker="o", label=label)
    axis.set(xscale="log", xlabel=x, ylabel=y)
    axis.set_xticks(places, [str(place) for place in places])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _parted(rows: Rows, column: str) -> list[tuple[str, Rows]]:
    names = dict.fromkeys(str(row[column]) for row in rows)
    return [(name, [row for row in rows if row[column] == name]) for name in names]


def _megapixels(photo: str) -> float:
    width, height = map(int, photo.split(" × "))
    return float(f"{width * height / 1e6:.2g}")
