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
from prg.trained import load_trained
from prg.training.run import open_run
from prg.unet import PRESETS, UNet

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
from fill import fill  # noqa: E402

OF_PRETRAINING = "{}model.backbone.unet."
OF_FINETUNING = "grlEncoder.diffusionModel.model.{}model.backbone.unet."
OFFICIAL = {"finetune.head_input": '"state"', "finetune.head": '"mlp"'}


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


def imports(file: Path, run: Path, **settings: object) -> int:
    flags = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    return main(["import", "official", str(file), str(run), "--recipe", "images-32", *flags])


def golden(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if v.ndim}


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def test_a_fine_tuned_file_gives_the_official_state_and_logits(tmp_path: Path) -> None:
    name, path, steps, t_end = "gvp32_cut8", "gvp", 7, 1 - 7 / 19
    file, labels = (
        official_file(tmp_path / "GenerativeClassify_7.pt", "unet32", 10),
        [str(i) for i in range(10)],
    )
    settings = {"network": "unet32", "encoder.path": path, "encoder.steps": steps, "data.labels": labels}
    assert imports(file, tmp_path / "run", **settings, **OFFICIAL, **{"finetune.t_end": [t_end]}) == 0
    model, facts = load_trained(tmp_path / "run" / "finetune" / "checkpoint.safetensors")
    assert list(facts.classes) == labels
    vectors, levels = golden(name), torch.full((2,), t_end)
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
    assert imports(file, tmp_path / "run", network="unet32", **{"encoder.path": path}) == 0
    recipe = open_run(tmp_path / "run", None).recipe
    net, saved = UNet(recipe.unet).eval(), open_run(tmp_path / "run", None).pretrained
    load_strictly(net, load_checkpoint(saved).part("average"), saved)
    vectors = golden(name)
    with torch.inference_mode():
        field = Encoder(net, recipe.encoder).field
        t = vectors["t"]
        found = -field(vectors["x"], 1 - t) if path == "gvp" else field(vectors["x"], t)
    close(found, vectors["v"], 1e-4)


SMALL = {"network": "tiny16", "image.size": 16, "image.resize": 16, "data.validation": 0.5}
QUICK = {"finetune.epochs": 0.5, "finetune.batch": 8, "finetune.precision": '"fp32"'}


@pytest.mark.parametrize("path", ["icfm", "gvp"])
def test_it_goes_on_like_our_own(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, run, tuned = image_folder(tmp_path / "photos", each=24), tmp_path / "run", tmp_path / "tuned"
    file = official_file(tmp_path / "classify.pt", "tiny16", 3, "", fill_it=False)
    settings = SMALL | QUICK | OFFICIAL | {"encoder.path": path}
    sourced = settings | {"data.source": f'"{photos}"'}
    assert imports(file, run, **sourced) == 0
    assert "network and head" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "models" / "official")]) == 0
    prg = read_entry(tmp_path / "models" / "official").prg
    assert prg.labels == ("blue", "green", "red")
    origin = prg.versions["1"].training["imported"]
    assert [origin[k] for k in ("origin", "file", "version")] == [
        "official PRG release",
        "classify.pt",
        "epoch 7",
    ]
    capsys.readouterr()
    assert main(["finetune", str(run)]) == 1
    assert "was imported" in capsys.readouterr().err
    flags = [part for k, v in sourced.items() for part in ("--set", f"{k}={v}")]
    init = ["--init", str(run / "pretrain" / "checkpoint.safetensors")]
    assert main(["finetune", str(tuned), "--recipe", "images-32", *flags, *init]) == 0
    assert main(["export", str(tuned), str(tmp_path / "models" / "tuned")]) == 0
    version = read_entry(tmp_path / "models" / "tuned").prg.versions["1"]
    assert version.training["history"][0].startswith("import: official PRG release epoch 7, classify.pt")
    assert version.held_out is None
    assert imports(file, run, **sourced) == 1
    assert "holds a run already" in capsys.readouterr().err


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_no_code_of_a_file_is_run(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = tmp_path / "harmful.pt", tmp_path / "trace"
    if protocol == "torch":
        torch.save({"model": Harmful(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": Harmful(trace)}))
    assert imports(file, tmp_path / "run", **SMALL) == 1
    assert "harmful.pt: not" in capsys.readouterr().err
    assert not trace.exists()
    assert not (tmp_path / "run").exists()


def test_a_torchscript_module_is_named_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "model.pt"))
    assert imports(tmp_path / "model.pt", tmp_path / "run", **SMALL) == 1
    assert "model.pt: a TorchScript module, not a file of tensors" in (error := capsys.readouterr().err)
    assert "weights_only" not in error


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ([1, 2], "holds an object of type list"),
        ({"state_dict": {}}, "holds a table of state_dict"),
        ({"w": torch.ones(1)}, "holds a table of w;"),
        ({"model": {"conv.weight": torch.ones(1)}}, "holds a table of conv.weight;"),
        ({"model": {"grlHead.classifier.0.bias": torch.ones(1)}}, "grlHead.classifier.0.bias;"),
        ({"model": {"model.backbone.unet.a": torch.ones(1), "other": torch.ones(1)}}, "other;"),
    ],
)
def test_another_file_is_answered_with_what_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: object, said: str
) -> None:
    torch.save(saved, tmp_path / "other.pt")
    assert imports(tmp_path / "other.pt", tmp_path / "run", **SMALL) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "accepted is a checkpoint of the release's pretraining" in error


def test_what_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = official_file(tmp_path / "classify.pt", "tiny16", 3, fill_it=False), tmp_path / "run"

    def said(**settings: object) -> str:
        assert imports(file, run, **settings) == 1
        assert not run.exists()
        return capsys.readouterr().err

    assert "say --set finetune.head_input=state" in said(**SMALL)
    assert "3 classes, the recipe names 0" in said(**SMALL, **OFFICIAL)
    assert "3 classes, the recipe names 2" in said(**SMALL, **OFFICIAL, **{"data.labels": ["a", "b"]})
    three = {"data.labels": ["a", "b", "c"]}
    assert "made for another network" in said(**OFFICIAL, **three)
    assert "the release has icfm, otcfm and gvp alone" in said(**SMALL, **{"encoder.path": "vp"})
    (tmp_path / "text.pt").write_text("no weights")
    file = tmp_path / "text.pt"
    assert "text.pt: not" in said(**SMALL)
    file = tmp_path / "missing.pt"
    assert "missing.pt: no such file" in said(**SMALL)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "something else than finite numbers"),
        (lambda t: {k: v.int() for k, v in t.items()}, "something else than finite numbers"),
        (lambda t: dict(enumerate(t.values())), "accepted is a checkpoint of the release"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(
    spoil: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = official_file(tmp_path / "file.pt", "tiny16", None)
    torch.save({"model": spoil(torch.load(file)["model"])}, file)
    assert imports(file, tmp_path / "run", **SMALL) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_no_half_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, **OFFICIAL, "data.labels": ["a", "b", "c"]}
    file = official_file(tmp_path / "file.pt", "tiny16", 3)
    whole = module.save_checkpoint

    def fail(path: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.facts.stage == "finetune":
            raise CheckpointError(f"{path}: could not be written (no space left)")
        whole(path, checkpoint)

    monkeypatch.setattr(module, "save_checkpoint", fail)
    assert imports(file, tmp_path / "run", **settings) == 1
    monkeypatch.undo()
    assert "no space left" in capsys.readouterr().err
    assert imports(file, tmp_path / "run", **settings) == 0
