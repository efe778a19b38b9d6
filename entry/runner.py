"""Run an entry's model.pt in this process; the package's only importer of torch."""

from pathlib import Path

import numpy as np
import torch

from entry.config import EntryError, check_weights, read_entry


class Runner:
    """One version of an entry, loaded and checked.

    Raises EntryError where the entry is not usable, its digest differs, or the module does not answer with
    the tensors that its configuration promises.
    """

    def __init__(self, directory: Path, version: str | None = None, device: str = "cpu") -> None:
        self.entry = read_entry(directory)
        self.version = version or self.entry.default_version
        if reason := self.entry.failed_versions.get(self.version):
            raise EntryError(reason)
        if self.version not in self.entry.prg.versions:
            raise EntryError(
                f"{directory}: no version {self.version!r} (there are: {', '.join(self.entry.prg.versions)})"
            )
        self.device = torch.device(device)
        path = check_weights(directory, self.entry, self.version)
        try:
            self.module = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise EntryError(f"{path}: PyTorch {torch.__version__} can't load it ({reason})") from None
        self._check(path)

    def run(self, images: np.ndarray, t_end: np.ndarray) -> dict[str, np.ndarray]:
        """images uint8 [B, 3, S, S] and t_end float32 [B] -> the entry's outputs by name, float32 [B, D] each.

        Raises ValueError on other shapes.
        """
        size = self.entry.prg.image.size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} {images.shape}, must be uint8 [B, 3, {size}, {size}]"
            )
        if t_end.dtype != np.float32 or t_end.shape != images.shape[:1]:
            raise ValueError(f"t_end is {t_end.dtype} {t_end.shape}, must be float32 [{len(images)}]")
        tensors = zip(self.entry.outputs(), self._call(images, t_end), strict=True)
        return {name: tensor.float().cpu().numpy() for name, tensor in tensors}

    def _call(self, images: np.ndarray, t_end: np.ndarray) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            levels = torch.from_numpy(np.ascontiguousarray(t_end)).to(self.device)[:, None]
            outputs: tuple[torch.Tensor, ...] = self.module(pixels, levels)
        return outputs

    def _check(self, path: Path) -> None:
        """Run one image through the module and compare its answers with the configuration."""
        size = self.entry.prg.image.size
        try:
            outputs = self._call(np.zeros((1, 3, size, size), np.uint8), np.ones(1, np.float32))
            found = [list(tensor.shape) for tensor in outputs]
        except (RuntimeError, TypeError, AttributeError) as error:
            raise EntryError(f"{path}: it does not run ({str(error).strip().splitlines()[-1]})") from None
        promised = [[1, dim] for dim in self.entry.outputs().values()]
        if found != promised:
            raise EntryError(f"{path}: it answers with shapes {found}, its config.pbtxt promises {promised}")
