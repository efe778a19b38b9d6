"""model.pt2: what serves where PyTorch can't load model.pt."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from entry.config import EntryError, ImageSpec, read_entry, write_entry
from entry.files import sha256
from entry.runner import WEIGHTS, Runner
from prg.encoder import Encoder, EncoderConfig
from prg.export import Export, export
from prg.extractor import Extractor
from prg.unet import PRESETS, UNet

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
LEVELS = np.float32([0.2, 0.8, 1.0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entry = tmp_path_factory.mktemp("made") / "entry"
    image = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)
    extractor = Extractor(Encoder(UNet(PRESETS["tiny16"]), EncoderConfig()), image)
    export(extractor, Export(image, 0.8, "hidden", {}, None, pt2=True), entry)
    return entry


@pytest.fixture
def entry(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(made, tmp_path / "entry"))


def of_a_newer_torch(directory: Path, exported_with_it: bool) -> None:
    """Give its model.pt an operator that this PyTorch does not have."""
    path = directory / "1" / "model.pt"
    with zipfile.ZipFile(path) as source:
        files = {item: source.read(item) for item in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for item, content in files.items():
            target.writestr(item, content.replace(b"torch.group_norm(", b"torch.group_norm_2(", 1))
    described = read_entry(directory)
    version = described.prg.versions["1"].model_copy(update={"sha256": sha256(path)})
    described.prg.versions["1"] = version
    write_entry(directory, described)
    if exported_with_it:
        # Written as if by that torch.
        exported = path.with_suffix(".pt2")
        torch.export.save(torch.export.load(exported), exported, extra_files={WEIGHTS: version.sha256})


def test_it_answers_as_model_pt_does(entry: Path) -> None:
    expected = Runner(entry).run(IMAGES, LEVELS)
    of_a_newer_torch(entry, exported_with_it=True)
    runner = Runner(entry)
    assert not isinstance(runner.module, torch.jit.ScriptModule)
    for name, found in runner.run(IMAGES, LEVELS).items():
        assert np.allclose(found, expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(EntryError, match="bf16"):
        Runner(entry, precision="bf16")


def test_one_of_another_model_is_refused(entry: Path) -> None:
    of_a_newer_torch(entry, exported_with_it=False)
    with pytest.raises(EntryError, match="another model.pt"):
        Runner(entry)


def test_a_damaged_one_is_refused(entry: Path) -> None:
    of_a_newer_torch(entry, exported_with_it=True)
    path = entry / "1" / "model.pt2"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(EntryError, match="model.pt2"):
        Runner(entry)
