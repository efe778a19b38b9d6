"""Gradients of the reverse solve: ours, plain autograd, and the continuous adjoint. Prints one JSON line last.

Error against the gradient of the same discrete solve in float64; time; bytes that autograd keeps.

python benchmarks/gradients.py [--network PRESET] [--batch N] [--rounds N]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prg.machine import device_name
from prg.paths import VelocityField
from prg.solver import integrate
from prg.unet import PRESETS, UNet

STEPS = (1, 2, 4, 8, 16, 32)
Solve = Callable[[VelocityField, Tensor, int], Tensor]


class Adjoint(torch.autograd.Function):
    """Euler from t = 1 to 0 that keeps its last state alone; its gradient solves the adjoint ODE by Euler back.

    In the backward pass the state is integrated anew, and by Euler it does not return the way it came: hence the bias.
    """

    @staticmethod
    def forward(ctx, field: VelocityField, steps: int, x: Tensor, *params: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            end = integrate(field, x, 1.0, 0.0, steps)
        ctx.field, ctx.steps = field, steps
        ctx.save_for_backward(end)
        return end

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        params = list(ctx.field.parameters())
        total = [torch.zeros_like(p) for p in params]
        h = 1 / ctx.steps
        for k in range(ctx.steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                slope = ctx.field(x, torch.full((len(x),), k * h, dtype=x.dtype))
                by_x, *by_params = torch.autograd.grad(slope, [x, *params], gradient)
            x = x + h * slope.detach()  # dx/dt = v
            gradient = gradient - h * by_x  # da/dt = -a dv/dx
            total = [g - h * b for g, b in zip(total, by_params, strict=True)]
        return None, None, gradient, *total


METHODS: dict[str, Solve] = {
    "checkpointed": lambda field, x, steps: integrate(field, x, 1.0, 0.0, steps),
    "autograd": lambda field, x, steps: integrate(field, x, 1.0, 0.0, steps, save_memory=False),
    "adjoint": lambda field, x, steps: Adjoint.apply(field, steps, x, *field.parameters()),
}


def network(preset: str) -> VelocityField:
    """A network whose zero-initialised layers are filled too, so that its velocity depends on everything."""
    torch.manual_seed(0)
    net = UNet(PRESETS[preset])
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return VelocityField(net)


@contextmanager
def kept_bytes(field: VelocityField) -> Iterator[Callable[[], int]]:
    """Gives a function: bytes of distinct storages that autograd keeps in the context, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in field.parameters()}
    kept: dict[int, int] = {}
    holders = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        holders.append(tensor)  # keeps every address in use, so that none is counted for another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(kept.values())


def gradient(solve: Solve, field: VelocityField, x: Tensor, steps: int) -> tuple[Tensor, float, int]:
    """Of half the squared end state, by all parameters and x in one vector; seconds; bytes kept on the way."""
    x = x.clone().requires_grad_()
    start = time.perf_counter()
    with kept_bytes(field) as kept:
        end = solve(field, x, steps)
        size = kept()
    found = torch.autograd.grad(0.5 * end.square().sum(), [x, *field.parameters()])
    return torch.cat([g.flatten() for g in found]), time.perf_counter() - start, size


def main(argv: list[str] | None = None) -> int:
    """Every method in turn, round by round, so that a slow moment hits all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=PRESETS, default="tiny16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    field = network(arguments.network)
    side = PRESETS[arguments.network].image_size
    x = torch.randn(arguments.batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    rows = []
    print(f"{'steps':>5} {'method':13} {'error':>9} {'ms':>9} {'to autograd':>11} {'kB kept':>9}")
    gradient(METHODS["checkpointed"], field, x, 1)  # warm
    for steps in STEPS:
        exact, _, _ = gradient(METHODS["autograd"], field.double(), x.double(), steps)
        field.float()
        found = [
            {n: gradient(s, field, x, steps) for n, s in METHODS.items()} for _ in range(arguments.rounds)
        ]
        seconds = {name: statistics.median(r[name][1] for r in found) for name in METHODS}
        for name in METHODS:
            vector, _, size = found[0][name]
            row = {
                "steps": steps,
                "method": name,
                "error": float(f"{float((vector - exact).norm() / exact.norm()):.3g}"),
                "ms": round(seconds[name] * 1e3, 1),
                "time_to_autograd": round(statistics.median(r[name][1] / r["autograd"][1] for r in found), 2),
                "kb_kept": round(size / 1e3),
            }
            rows.append(row)
            print("{:5} {:13} {:9.3g} {:9.1f} {:11.2f} {:9,}".format(*row.values()), flush=True)
    facts = {
        "benchmark": "gradients",
        "network": arguments.network,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "rows": rows,
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
