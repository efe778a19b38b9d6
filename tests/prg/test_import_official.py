"""The official release's checkpoints: imported, they give the numbers that the official code gives."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workshop import image_folder

from entry.config import read_entry
from prg.checkpoint import Checkpoint, load_checkpoint, load_strictly
from prg.classifier import Head, HeadConfig
from prg.cli import main
from prg.encoder import Encoder, EncoderConfig
from prg.errors import CheckpointError
from prg.importers import imported as module
from prg.importers.imported import write_run
from prg.importers.official import import_official
from prg.recipe import load_recipe
from prg.trained import load_trained
from prg.training.run import Run
from prg.unet import PRESETS, UNet

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
from fill import fill  # noqa: E402

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


def golden(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if v.ndim}


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def test_a_fine_tuned_file_gives_the_official_state_and_logits(tmp_path: Path) -> None:
    t_end, labels = 1 - 7 / 19, [str(i) for i in range(10)]
    file = official_file(tmp_path / "GenerativeClassify_7.pt", "unet32", 10)
    settings = {"network": "unet32", "encoder.path": "gvp", "encoder.steps": 7, "data.labels": labels}
    run = imports(file, tmp_path / "run", settings | OFFICIAL | {"finetune.t_end": [t_end]})
    model, facts = load_trained(run.finetuned)
    assert list(facts.classes) == labels
    vectors, levels = golden("gvp32_cut8"), torch.full((2,), t_end)
    model.eval()
    with torch.inference_mode():
        z, _ = model.encoder.reverse(vectors["x"], levels)
        state = torch.nn.functional.adaptive_avg_pool2d(z, 16).flatten(1)
        logits = model.head(state, state)  # it reads the first alone
    close(z, vectors["z"], 1e-3)
    close(logits, vectors["logits"], 1e-3)


@pytest.mark.parametrize(("name", "path"), [("icfm32_full", "icfm"), ("gvp32_cut8", "gvp")])
def test_a_pretrained_file_gives_the_official_velocity(tmp_path: Path, name: str, path: str) -> None:
    file = official_file(tmp_path / "DiffusionModel_Pretrain_7.pt", "unet32", None, "module._orig_mod.")
    run = imports(file, tmp_path / "run", {"network": "unet32", "encoder.path": path})
    net = UNet(run.recipe.unet).eval()
    load_strictly(net, load_checkpoint(run.pretrained).part("average"), run.pretrained)
    vectors = golden(name)
    with torch.inference_mode():
        field = Encoder(net, run.recipe.encoder).field
        t = vectors["t"]
        found = -field(vectors["x"], 1 - t) if path == "gvp" else field(vectors["x"], t)
    close(found, vectors["v"], 1e-4)


SMALL: Settings = {"network": "tiny16", "image.size": 16, "image.resize": 16, "data.validation": 0.5}
QUICK = {"finetune.epochs": 0.5, "finetune.batch": 8, "finetune.precision": '"fp32"'}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["icfm", "gvp"])
def test_it_goes_on_like_our_own(path: str, tmp_path: Path) -> None:
    """By the commands."""
    photos, run, tuned = image_folder(tmp_path / "photos", each=24), tmp_path / "run", tmp_path / "tuned"
    file = official_file(tmp_path / "classify.pt", "tiny16", 3, "", fill_it=False)
    settings = SMALL | QUICK | OFFICIAL | {"encoder.path": path, "data.source": f'"{photos}"'}
    recipe = ["--recipe", "images-32", *(part for k, v in settings.items() for part in ("--set", f"{k}={v}"))]
    assert main(["import", "official", str(file), str(run), *recipe]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "models" / "official")]) == 0
    prg = read_entry(tmp_path / "models" / "official").prg
    assert prg.labels == ("blue", "green", "red")
    origin = prg.versions["1"].training["imported"]
    assert (origin["file"], origin["version"]) == ("classify.pt", "epoch 7")
    assert main(["finetune", str(run)]) == 1
    init = ["--init", str(run / "pretrain" / "checkpoint.safetensors")]
    assert main(["finetune", str(tuned), *recipe, *init]) == 0
    assert main(["export", str(tuned), str(tmp_path / "models" / "tuned")]) == 0
    version = read_entry(tmp_path / "models" / "tuned").prg.versions["1"]
    assert "epoch 7, classify.pt" in version.training["history"][0]
    assert version.held_out is None
    assert main(["import", "official", str(file), str(run), *recipe]) == 1  # it holds a run already


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_no_code_of_a_file_is_run(protocol: str, tmp_path: Path) -> None:
    file, trace = tmp_path / "harmful.pt", tmp_path / "trace"
    if protocol == "torch":
        torch.save({"model": Harmful(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": Harmful(trace)}))
    refused(file, tmp_path / "run", SMALL)
    assert not trace.exists()


def test_a_file_of_no_tensors_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.pt", tmp_path / "run", SMALL)
    (tmp_path / "text.pt").write_text("no weights")
    refused(tmp_path / "text.pt", tmp_path / "run", SMALL)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "model.pt"))
    assert "weights_only" not in refused(tmp_path / "model.pt", tmp_path / "run", SMALL)


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        *(([1, 2], "list"), ({"state_dict": {}}, "state_dict"), ({"w": torch.ones(1)}, "w")),
        ({"model": {"conv.weight": torch.ones(1)}}, "conv.weight"),
        ({"model": {"grlHead.classifier.0.bias": torch.ones(1)}}, "grlHead.classifier.0.bias"),
        ({"model": {"model.backbone.unet.a": torch.ones(1), "other": torch.ones(1)}}, "other"),
    ],
)
def test_another_file_is_answered_with_what_is_accepted(tmp_path: Path, saved: object, named: str) -> None:
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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: {k: v * float("nan") for k, v in t.items()},
        lambda t: {k: v.int() for k, v in t.items()},
        lambda t: dict(enumerate(t.values())),
    ],
)
def test_tensors_that_are_no_weights_are_refused(
    spoil: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    file = official_file(tmp_path / "file.pt", "tiny16", None)
    torch.save({"model": spoil(torch.load(file)["model"])}, file)
    refused(file, tmp_path / "run", SMALL)


def test_a_full_disk_leaves_no_half_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SMALL | OFFICIAL | {"data.labels": ["a", "b", "c"]}
    file = official_file(tmp_path / "file.pt", "tiny16", 3)
    whole = module.save_checkpoint

    def fail(path: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.facts.stage == "finetune":
            raise OSError("no space left")
        whole(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", fail)
        with pytest.raises(OSError):
            imports(file, tmp_path / "run", settings)
    imports(file, tmp_path / "run", settings)
