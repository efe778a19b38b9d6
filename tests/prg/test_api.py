"""The Python API: the same model from run, checkpoint and entry, with the gradient of the solve."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workshop import CHECKPOINT

from entry.runner import Runner
from prg.api import load
from prg.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def test_run_checkpoint_and_entry_are_one_model(run: Path, entry: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), np.uint8)
    served = Runner(entry).run(pixels, np.full(2, 0.3, np.float32))
    checkpoint = run / "finetune" / CHECKPOINT
    for path in (run, checkpoint, entry):
        model = load(path)
        assert len(repr(model)) < 300
        x = model.normalise(torch.from_numpy(pixels))
        with torch.no_grad():
            found = model.encode(x, 0.3)
            states = model.trajectory(x, [1.0, 0.3])
        assert model.labels == ("blue", "green", "red")
        for ours, theirs in zip(found, served.values(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        torch.testing.assert_close(states[0], x)
        np.testing.assert_allclose(states[1].flatten(1), served["STATE"], atol=1e-4)


def test_a_pretrained_checkpoint_has_no_logits(run: Path) -> None:
    assert load(run / "pretrain" / CHECKPOINT).encode(torch.zeros(1, 3, 16, 16), 0.5).logits is None
    for wrong in (run / "data", run / "none"):
        with pytest.raises(CheckpointError, match=str(wrong)):
            load(wrong)


def test_what_is_no_image_of_the_network_is_refused(run: Path) -> None:
    model, x = load(run), torch.zeros(1, 3, 16, 16)
    for tensor in (x.byte(), torch.zeros(1, 3, 32, 32), x[0]):
        with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]"):
            model.encode(tensor, 0.5)
    for level in (-0.5, 8.0, float("nan"), torch.tensor([1.5])):
        with pytest.raises(ValueError, match="t_end"):
            model.encode(x, level)
    with pytest.raises(ValueError, match="t_end"):
        model.trajectory(x, [1.0, -1.0])
    with pytest.raises(ValueError, match="uint8"):
        model.normalise(x)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository").symlink_to(ROOT / "model_repository")
    Image.new("RGB", (40, 32), "red").save("cat.png")
    names: dict[str, torch.Tensor] = {}
    exec(block, names)
    assert names["states"].shape == (4, 1, 3, 32, 32)
    assert names["gradient"].abs().sum() > 0
    assert names["finer"].shape == (1, 3, 32, 32)
