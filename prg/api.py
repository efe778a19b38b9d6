"""The method from Python: a run, a checkpoint or an entry as an encoder with exact gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entry.config import ImageSpec
from entry.images import load_image
from entry.runner import Runner
from prg.errors import CheckpointError
from prg.extractor import outputs
from prg.images.augmentation import normalise
from prg.trained import load_trained


class Encoding(NamedTuple):
    """Features of a batch, differentiable with respect to the images."""

    state: Tensor
    """x at t_end, pooled, [B, 768]."""
    hidden: Tensor
    """Activations of one further evaluation there, [B, D_h]."""
    embedding: Tensor | None
    """A projection of `hidden`, [B, D_e]; None where none was fitted."""
    logits: Tensor | None
    """[B, K]; None without a head."""
    known: Tensor | None
    """How typical of what the head was trained on, [B, 1]; None without a head or an embedding."""


@dataclass(frozen=True)
class Model:
    """A trained model; `extractor` computes, eager or scripted."""

    extractor: Any = field(repr=False)
    image: ImageSpec
    labels: tuple[str, ...]

    @property
    def encoder(self) -> Any:
        """What reverses; its network is `encoder.net`, where that is not scripted."""
        return self.extractor.encoder

    def images(self, files: Sequence[str | Path | bytes]) -> Tensor:
        """Files or their bytes, preprocessed as they are when served, normalised: [B, 3, S, S]."""
        read = [f if isinstance(f, bytes) else Path(f).read_bytes() for f in files]
        return self.normalise(torch.from_numpy(np.stack([load_image(f, self.image) for f in read])))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> the network's units. Raises ValueError for other tensors."""
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels are uint8, from 0 to 255, not {pixels.dtype}")
        return normalise(pixels, self.image.mean, self.image.std)

    def encode(self, x: Tensor, t_end: float | Tensor) -> Encoding:
        """Reverse x [B, 3, S, S] to t_end, a number or one an image [B]. The gradient is that of the solve.

        x: in the network's units, as `images` and `normalise` give it. t_end: from 0 (noise) to 1 (the image).
        Raises ValueError for other tensors, and for levels outside of that.
        """
        self._check(x, t_end)
        found = outputs(self.extractor, *self.extractor.encoder(x, _levels(x, t_end)))
        return Encoding(*(found.get(name.upper()) for name in Encoding._fields))  # type: ignore[arg-type]

    def trajectory(self, x: Tensor, levels: Sequence[float]) -> Tensor:
        """Whole states at several levels, each by the model's own solve: [L, B, 3, S, S]. Raises ValueError."""
        self._check(x, torch.tensor(levels))
        return torch.stack([self.encoder.reverse(x, _levels(x, level))[0] for level in levels])

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """v(x, t), to integrate in one's own way: `prg.solver.integrate(model.velocity, x, 1.0, 0.5, steps=20)`."""
        out: Tensor = self.encoder.solver.velocity(x, _levels(x, t))
        return out

    def _check(self, x: Tensor, levels: float | Tensor) -> None:
        size = self.image.size
        if not x.is_floating_point() or x.ndim != 4 or x.shape[1:] != (3, size, size):
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; this model takes floats [B, 3, {size}, {size}] in its own units: "
                "what `images` gives of files, and `normalise` of pixels"
            )
        t = torch.as_tensor(levels)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"t_end = {levels}: from 0 (noise) to 1 (the image) is needed")


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """A model from an entry's folder, a run's folder (fine-tuned if it is, else pretrained) or a checkpoint.

    Raises CheckpointError, EntryError.
    """
    path = Path(path)
    if (path / "config.pbtxt").is_file():
        runner = Runner(path, device=str(device))
        return Model(runner.module, runner.entry.prg.image, runner.entry.prg.labels or ())
    if path.is_dir():
        stages = [path / stage / "checkpoint.safetensors" for stage in ("finetune", "pretrain")]
        found = [p for p in stages if p.is_file()]
        if not found:
            raise CheckpointError(f"{path}: neither an entry nor a run with a checkpoint")
        path = found[0]
    extractor, facts = load_trained(path)
    return Model(extractor.to(device).eval(), facts.recipe.image.spec, facts.classes)


def _levels(x: Tensor, t: float | Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
