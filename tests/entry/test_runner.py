"""An entry run in this process."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from entry.config import EntryError, read_entry, write_entry
from entry.files import sha256
from entry.runner import Runner
from tests.tiny import tiny_module, write_tiny_entry

IMAGES = np.random.default_rng(1).integers(0, 256, (5, 3, 32, 32), np.uint8)
LEVELS = np.array([0, 0.25, 0.5, 0.75, 1], np.float32)


def test_rows_are_those_of_their_image_and_level(tmp_path: Path) -> None:
    outputs = Runner(write_tiny_entry(tmp_path)).run(IMAGES, LEVELS)
    expected = np.concatenate([IMAGES.mean((2, 3)) / 255, LEVELS[:, None]], 1)
    assert np.allclose(outputs["EMBEDDING"], expected, atol=1e-6)
    assert outputs["STATE"].shape == (5, 768)
    assert np.allclose(outputs["LOGITS"], outputs["EMBEDDING"] * 10)
    headless = Runner(write_tiny_entry(tmp_path, head=False)).run(IMAGES, LEVELS)
    assert headless.keys() == {"STATE", "HIDDEN", "EMBEDDING"}


def test_the_highest_version_is_the_default(tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path, versions=("1", "2", "10"))
    assert Runner(directory).version == "10"
    assert np.allclose(Runner(directory, "2").run(IMAGES, LEVELS)["HIDDEN"][0, 3], 0.01)
    with pytest.raises(EntryError, match="'3'.*1, 2, 10"):
        Runner(directory, "3")


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    runner = Runner(write_tiny_entry(tmp_path))
    for images in (IMAGES.astype(np.float32), IMAGES[:, :, :16], IMAGES[0]):
        with pytest.raises(ValueError, match="^images "):
            runner.run(images, LEVELS)
    for levels in (LEVELS[:3], LEVELS.astype(np.float64)):
        with pytest.raises(ValueError, match="^t_end "):
            runner.run(IMAGES, levels)


def of_a_newer_torch() -> bytes:
    """A module with an operator that this PyTorch does not have."""
    changed = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(tiny_module(False, 0)))
    with source, zipfile.ZipFile(changed, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith(".py"):
                content = content.replace(b"torch.mean(", b"torch.mean_of_tomorrow(")
            target.writestr(item, content)
    return changed.getvalue()


@pytest.mark.parametrize("content", [b"not TorchScript", of_a_newer_torch(), tiny_module(False, 0)])
def test_a_module_that_is_not_what_the_entry_says_is_refused(tmp_path: Path, content: bytes) -> None:
    directory = write_tiny_entry(tmp_path)
    path = directory / "1" / "model.pt"
    path.write_bytes(content)
    with pytest.raises(EntryError, match="sha256"):
        Runner(directory)
    entry = read_entry(directory)
    version = entry.prg.versions["1"].model_copy(update={"sha256": sha256(path)})
    entry.prg.versions["1"] = version
    write_entry(directory, entry)
    with pytest.raises(EntryError, match="model.pt") as error:
        Runner(directory)
    # What to do about it is the PyTorch that wrote it.
    assert (torch.__version__ in str(error.value)) == (content != tiny_module(False, 0))
