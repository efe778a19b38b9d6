"""An entry made of an entry: of this format, and of the one before."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from torch import Tensor, nn
from tritonclient.grpc.model_config_pb2 import ModelConfig
from workshop import CHECKPOINT, answer, evaluated, exported, image_folder, refusal

from entry.config import EntryError, OldFormatError, read_entry
from entry.files import sha256
from entry.runner import Runner
from prg.errors import DataError
from prg.evaluation import evaluate, record
from prg.extractor import Extractor
from prg.recipe import Data
from prg.reexport import reexport
from prg.trained import load_trained


def outputs(entry: Path, *names: str) -> list[np.ndarray]:
    """Of the entry's module for the same random images."""
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)
    found = Runner(entry).run(images, np.full(4, 0.8, np.float32))
    return [found[name] for name in names]


def refitted(old: Path, new: Path, photos: Path) -> Path:
    reexport(old, new, Data(source=str(photos)), None, compact=False)
    return new


def test_an_entry_of_an_entry_has_its_logits_and_another_embedding(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    old = exported(run, tmp_path / "old")
    record(old, evaluate(old, evaluated(run)[1], "photos"))
    new = tmp_path / "new"
    answer("export", old, new, "--data", image_folder(tmp_path / "others", each=60, seed=9))
    before, after = (outputs(entry, "LOGITS", "HIDDEN", "EMBEDDING") for entry in (old, new))
    for a, b in zip(before[:2], after[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not np.allclose(before[2][:, :5], after[2][:, :5], rtol=0.01)
    first, second = (read_entry(entry).prg.versions["1"] for entry in (old, new))
    assert first.encoder != second.encoder
    assert "by_class" in first.training
    assert "by_class" not in second.training  # nor has it an accuracy
    assert (second.held_out, second.training["history"]) == (first.held_out, first.training["history"])
    assert second.calibration is not None
    assert second.training["fitted_on"]["images"] < 180


def test_images_it_needs_what_they_must_be_and_its_precision(run: Path, photos: Path, tmp_path: Path) -> None:
    old, new = exported(run, tmp_path / "old", precision="fp16"), tmp_path / "new"
    assert "--data" in refusal("export", old, new)
    few = image_folder(tmp_path / "few", each=3, splits=("train",))
    shutil.copytree(photos / "train", tmp_path / "two" / "train", ignore=shutil.ignore_patterns("blue"))
    for data, named in ((few, r"\b10\b"), (photos / "train" / "red", "red: "), (tmp_path / "two", "blue")):
        with pytest.raises(DataError, match=named):
            refitted(old, new, data)
    assert not new.exists()
    assert read_entry(refitted(old, new, photos)).prg.precision == "fp16"


class OldExtractor(nn.Module):
    """As format 1 had it: the head reads both, and HIDDEN is the means of the middle block."""

    def __init__(self, extractor: Extractor, width: int) -> None:
        super().__init__()
        self.classifier = nn.Module()
        self.classifier.encoder, self.classifier.head = extractor.encoder, extractor.head
        self.classifier.input = "both"
        self.normalise, self.width = extractor.normalise, width

    def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, hidden = self.classifier.encoder(self.normalise(IMAGE), T_END.flatten())
        means = hidden[:, -2 * self.width : -self.width]
        return state, means, self.classifier.head(state, hidden)


def old_entry(run: Path, directory: Path) -> Path:
    """The run's model as an entry of format 1."""
    exported(run, directory)
    extractor, _ = load_trained(run / "finetune" / CHECKPOINT)
    width = extractor.encoder.widths["middle_block.mean"]
    path = directory / "1" / "model.pt"
    torch.jit.script(OldExtractor(extractor, width).eval()).save(str(path))
    config = text_format.Parse((directory / "config.pbtxt").read_text(), ModelConfig())
    table = json.loads(config.parameters["prg"].string_value)
    table["format"], table["feature"], table["image"]["preprocessing"] = 1, "hidden", "v1"
    table["features"] = {"state": {"dim": 768}, "hidden": {"dim": width, "layers": ["middle_block"]}}
    version = table["versions"]["1"]
    training = version["training"] | {"held_out": version["held_out"]}
    for key in ("network", "head_input", "fitted_on"):
        del training[key]
    table["versions"]["1"] = {"sha256": sha256(path), "training": training, "accuracy": []}
    config.parameters["prg"].string_value = json.dumps(table)
    (directory / "config.pbtxt").write_text(text_format.MessageToString(config))
    return directory


def test_an_entry_of_format_1_is_refused_and_made_anew(run: Path, photos: Path, tmp_path: Path) -> None:
    old = old_entry(run, tmp_path / "old")
    with pytest.raises(OldFormatError, match="prg export .*--data"):
        read_entry(old)
    module = torch.jit.load(str(old / "1" / "model.pt"))
    new, direct = refitted(old, tmp_path / "new", photos), exported(run, tmp_path / "direct")
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)
    with torch.inference_mode():
        logits = module(torch.from_numpy(images), torch.full((4, 1), 0.8))[2].numpy()
    np.testing.assert_allclose(outputs(new, "LOGITS")[0], logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*(outputs(e, "HIDDEN")[0] for e in (new, direct)), rtol=1e-5, atol=1e-6)
    assert read_entry(new).prg.features == read_entry(direct).prg.features


def test_gone_versions_are_dropped_and_old_ones_pruned(run: Path, tmp_path: Path) -> None:
    entry = tmp_path / "mine"
    for _ in range(3):
        exported(run, entry)
    shutil.rmtree(entry / "2")
    with pytest.raises(EntryError, match="2/model.pt"):
        Runner(entry, "2")
    assert sorted(read_entry(exported(run, entry)).prg.versions) == ["1", "3", "4"]
    (entry / "4" / "model.pt").rename(tmp_path / "model.pt")
    answer("export", run, entry, "--prune", "2")
    there = sorted(p.parent.name for p in entry.glob("*/*.pt"))
    assert sorted(read_entry(entry).prg.versions) == ["3", "5"] == there
