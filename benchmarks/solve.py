"""When the solve pays: frozen features of classes never seen, by what the network looks at.

reversed: the state at t_end, reached by the reverse solve. image: the image itself, t = 1. told: the image itself, the
network told t_end. noised: the image with as much noise as a state at t_end has (DDAE, Xiang et al. 2023). Each is
read in HIDDEN by linear probes on n labels a class, and by the ten nearest in a projection fitted to the training
images without their labels. hog: no network, but gradients and colours. Nothing is chosen by the validation images.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prg.api import Model, load
from prg.fitting import fit_projection
from prg.images.decoded import load_split
from prg.images.sets import Images
from prg.images.splits import splits
from prg.paths import PATHS
from prg.solver import integrate
from prg.studies.probes import linear_probe, top1
from prg.studies.report import Report, conditions, draw_axes, write

LEVELS = (0.95, 0.9, 0.8, 0.6, 0.4)
STEPS = (1, 2, 4)
LABELS = (5, 20, 150)
SEEDS = 3
NEIGHBOURS = 10
BATCH = 100


@dataclass(frozen=True)
class Look:
    """What the network is given."""

    kind: str
    t_end: float
    steps: int = 0

    @property
    def cost(self) -> int:
        """Evaluations of the network, the one that is read included."""
        return self.steps + 1

    def at(self, model: Model, x: Tensor, noise: Tensor) -> Tensor:
        """HIDDEN of x [B, 3, S, S]."""
        t = torch.full((len(x),), self.t_end)
        if self.kind == "reversed":
            x = integrate(model.velocity, x, 1.0, self.t_end, steps=self.steps)
        elif self.kind == "noised":
            x = PATHS["icfm"].point(t, noise, x)
        hidden: Tensor = model.encoder.hidden(x, t)
        return hidden


def looks() -> Iterator[Look]:
    yield Look("image", 1.0)
    for t_end in LEVELS:
        yield Look("told", t_end)
        yield Look("noised", t_end)
        yield from (Look("reversed", t_end, steps) for steps in STEPS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", type=Path, required=True, help="of the path icfm")
    parser.add_argument(
        "--data",
        required=True,
        help="labelled images of classes that the entry never saw; train and validation",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args(argv)
    model = load(arguments.entry)
    with tempfile.TemporaryDirectory() as cache:
        found = splits(arguments.data)
        train, test = (load_split(found[k], model.image, Path(cache)) for k in ("train", "validation"))
    rows = []
    for look in looks():
        read = [features(model, images, look) for images in (train, test)]
        rows.append((look.kind, look.t_end, look.steps, look.cost, *figures(read, train, test)))
        print(*rows[-1], file=sys.stderr)
    plain = [np.stack([hog(pixels) for pixels in images.pixels]) for images in (train, test)]
    rows.append(("hog", None, None, 0, *figures(plain, train, test)))
    name = arguments.entry.resolve().name
    assert __doc__ is not None
    about = __doc__.partition("\n")[2].replace("\n", " ").strip()
    command = f"PYTHONPATH=. python benchmarks/solve.py --entry {arguments.entry} --data {Path(arguments.data).name}"
    report = Report(
        f"When the solve pays: {name}",
        f"{about} Top-1 in per cent, means of {SEEDS} draws of the labels, where fewer than all are used.",
        ("look", "t_end", "steps", "evaluations", *(f"{n} a class" for n in LABELS), "ten nearest"),
        rows,
        {"": draw_axes(lambda axes: draw(axes, rows), panels=2)},
        conditions={
            "command": command,
            "images": f"{len(train):,} to fit, {len(test):,} to evaluate, {len(train.classes)} classes",
            **conditions(),
        },
    )
    for path in write(report, arguments.out, f"solve-{name}"):
        print(path)
    return 0


@torch.no_grad()
def features(model: Model, images: Images, look: Look) -> np.ndarray:
    """HIDDEN, float32 [N, D]."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for start in range(0, len(images), BATCH):
        x = model.normalise(torch.from_numpy(np.ascontiguousarray(images.pixels[start : start + BATCH])))
        parts.append(look.at(model, x, torch.randn(x.shape, generator=generator)))
    return torch.cat(parts).numpy()


def figures(read: list[np.ndarray], train: Images, test: Images) -> tuple[float, ...]:
    """Top-1 in per cent by the number of labels, then of the ten nearest the share of the same class."""
    assert train.labels is not None
    assert test.labels is not None
    classes, found = len(train.classes), []
    for n in LABELS:
        scores = []
        # Of all images there is one choice.
        every = all(np.bincount(train.labels, minlength=classes) <= n)
        for seed in range(1 if every else SEEDS):
            chosen = draw_labels(train.labels, n, seed)
            scores.append(
                top1(linear_probe(read[0][chosen], train.labels[chosen], read[1], classes), test.labels)
            )
        found.append(round(100 * float(np.mean(scores)), 1))
    projection = fit_projection(torch.from_numpy(read[0]))
    vectors = projection(torch.from_numpy(read[1])).numpy()
    return *found, round(100 * same_class(vectors, test.labels), 1)


def draw_labels(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows of n images a class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate([order[labels[order] == c][:n] for c in np.unique(labels)])


def same_class(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Share of each vector's nearest others, by cosine, that have its label."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    nearest = np.argpartition(-similar, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return float((labels[nearest] == labels[:, None]).mean())


def hog(pixels: np.ndarray, orientations: int = 8, cells: int = 8) -> np.ndarray:
    """Gradients by orientation in each cell (Dalal and Triggs 2005, without blocks), and its mean colour."""
    image = pixels.astype(np.float32) / 255
    dy, dx = np.gradient(image.mean(0))
    size = np.hypot(dy, dx)
    bins = (np.arctan2(dy, dx) % np.pi / np.pi * orientations).astype(int) % orientations
    side = image.shape[1] // cells
    maps = np.concatenate([size * (bins == b)[None] for b in range(orientations)])
    both = np.concatenate([maps, image])[:, : side * cells, : side * cells]
    pooled = both.reshape(len(both), cells, side, cells, side).mean((2, 4))
    pooled[:orientations] /= np.linalg.norm(pooled[:orientations], axis=0) + 1e-3
    return pooled.ravel().astype(np.float32)


def draw(axes: list[object], rows: list[tuple[object, ...]]) -> None:
    """20 labels a class, and the ten nearest, over t_end."""
    for axis, column, title in zip(axes, (5, 7), (f"{LABELS[1]} labels a class", "ten nearest"), strict=True):
        for kind, steps in (("reversed", 1), ("reversed", 4), ("told", 0), ("noised", 0)):
            line = sorted((r[1], r[column]) for r in rows if r[0] == kind and r[2] == steps)  # type: ignore[type-var]
            label = f"{kind}, {steps} steps" if steps > 1 else kind
            axis.plot(*zip(*line, strict=True), marker="o", label=label)  # type: ignore[attr-defined]
        for kind, style in (("image", "-"), ("hog", ":")):
            value = next(r[column] for r in rows if r[0] == kind)
            axis.axhline(value, color="grey", linestyle=style, label=kind)  # type: ignore[attr-defined]
        axis.set(xlabel="t_end", ylabel="%", title=title)  # type: ignore[attr-defined]
        axis.legend(fontsize=8)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
