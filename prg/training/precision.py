"""fp32 or bf16, by timing both here: which is faster depends on the processor, by orders of magnitude."""

import math
import sys
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]

MARGIN = 1.15
"""What is not in use must be this much faster to be changed to: timings are noisy, and bf16 costs accuracy."""


def choose_precision(
    loss: Callable[[Precision], Tensor], model: nn.Module, kept: Precision | None
) -> Precision:
    """Time forward and backward of `loss` in both precisions and choose; says what it chose.

    kept: the precision of the run being resumed, changed only if it is the slower one here.
    """
    device = next(model.parameters()).device
    seconds = {"fp32": _seconds(lambda: loss("fp32"), model, device), "bf16": math.inf}
    if _bf16_is_usable(device):  # or else one batch could take minutes
        seconds["bf16"] = _seconds(lambda: loss("bf16"), model, device)
    chosen: Precision = kept or "fp32"
    other: Precision = "bf16" if chosen == "fp32" else "fp32"
    if seconds[other] * MARGIN < seconds[chosen]:
        chosen = other
    shown = {k: f"{v * 1e3:.0f} ms" if v < math.inf else "far slower" for k, v in seconds.items()}
    was = f", changed from {kept}, which is slower on this machine" if kept not in (None, chosen) else ""
    print(f"precision: {chosen}{was} (a step: fp32 {shown['fp32']}, bf16 {shown['bf16']})", file=sys.stderr)
    return chosen


def _bf16_is_usable(device: torch.device) -> bool:
    """Whether a small convolution in bf16 takes at most twice its time in fp32."""
    x = torch.randn(8, 64, 16, 16, device=device)
    w = torch.randn(64, 64, 3, 3, device=device)
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), w.to(dtype)
        torch.nn.functional.conv2d(a, b)
        _wait(device)
        start = time.perf_counter()
        torch.nn.functional.conv2d(a, b)
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[1] < 2 * times[0] + 1e-3


def _seconds(loss: Callable[[], Tensor], model: nn.Module, device: torch.device) -> float:
    """The shorter of two timed steps after one that is not counted; leaves no gradient behind."""
    times = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        loss().backward()
        _wait(device)
        times.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
