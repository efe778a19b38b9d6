"""The device that computes: which one, its name, and the precision it trains fastest in."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from entry.runner import find_device

Precision = Literal["fp32", "bf16"]


def choose_device() -> torch.device:
    """What PRG_DEVICE names, else the GPU where there is one; of several, this process's own. Raises DeviceError."""
    return find_device(os.environ.get("PRG_DEVICE") or "auto")


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's name; of a processor also its vector units and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = _cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    units = [f for f in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if f in flags][:1]
    return ", ".join([name, *units, f"{torch.get_num_threads()} threads"])


def training_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What to train in: as asked, or else bf16 where the device has units for it.

    Without them a processor computes bf16 up to 500 times slower than fp32. With AVX512-BF16 (AMD EPYC, two
    cores) steps of `cifar10-small` and `images-64` take 0.47 to 0.55 of their time in fp32.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = _cpuinfo().get("flags", "").split()
        has_units = "amx_bf16" in flags or "avx512_bf16" in flags
    return "bf16" if has_units else "fp32"


def best_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes: the better of two runs, after one to warm up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _cpuinfo() -> dict[str, str]:
    """The first processor's facts where the system is Linux, else none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
