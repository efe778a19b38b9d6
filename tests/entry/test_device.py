"""Where a runner computes, and in what precision."""

from pathlib import Path

import numpy as np
import pytest
import torch

from entry.errors import DeviceError, EntryError
from entry.runner import Runner, find_device
from tests.tiny import write_tiny_entry

SHIPPED = sorted(path.parent for path in Path("model_repository").glob("*/config.pbtxt"))
LEVELS = np.linspace(0.5, 1, 8, dtype=np.float32)


def images_for(runner: Runner) -> np.ndarray:
    size = runner.entry.prg.image.size
    return np.random.default_rng(0).integers(0, 256, (len(LEVELS), 3, size, size), np.uint8)


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest number of its output."""
    return max(float(np.abs(found[k] - expected[k]).max() / np.abs(expected[k]).max()) for k in expected)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match="cpu"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert find_device("auto") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="cuda:0, cuda:1"):
        find_device("cuda:2")


def test_a_batch_that_does_not_fit_is_computed_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner(write_tiny_entry(tmp_path))
    images = images_for(runner)
    expected = runner.run(images, LEVELS)
    real, room = runner._call, 3

    def small(images: np.ndarray, t_end: np.ndarray) -> tuple[torch.Tensor, ...]:
        if len(images) > room:
            raise torch.cuda.OutOfMemoryError
        return real(images, t_end)

    monkeypatch.setattr(runner, "_call", small)
    found = runner.run(images, LEVELS)
    assert found.keys() == expected.keys()
    assert worst(found, expected) == 0
    assert runner.most_rows == 2
    assert len(caplog.records) == 2
    runner.run(images, LEVELS)
    assert len(caplog.records) == 2  # it remembers
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        runner.run(images, LEVELS)


def test_bf16_is_near_and_is_marked() -> None:
    own, other = Runner(SHIPPED[-1]), Runner(SHIPPED[-1], precision="bf16")
    images = images_for(own)
    a, b = own.run(images, LEVELS), other.run(images, LEVELS)
    assert 0 < worst(b, a) < 0.05
    unit = [x["EMBEDDING"] / np.linalg.norm(x["EMBEDDING"], axis=1, keepdims=True) for x in (a, b)]
    assert (unit[0] * unit[1]).sum(1).min() > 0.9995
    before, after = own.entry.fingerprints("1"), other.entry.fingerprints("1")
    assert (after.encoder, after.model) == (f"{before.encoder}-bf16", f"{before.model}-bf16")


def test_a_module_without_such_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EntryError, match=r"model\.pt"):
        Runner(write_tiny_entry(tmp_path), precision="bf16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_a_gpu_answers_as_the_processor_does(directory: Path) -> None:
    here, gpu = Runner(directory), Runner(directory, device="cuda")
    images = images_for(here)
    assert worst(gpu.run(images, LEVELS), here.run(images, LEVELS)) < here.entry.prg.tolerance.relative
