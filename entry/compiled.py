"""A module compiled for this processor: made once, kept in a folder between starts, loaded from it."""

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entry.files import sha256, write_atomically

Module = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""IMAGE and T_END to the outputs, in their order."""

FACTS = "facts.json"
SMALL = (1, 8)
LEVELS = (0.8, 1.0, 0.55, 0.9, 0.3, 0.0)


def compiler() -> str | None:
    """The C++ compiler that PyTorch will call, if there is one."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def batch_sizes(most: int) -> tuple[int, ...]:
    """The sizes to compile for batches of at most `most`, largest first. Each is one fixed shape: that is faster."""
    return tuple(sorted({size for size in (*SMALL, most) if size <= most}, reverse=True))


def facts(weights: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """All that a compiled module depends on. weights: sha256 of model.pt."""
    return {
        "weights": weights,
        "sizes": list(sizes),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def folder(cache: Path, name: str, version: str) -> Path:
    """Where a version of an entry is kept, one compilation of it at a time."""
    return cache / f"{name}-{version}"


def make(module: Module, size: int, batch: int, path: Path) -> None:
    """Compile a scripted module for one batch size. Needs a C++ compiler, a gigabyte of memory, half a minute."""
    from torch.fx.experimental.proxy_tensor import make_fx

    example = inputs(size, batch)
    with torch.no_grad():
        # torch.export takes no TorchScript; make_fx records the operators that it runs.
        graph = make_fx(lambda images, levels: module(images, levels))(*example)
        exported = torch.export.export(graph, example)
        made = torch._inductor.aot_compile(exported.module(), example, options={"freezing": True})
    shutil.move(str(made), path)


def write_facts(directory: Path, wanted: dict[str, Any]) -> None:
    """Say what lies in the folder; without this file nothing in there is used."""
    digests = {str(size): sha256(directory / f"{size}.so") for size in wanted["sizes"]}
    write_atomically(directory / FACTS, json.dumps({"facts": wanted, "sha256": digests}).encode())


def is_good(directory: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds just this, undamaged."""
    try:
        described = json.loads((directory / FACTS).read_text("utf-8"))
        digests = {str(size): sha256(directory / f"{size}.so") for size in wanted["sizes"]}
        return bool(described == {"facts": wanted, "sha256": digests})
    except (OSError, ValueError):
        return False


def load(directory: Path, sizes: tuple[int, ...]) -> dict[int, Module]:
    """The compiled module of each batch size."""
    return {size: _loaded(directory / f"{size}.so") for size in sizes}


def inputs(size: int, batch: int) -> tuple[Tensor, Tensor]:
    """Random images and levels of all kinds, the same at each call."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
    return torch.from_numpy(pixels), torch.tensor(LEVELS).repeat(batch)[:batch, None]


def split(rows: int, sizes: tuple[int, ...]) -> list[int]:
    """A batch as sizes that are compiled, largest first, and one rest for TorchScript."""
    parts = []
    for size in sizes:
        # More than two singles take longer than TorchScript on all of them.
        while rows >= size and (size > 1 or rows <= 2):
            parts.append(size)
            rows -= size
    return [*parts, rows] if rows else parts


def _loaded(path: Path) -> Module:
    # Not torch._inductor.aoti_load_package: it imports the compiler, 85 MB of it, and takes three seconds.
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

    def call(images: Tensor, levels: Tensor) -> tuple[Tensor, ...]:
        return tuple(runner.run([images, levels]))

    return call


def _processor() -> str:
    """A digest of what the compiler optimises for."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    named = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    text = "\n".join(
        [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *named]
    )
    return hashlib.sha256(text.encode()).hexdigest()
