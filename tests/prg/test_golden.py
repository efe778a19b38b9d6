"""The official code's numbers: network, reverse solve and head."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from prg.classifier import Head, HeadConfig
from prg.encoder import Encoder, EncoderConfig, pooled_state
from prg.importers.official import turn_time
from prg.unet import PRESETS, UNet
from tests.golden.fill import fill, image_batch

GOLDEN = Path(__file__).parent.parent / "golden"

CASES = {
    # file             preset    time reversed  steps  t_end             classes
    "icfm32_full": ("unet32", False, 31, 0.0, 10),
    "icfm64_cut20": ("unet64", False, 11, 1 - 11 / 31, 1000),
    "gvp32_cut8": ("unet32", True, 7, 1 - 7 / 19, 10),
}


@pytest.mark.parametrize("preset", ["unet32", "unet64"])
def test_official_names_and_shapes(preset: str) -> None:
    lines = (GOLDEN / f"{preset}_keys.txt").read_text().splitlines()
    with torch.device("meta"):
        net = UNet(PRESETS[preset])
    assert [f"{k}\t{tuple(v.shape)}" for k, v in net.state_dict().items()] == lines


@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_official_numbers(case: str) -> None:
    preset, time_reversed, steps, t_end, classes = CASES[case]
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{case}.npz").items() if v.ndim}
    net = UNet(PRESETS[preset])
    encoder = Encoder(net, EncoderConfig(steps=steps))
    head = Head(encoder, HeadConfig(classes))
    fill({f"unet.{k}": v for k, v in net.state_dict().items()})
    fill({f"head.{k}": v for k, v in head.state_dict().items()})
    assert torch.equal(golden["x"], image_batch(net.config.image_size))
    with torch.inference_mode():
        v = net(golden["x"], golden["t"])
        if time_reversed:
            # In float64, because 1 - t is rounded, and what comes of that differs between processors.
            exact = deepcopy(net).double()
            x, t = golden["x"].double(), golden["t"].double()
            expected = exact(x, t)
            exact.load_state_dict(turn_time(exact.state_dict()))
            torch.testing.assert_close(-exact(x, 1 - t), expected, atol=1e-5, rtol=0)
            net.load_state_dict(turn_time(net.state_dict()))
        z, reached = encoder.reverse(golden["x"], torch.full((2,), t_end))
        state = pooled_state(z)
        logits = head(state, state)  # it reads the first alone
    for name, found, bound in (("v", v, 1e-4), ("z", z, 1e-3), ("logits", logits, 1e-3)):
        torch.testing.assert_close(found, golden[name], atol=bound, rtol=0)
    assert reached == pytest.approx([t_end] * 2)
