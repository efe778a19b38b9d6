"""Run an entry's model.pt in this process, compiled where that was done."""

import logging
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.export.passes import move_to_device_pass

from entry import compiled
from entry.config import EntryError, check_weights, read_entry
from entry.errors import DeviceError

Precision = Literal["entry", "bf16"]
"""The entry's own, or its network in bf16."""


def find_device(asked: str = "auto") -> torch.device:
    """auto: the GPU, where there is one, else the processor. Raises DeviceError for one that is not there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if asked == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    there = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if asked not in there:
        build = "" if torch.version.cuda else f"; this PyTorch, {torch.__version__}, is built without CUDA"
        raise DeviceError(f"no device {asked!r} here; there are: {', '.join(there)}{build}")
    return torch.device(asked)


WEIGHTS = "weights"
"""What a model.pt2 says about itself: the sha256 of the model.pt that it was exported with."""


class Runner:
    """One version of an entry, loaded and checked.

    device: as `find_device` takes it. Raises EntryError where the entry is not usable, its digest differs, or the
    module does not answer with the tensors that its configuration promises; DeviceError.
    """

    def __init__(
        self, directory: Path, version: str | None = None, device: str = "cpu", precision: Precision = "entry"
    ) -> None:
        self.directory = directory
        self.entry = read_entry(directory)
        self.version = version or self.entry.default_version
        if reason := self.entry.failed_versions.get(self.version):
            raise EntryError(reason)
        if self.version not in self.entry.prg.versions:
            raise EntryError(
                f"{directory}: no version {self.version!r} (there are: {', '.join(self.entry.prg.versions)})"
            )
        self.device = find_device(device)
        self.most_rows: int | None = None
        """Of a batch, once a larger one did not fit into the device's memory."""
        self.compiled: dict[int, compiled.Module] = {}
        """The module compiled, by batch size, largest first; what fits none of them is TorchScript's."""
        path = check_weights(directory, self.entry, self.version)
        self.module = self._load(path)
        if precision == "bf16":
            self._compute_in_bf16(path)
        self._check(path)

    def run(self, images: np.ndarray, t_end: np.ndarray) -> dict[str, np.ndarray]:
        """images uint8 [B, 3, S, S] and t_end float32 [B] -> the entry's outputs by name, float32 [B, D] each.

        A batch that does not fit into the GPU's memory is computed in halves. Raises ValueError on other shapes.
        """
        size = self.entry.prg.image.size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} {images.shape}, must be uint8 [B, 3, {size}, {size}]"
            )
        if t_end.dtype != np.float32 or t_end.shape != images.shape[:1]:
            raise ValueError(f"t_end is {t_end.dtype} {t_end.shape}, must be float32 [{len(images)}]")
        while True:
            rows = self.most_rows or len(images)
            try:
                parts = [
                    self._run(images[i : i + rows], t_end[i : i + rows]) for i in range(0, len(images), rows)
                ]
                break
            except torch.cuda.OutOfMemoryError:
                if rows == 1:
                    raise
            # Outside of the handler: the exception holds on to what the failed call allocated.
            self.most_rows = (rows + 1) // 2
            torch.cuda.empty_cache()
            logging.getLogger("prg").warning(
                "%s: %d images at once don't fit into the memory of %s; from now on %d",
                *(self.entry.name, rows, self.device, self.most_rows),
            )
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.entry.outputs()}

    def _run(self, images: np.ndarray, t_end: np.ndarray) -> dict[str, np.ndarray]:
        tensors = zip(self.entry.outputs(), self._call(images, t_end), strict=True)
        return {name: tensor.float().cpu().numpy() for name, tensor in tensors}

    def _call(self, images: np.ndarray, t_end: np.ndarray) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            levels = torch.from_numpy(np.ascontiguousarray(t_end)).to(self.device)[:, None]
            # Held: another thread may set it meanwhile.
            ready = self.compiled
            parts = compiled.split(len(pixels), tuple(ready))
            called = zip(parts, pixels.split(parts), levels.split(parts), strict=True)
            outputs = [ready.get(rows, self.module)(*some) for rows, *some in called]
            return outputs[0] if len(outputs) == 1 else tuple(map(torch.cat, zip(*outputs, strict=True)))

    def use_compiled(self, cache: Path, most: int) -> bool:
        """Compute by what `entry.compile` left in the cache, for batches of at most `most` rows, if it is there.

        It must be of these very weights, PyTorch and processor, undamaged, and equal to the module within the entry's
        tolerance at each of its sizes; otherwise it is removed.
        """
        sizes = compiled.batch_sizes(most)
        directory = compiled.folder(cache, self.entry.name, self.version)
        wanted = compiled.facts(self.entry.prg.versions[self.version].sha256, sizes)
        if not directory.is_dir():
            return False
        # By RuntimeError where the system can't load it, such as from a file system that runs no programs.
        with suppress(RuntimeError):
            if compiled.is_good(directory, wanted):
                modules = compiled.load(directory, sizes)
                if all(self._is_equal(module, size) for size, module in modules.items()):
                    self.compiled = modules
                    return True
        shutil.rmtree(directory, ignore_errors=True)
        return False

    def _is_equal(self, module: compiled.Module, batch: int) -> bool:
        tolerance = self.entry.prg.tolerance
        with torch.inference_mode():
            pairs = [m(*compiled.inputs(self.entry.prg.image.size, batch)) for m in (module, self.module)]
        for found, expected in zip(*pairs, strict=True):
            apart = (found - expected).abs().amax(1) / expected.abs().amax(1).clamp(min=1e-12)
            cosine = torch.cosine_similarity(found, expected)
            # The direction of zeros is none. Written so that NaN is unequal.
            good = (apart <= tolerance.relative) & ((cosine >= tolerance.cosine) | (apart == 0))
            if not bool(good.all()):
                return False
        return True

    def load_exported(self) -> torch.nn.Module | None:
        """The version's model.pt2, where it has one. Raises EntryError where it is of another model.pt, or broken."""
        path = self.directory / self.version / "model.pt2"
        if not path.is_file():
            return None
        about = {WEIGHTS: ""}
        try:
            program = torch.export.load(path, extra_files=about)
        # Of many kinds, by what is broken.
        except Exception as error:
            raise _unloadable(path, error) from None
        if about[WEIGHTS] != self.entry.prg.versions[self.version].sha256:
            raise EntryError(f"{path}: exported with another model.pt; export both again")
        return move_to_device_pass(program, self.device).module()

    def _load(self, path: Path) -> Any:
        """TorchScript, or model.pt2 where this PyTorch can't load that: eager, model.pt2 is slower."""
        try:
            return torch.jit.load(str(path), map_location=self.device).eval()
        except (AttributeError, RuntimeError, ValueError, OSError) as error:
            if exported := self.load_exported():
                return exported
            raise _unloadable(path, error) from None

    def _compute_in_bf16(self, path: Path) -> None:
        """The network's weights in bf16: it computes in their precision, and all else stays in float32."""
        try:
            # A model.pt2 has its precisions written into it.
            if not isinstance(self.module, torch.jit.ScriptModule):
                raise AttributeError
            self.module.encoder.solver.velocity.net.to(torch.bfloat16)
        except AttributeError:
            raise EntryError(f"{path}: no network that could compute in bf16; serve it as it is") from None
        self.entry = replace(self.entry, computed_in="bf16")

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


def _unloadable(path: Path, error: Exception) -> EntryError:
    reason = str(error).strip().partition("\n")[0]
    return EntryError(f"{path}: PyTorch {torch.__version__} can't load it ({reason})")
