"""What is studied: an entry's own module, opened up to its velocity field and its head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entry.config import EntryError
from entry.runner import Runner
from prg.console import Bar
from prg.encoder import pooled_state
from prg.extractor import outputs
from prg.images.augmentation import normalise
from prg.images.sets import Pixels
from prg.machine import choose_device
from prg.paths import PATHS
from prg.solver import TABLEAUS, integrate
from prg.training.figures import to_pixels

BATCH = 64


@dataclass(frozen=True)
class Solve:
    """One way to go along the flow."""

    solver: str
    steps: int

    @property
    def nfe(self) -> int:
        """Network evaluations of the solve alone."""
        return self.steps * TABLEAUS[self.solver].stages

    def __str__(self) -> str:
        return f"{self.solver}, {self.steps} step{'s' if self.steps > 1 else ''}"


class Subject:
    """One version of an entry. Its scripted parts are called by themselves, so any solver can go any way.

    Raises EntryError where the entry is not usable.
    """

    def __init__(self, directory: Path, version: str | None = None, name: str | None = None) -> None:
        self.device = choose_device()
        runner = Runner(directory, version, str(self.device))
        entry, module = runner.entry, runner.module
        self.version, self.name = runner.version, name or entry.name
        self.entry, self.prg = entry, entry.prg
        try:
            self._module: Any = module
            self._encoder: Any = module.encoder
            self._field: Any = self._encoder.solver.velocity
        except AttributeError as error:
            raise EntryError(f"{directory}: not a module that `prg export` writes ({error})") from None

    @property
    def own(self) -> Solve:
        """The entry's own solve."""
        return Solve(self.prg.solver, self.prg.steps)

    @property
    def t_start(self) -> float:
        """Where a reverse solve begins."""
        return PATHS[self.prg.path].t_start

    @property
    def classify_t_end(self) -> float:
        """The level the head was trained at. Raises EntryError for an entry without head."""
        if self.prg.classify_t_end is None:
            raise EntryError(f"{self.name}: has no head; this study needs a fine-tuned model")
        return self.prg.classify_t_end[0]

    def latents(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, 3, S, S] -> the network's own units."""
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        return normalise(tensor, self.prg.image.mean, self.prg.image.std)

    def pixels(self, x: Tensor) -> np.ndarray:
        """The network's own units -> uint8 [B, 3, S, S]."""
        return to_pixels(x, self.prg.image.mean, self.prg.image.std)

    def flow(self, x: Tensor, t_from: float, t_to: float, solve: Solve) -> Tensor:
        """x at t_from -> the state at t_to; times past the path's t_start are taken as t_start."""
        start, end = min(t_from, self.t_start), min(t_to, self.t_start)
        if start == end:
            return x
        with torch.inference_mode():
            return integrate(self._field, x, start, end, solve.steps, solve.solver, save_memory=False)

    def evaluations(self, t_end: float, solve: Solve) -> int:
        """Of the network, for one image's features: those of the solve, and one for the activations."""
        return 1 + (solve.nfe if t_end < self.t_start else 0)

    def features(self, pixels: Pixels, t_end: float, solve: Solve, bar: Bar) -> dict[str, np.ndarray]:
        """The entry's outputs by name, float32 [N, D], for pixels uint8 [N, 3, S, S] reversed to t_end by `solve`.

        `bar` counts network evaluations.
        """
        parts: list[dict[str, np.ndarray]] = []
        each = self.evaluations(t_end, solve)
        with torch.inference_mode():
            for start in range(0, len(pixels), BATCH):
                x = self.latents(pixels[start : start + BATCH])
                z = self.flow(x, 1.0, t_end, solve)
                t = torch.full((len(x),), min(t_end, self.t_start), device=self.device)
                found = outputs(self._module, pooled_state(z), self._encoder.hidden(z, t))
                parts.append({name: values.float().cpu().numpy() for name, values in found.items()})
                bar.advance(len(x) * each, f"t_end {t_end:g}, {solve}")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
