"""Small networks with weights that matter, for tests."""

import torch

from prg.unet import PRESETS, UNet


def random_net(preset: str = "tiny16", seed: int = 0) -> UNet:
    """A network whose zero-initialised layers are filled too, so that its velocity depends on everything."""
    torch.manual_seed(seed)
    net = UNet(PRESETS[preset])
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()
