"""torch.compile for the network, where a recipe asks for it; in place, so that its weights keep their names."""

from collections.abc import Callable
from typing import Any

import torch

from prg.unet import UNet

BACKEND: str | Callable[..., Any] = "inductor"


def compile_network(net: UNet) -> None:
    """Compile both ways through the network, velocity and activations; each is done when it is first called."""
    net.compile(backend=BACKEND)
    net.activations = torch.compile(net.activations, backend=BACKEND)  # type: ignore[method-assign]
