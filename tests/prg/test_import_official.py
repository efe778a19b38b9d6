"""The official release's checkpoints: imported, they give the numbers that the official code gives."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workshop import answer, exported, image_folder, largest_file, refusal

from entry.config import read_entry
from prg.checkpoint import load_checkpoint
from prg.classifier import Head, HeadConfig
from prg.encoder import Encoder, EncoderConfig
from prg.errors import CheckpointError
from prg.importers.imported import write_run
from prg.importers.official import import_official
from prg.recipe import load_recipe
from prg.trained import load_trained
from prg.training.finetune import finetune
from prg.training.run import Run, open_run
from prg.unet import PRESETS, UNet
from tests.golden.fill import fill

GOLDEN = Path(__file__).parent.parent / "golden"

OF_PRETRAINING = "{}model.backbone.unet."
OF_FINETUNING = "grlEncoder.diffusionModel.model.{}model.backbone.unet."
Settings = dict[str, Any]
OFFICIAL: Settings = {"finetune.head_input": '"state"', "finetune.head": '"mlp"'}


def official_file(
    path: Path, preset: str, classes: int | None, wrap: str = "module.", fill_it: bool = True
) -> Path:
    """What the release saves, with the weights that the golden vectors were made with."""
    torch.manual_seed(0)
    net = UNet(PRESETS[preset]).state_dict()
    head = Head(Encoder(UNet(PRESETS["tiny16"]), EncoderConfig()), HeadConfig(classes or 1)).state_dict()
    if fill_it:
        fill({f"unet.{k}": v for k, v in net.items()})
        fill({f"head.{k}": v for k, v in head.items()})
    prefix = (OF_PRETRAINING if classes is None else OF_FINETUNING).format(wrap)
    tensors = {prefix + k: v for k, v in net.items()}
    if classes is not None:
        tensors |= {f"grlHead.{wrap}{k}": v for k, v in head.items()}
    torch.save(
        {"model": tensors, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "iteration": 7}, path
    )
    return path


def imports(file: Path, run: Path, settings: Settings) -> Run:
    recipe = load_recipe("images-32", [f"{name}={value}" for name, value in settings.items()])
    return write_run(run, import_official(file, recipe))


def refused(file: Path, run: Path, settings: Settings) -> str:
    """Why; nothing is left of the run."""
    with pytest.raises(CheckpointError) as error:
        imports(file, run, settings)
    assert not run.exists()
    assert file.name in str(error.value)
    return str(error.value)


def test_a_fine_tuned_file_gives_the_official_state_and_logits(tmp_path: Path) -> None:
    t_end, labels = 1 - 7 / 19, [str(i) for i in range(10)]
    file = official_file(tmp_path / "GenerativeClassify_7.pt", "unet32", 10)
    settings = {"network": "unet32", "encoder.path": "gvp", "encoder.steps": 7, "data.labels": labels}
    run = imports(file, tmp_path / "run", settings | OFFICIAL | {"finetune.t_end": [t_end]})
    model, facts = load_trained(run.finetuned)
    assert list(facts.classes) == labels
    golden = np.load(GOLDEN / "gvp32_cut8.npz")
    x, levels = torch.from_numpy(golden["x"]), torch.full((2,), t_end)
    with torch.inference_mode():
        z, _ = model.eval().encoder.reverse(x, levels)
        state = torch.nn.functional.adaptive_avg_pool2d(z, 16).flatten(1)
        logits = model.head(state, state)  # it reads the first alone
    for name, found in (("z", z), ("logits", logits)):
        assert np.abs(found.numpy() - golden[name]).max() < 1e-3


def test_a_pretrained_file_gives_its_weights(tmp_path: Path) -> None:
    file = official_file(tmp_path / "DiffusionModel_Pretrain_7.pt", "tiny16", None, "module._orig_mod.")
    run = imports(file, tmp_path / "run", SMALL)
    net = UNet(PRESETS["tiny16"]).state_dict()
    fill({f"unet.{k}": v for k, v in net.items()})
    found = load_checkpoint(run.pretrained).part("average")
    assert found.keys() == net.keys()
    assert all(torch.equal(found[k], v) for k, v in net.items())


SMALL: Settings = {"network": "tiny16", "image.size": 16, "image.resize": 16, "data.validation": 0.5}
QUICK = {"finetune.epochs": 0.5, "finetune.batch": 8, "finetune.precision": '"fp32"'}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["icfm", "gvp"])
def test_it_goes_on_like_our_own(path: str, tmp_path: Path) -> None:
    photos, models = image_folder(tmp_path / "photos", each=24), tmp_path / "models"
    file = official_file(tmp_path / "classify.pt", "tiny16", 3, "", fill_it=False)
    settings = SMALL | QUICK | OFFICIAL | {"encoder.path": path, "data.source": f'"{photos}"'}
    recipe = ["--recipe", "images-32", *(part for k, v in settings.items() for part in ("--set", f"{k}={v}"))]
    answer("import", "official", file, tmp_path / "run", *recipe)
    answer("evaluate", tmp_path / "run")
    prg = read_entry(exported(tmp_path / "run", models / "official")).prg
    assert prg.labels == ("blue", "green", "red")
    origin = prg.versions["1"].training["imported"]
    assert (origin["file"], origin["version"]) == ("classify.pt", "epoch 7")
    with pytest.raises(CheckpointError):
        finetune(open_run(tmp_path / "run"))
    tuned = open_run(tmp_path / "tuned", "images-32", recipe[3::2])
    finetune(tuned, open_run(tmp_path / "run").pretrained)
    version = read_entry(exported(tuned.folder, models / "tuned")).prg.versions["1"]
    assert "epoch 7, classify.pt" in version.training["history"][0]
    assert version.held_out is None
    refusal("import", "official", file, tmp_path / "run", *recipe)  # it holds a run already


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_no_code_of_a_file_is_run_and_a_file_of_no_tensors_is_refused(tmp_path: Path) -> None:
    file, trace = tmp_path / "file.pt", tmp_path / "trace"
    for write in (
        lambda: None,
        lambda: torch.save({"model": Harmful(trace)}, file),
        lambda: file.write_bytes(pickle.dumps({"model": Harmful(trace)})),
        lambda: file.write_text("no weights"),
        lambda: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(file)),
    ):
        write()
        said = refused(file, tmp_path / "run", SMALL)
    assert "weights_only" not in said  # of a TorchScript module torch's own words would mislead
    assert not trace.exists()


def test_another_file_is_answered_with_what_is_accepted(tmp_path: Path) -> None:
    one = torch.ones(1)
    for saved, named in (
        ([1, 2], "list"),
        ({"state_dict": {}}, "state_dict"),
        ({"w": one}, "w"),
        ({"model": {"conv.weight": one}}, "conv.weight"),
        ({"model": {"grlHead.classifier.0.bias": one}}, "grlHead.classifier.0.bias"),
        ({"model": {"model.backbone.unet.a": one, "other": one}}, "other"),
    ):
        torch.save(saved, tmp_path / "file.pt")
        said = refused(tmp_path / "file.pt", tmp_path / "run", SMALL)
        assert named in said
        assert "model.backbone.unet." in said


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    file, run = official_file(tmp_path / "classify.pt", "tiny16", 3, fill_it=False), tmp_path / "run"
    three = OFFICIAL | {"data.labels": ["a", "b", "c"]}
    for settings, named in (
        (SMALL, "finetune.head_input"),
        (SMALL | OFFICIAL, "data.labels"),
        (SMALL | OFFICIAL | {"data.labels": ["a", "b"]}, "data.labels"),
        (three, "input_blocks"),
        (SMALL | three | {"encoder.path": "vp"}, "encoder.path"),
    ):
        assert named in refused(file, run, settings)


def test_tensors_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    file = official_file(tmp_path / "file.pt", "tiny16", None)
    whole = torch.load(file)["model"]
    for spoiled in (
        {k: v * float("nan") for k, v in whole.items()},
        {k: v.int() for k, v in whole.items()},
        dict(enumerate(whole.values())),
    ):
        torch.save({"model": spoiled}, file)
        refused(file, tmp_path / "run", SMALL)


def test_a_full_disk_leaves_no_half_of_a_run(tmp_path: Path) -> None:
    settings = SMALL | OFFICIAL | {"data.labels": ["a", "b", "c"]}
    file, run = official_file(tmp_path / "file.pt", "tiny16", 3), tmp_path / "run"
    # Of its two checkpoints the second does not fit.
    size = imports(file, run, settings).pretrained.stat().st_size
    shutil.rmtree(run)
    with largest_file(size + 1000), pytest.raises((CheckpointError, OSError)):
        imports(file, run, settings)
    imports(file, run, settings)
