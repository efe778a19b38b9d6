"""What STATE and HIDDEN are, image by image."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import random_net

from entry.config import ImageSpec
from prg.classifier import Classifier, Head, HeadConfig
from prg.encoder import Encoder, EncoderConfig, pooled_state
from prg.extractor import Extractor
from prg.fitting import fit_projection
from prg.paths import PATHS
from prg.unet import PRESETS, UNet, UNetConfig

OPERATORS = Path(__file__).parent.parent / "golden" / "operators-torch-2.11.txt"
"""What modules that PyTorch 2.11 was seen to load and run are made of."""
LEVELS = torch.tensor([1.0, 0.8, 0.35, 0.0])


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b| of the worst image."""
    return ((a - b).abs().amax(1) / b.abs().amax(1)).max().item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_mixed_batch_equals_the_images_alone(solver: str, path: str) -> None:
    encoder = Encoder(random_net(), EncoderConfig(path, solver, steps=3))
    model = Classifier(encoder, HeadConfig(5, ("state", "middle_block.mean"))).eval()
    with torch.inference_mode():
        together = model(images(), LEVELS)
        alone = [model(images()[i : i + 1], LEVELS[i : i + 1]) for i in range(4)]
    for k, output in enumerate(together):
        assert relative(output, torch.cat([a[k] for a in alone])) < 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("official", [True, False])
def test_scripted_it_needs_no_operator_that_older_pytorch_lacks(path: str, official: bool) -> None:
    """A server's PyTorch may be older than the one that exported."""
    shape = UNetConfig(16, 8, (1, 2), 1, groups=4) if official else replace(PRESETS["tiny16"], pad_after=True)
    encoder = Encoder(UNet(shape), EncoderConfig(path, "rk4", steps=2))
    head = Head(encoder, HeadConfig(5, ("state", "middle_block.mean")))
    image = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)
    projection = fit_projection(torch.randn(64, encoder.hidden_dim))
    model = Extractor(encoder, image, projection, head)
    needed = torch.jit.export_opnames(torch.jit.script(model.eval()))  # type: ignore[attr-defined]
    assert "aten::conv2d" in needed
    assert set(needed) <= set(OPERATORS.read_text().split())


def test_state_at_1_is_the_image_and_moves_with_the_level() -> None:
    encoder = Encoder(random_net(), EncoderConfig(steps=2))
    with torch.inference_mode():
        state, hidden = encoder(images(1).expand(4, -1, -1, -1), LEVELS)
        assert torch.equal(state[0], pooled_state(images(1))[0])
        assert len(state.unique(dim=0)) == len(hidden.unique(dim=0)) == 4
        encoder.t_start = 0.9  # as on a path whose velocity is infinite at the data
        state, hidden = encoder(images(1), torch.tensor([0.95]))
        assert torch.equal(state, pooled_state(images(1)))
        assert torch.equal(hidden, encoder.hidden(images(1), torch.tensor([0.9])))


def test_hidden_is_one_further_evaluation_at_the_end_point() -> None:
    net = random_net()
    layers = ("input_blocks.1", "middle_block", "output_blocks.1")
    encoder = Encoder(net, EncoderConfig(solver="rk4", steps=3, layers=layers))
    seen: dict[str, torch.Tensor] = {}
    evaluations = []
    for name in net.block_names():
        net.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    net.time_embed.register_forward_hook(lambda *_: evaluations.append(1))
    with torch.inference_mode():
        _, hidden = encoder(images(), LEVELS)
        assert len(evaluations) == encoder.config.nfe == 13
        z, t = encoder.reverse(images(), LEVELS)
        seen.clear()
        encoder.hidden(z, t)
        assert list(seen)[-1] == layers[-1]  # no block past the deepest named one runs
        net(z, t)
    expected = []
    for h in (seen[name].flatten(2) for name in layers):
        expected += [h.mean(2), (h.var(2, unbiased=False) + 1e-6).sqrt()]
    torch.testing.assert_close(hidden, torch.cat(expected, dim=1))
    assert hidden.shape[1] == encoder.hidden_dim


def test_unknown_or_unordered_layers_are_refused() -> None:
    for layers, named in (
        (("middle",), "'middle'.*input_blocks.0"),
        (("middle_block", "input_blocks.0"), "layers"),
    ):
        with pytest.raises(ValueError, match=named):
            Encoder(random_net(), EncoderConfig(layers=layers))
