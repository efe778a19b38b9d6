"""Samples: generated images and their Fréchet distance to the data, in features that are named."""

import numpy as np
import torch

from prg.console import track
from prg.errors import DataError
from prg.images.material import Material
from prg.images.sets import Pixels, sample
from prg.studies.report import Cell, Draw, Report
from prg.studies.subject import BATCH, Solve, Subject
from prg.training.figures import save_grid

SOLVES = (Solve("euler", 4), Solve("euler", 25), Solve("heun", 25))
SHOWN = 100
COLUMNS = ("what", "solver", "steps", "Fréchet distance")


def samples(subject: Subject, judge: Subject, material: Material, limit: int | None) -> Report:
    """As many samples as `limit`, compared with as many images of the training split by the judge's features."""
    data = material.training()[0]
    count = min(limit or len(data) // 2, len(data) // 2)
    compared = "EMBEDDING" if judge.prg.features.embedding else "HIDDEN"
    dim = judge.entry.outputs()[compared]
    if count < 2 * dim:
        raise DataError(
            f"{material.source}: {count} images on each side are too few for the covariance of {dim} features; "
            f"at least {2 * dim} are needed"
        )
    both = sample(data, 2 * count)
    order = np.random.default_rng(0).permutation(2 * count)
    one, other = both.subset(np.sort(order[:count])), both.subset(np.sort(order[count:]))
    reference = _features(judge, one.pixels, compared)
    rows: list[tuple[Cell, ...]] = [
        (
            "data against data",
            None,
            None,
            frechet_distance(_features(judge, other.pixels, compared), reference),
        )
    ]
    sheets = {}
    for solve in SOLVES:
        made = generate(subject, count, solve)
        rows.append(
            (
                "samples",
                solve.solver,
                solve.steps,
                frechet_distance(_features(judge, made, compared), reference),
            )
        )
        sheets[f"{solve.solver}-{solve.steps}"] = made[:SHOWN]
    fingerprint = judge.entry.fingerprints(judge.version).encoder
    feature = (
        f"{compared} of {judge.name} (version {judge.version}, {fingerprint}) at t_end = {judge.prg.t_end:g}"
    )
    return Report(
        title="Samples: generated images",
        about=f"Images generated from noise, and their Fréchet distance in {feature}: between normal "
        "distributions of the two sets' features. It is no FID: other features, other numbers, comparable only "
        "where the features and the number of images are the same. Data against data, two halves of the "
        "training split of that number, is the floor.",
        columns=COLUMNS,
        rows=rows,
        figures={name: _grid(sheet) for name, sheet in sheets.items()},
        conditions={"images_a_side": count, "features": feature},
    )


def _grid(pixels: np.ndarray) -> Draw:
    return lambda path: save_grid(pixels, 10, path, zoom=2)


def generate(subject: Subject, count: int, solve: Solve, seed: int = 0) -> np.ndarray:
    """Images uint8 [N, 3, S, S] from noise by the subject's flow, the same for the same seed."""
    side = subject.prg.image.size
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with track(f"generating, {solve}", count) as bar:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            noise = torch.randn(size, 3, side, side, generator=generator).to(subject.device)
            parts.append(subject.pixels(subject.flow(noise, 0.0, 1.0, solve)))
            bar.advance(size)
    return np.concatenate(parts)


def _features(judge: Subject, pixels: Pixels, compared: str) -> np.ndarray:
    level, solve = judge.prg.t_end, judge.own
    with track(
        f"features by {judge.name}", len(pixels) * judge.evaluations(level, solve), "evaluations"
    ) as bar:
        return judge.features(pixels, level, solve, bar)[compared]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between normal distributions with the means and covariances of the rows (Dowson and Landau 1982).

    |m_a - m_b|² + tr(A + B - 2 (A B)^½), the last trace by the eigenvalues of the symmetric A^½ B A^½.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    means = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    return means + float(np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross.clip(0)).sum())
