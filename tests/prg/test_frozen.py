"""Few labels: a head on a frozen encoder, begun from a checkpoint or an entry."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import image_folder, overrides

from entry.config import read_entry
from prg.checkpoint import load_checkpoint, read_facts
from prg.cli import main
from prg.logistic import stratified_folds
from prg.trained import load_trained

NET = "encoder.solver.velocity.net."


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "photos", each=30)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run that is pretrained, with a frozen fine-tuning."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    command = ["--recipe", "images-32", "--data", str(photos), *overrides()]
    assert main(["pretrain", str(folder), *command]) == 0
    assert main(["finetune", str(folder), "--freeze"]) == 0
    return folder


def test_the_encoder_is_the_pretrained_one_and_the_head_is_linear(run: Path) -> None:
    model, facts = load_trained(run / "finetune" / "checkpoint.safetensors")
    before = load_checkpoint(run / "pretrain" / "checkpoint.safetensors").part("average")
    assert all(torch.equal(before[k], v) for k, v in model.encoder.net.state_dict().items())
    assert [type(m).__name__ for m in model.head.classifier] == ["LayerNorm", "Linear"]
    assert facts.cross_validated is not None
    assert facts.cross_validated.penalty in facts.recipe.finetune.penalties
    assert (facts.held_out, facts.trained.images) == (0, 90)  # type: ignore[union-attr]


def test_the_penalty_is_the_one_of_least_cross_validated_loss(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "finetune" / "metrics.jsonl").read_text().splitlines()]
    chosen = read_facts(run / "finetune" / "checkpoint.safetensors").cross_validated
    assert chosen is not None
    best = min(rows, key=lambda row: row["loss"])
    assert len(rows) == 5
    assert (chosen.penalty, chosen.top1) == (best["penalty"], best["top1"])


def test_again_changes_nothing_and_other_settings_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "finetune" / "checkpoint.safetensors"
    before = path.read_bytes()
    assert main(["finetune", str(run)]) == 0
    assert main(["finetune", str(run), "--set", "finetune.freeze=false"]) == 1
    assert "finetune.freeze was True, is False" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_renamed_image_changes_nothing(run: Path, photos: Path, tmp_path: Path) -> None:
    other = shutil.copytree(photos, tmp_path / "photos")
    first = min((other / "train" / "red").iterdir())
    first.rename(first.with_name("zzz.png"))
    path = run / "finetune" / "checkpoint.safetensors"
    before = path.read_bytes()
    assert main(["finetune", str(run), "--data", str(other)]) == 0
    assert path.read_bytes() == before
    assert main(["finetune", str(run), "--data", str(photos)]) == 0


def test_it_is_exported_and_evaluated_as_any_other(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = tmp_path / "mine"
    assert main(["export", str(run), str(entry)]) == 0
    assert main(["evaluate", str(entry), "--data", str(photos), "--write"]) == 0
    card = (entry / "MODEL_CARD.md").read_text()
    chosen = read_facts(run / "finetune" / "checkpoint.safetensors").cross_validated
    assert chosen is not None
    assert f"a linear head on the frozen encoder, penalty {chosen.penalty:g}" in card
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] > 0.9


@pytest.mark.parametrize("begin", ["finetune", "entry", "entry without head"])
def test_what_it_can_begin_from(run: Path, photos: Path, tmp_path: Path, begin: str) -> None:
    init = run / "finetune" / "checkpoint.safetensors"
    if begin != "finetune":
        init = tmp_path / "entry"
        stage = "pretrain" if "without" in begin else "finetune"
        assert main(["export", str(run), str(init), "--stage", stage]) == 0
    other = tmp_path / "other"
    command = ["--recipe", "images-32", "--data", str(photos), *overrides("encoder.steps=1"), "--freeze"]
    assert main(["finetune", str(other), *command, "--init", str(init)]) == 0
    a, b = (load_checkpoint(r / "finetune" / "checkpoint.safetensors") for r in (run, other))
    names = [k for k in a.tensors if k.startswith(f"average.{NET}")]
    assert names
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in names)
    published = tmp_path / "published"
    assert main(["export", str(other), str(published)]) == 0
    history = read_entry(published).prg.versions["1"].training["history"]
    assert any(line.startswith("entry: entry version 1 (") for line in history) == (begin != "finetune")
    assert [line.split(":")[0] for line in history][:1] == ["pretrain"]


def test_an_entry_that_does_not_fit_says_why(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = tmp_path / "entry"
    assert main(["export", str(run), str(entry)]) == 0
    command = ["finetune", str(tmp_path / "other"), "--data", str(photos), "--init", str(entry), "--freeze"]
    assert main([*command, "--recipe", "images-32", "--set", "data.enlarge=true"]) == 1
    assert "image.size is 16 there, 32 in the recipe" in capsys.readouterr().err
    assert main([*command, "--recipe", "images-32", *overrides("image.mean=[0.5, 0.5, 0.5]")]) == 1
    assert "image.mean" in capsys.readouterr().err
    assert main([*command, "--recipe", "images-32", *overrides("encoder.path=gvp")]) == 1
    assert "encoder.path is 'icfm' there, 'gvp' in the recipe" in capsys.readouterr().err
    wider = "network={image_size=16, channels=16, multipliers=[1, 2], groups=4}"
    assert main([*command, "--recipe", "images-32", *overrides(wider)]) == 1
    error = capsys.readouterr().err
    assert "its network is another than the recipe's: --set network=tiny16" in error
    assert not (tmp_path / "other" / "recipe.json").exists()


def test_what_the_head_reads_and_its_levels_are_the_recipes(run: Path, photos: Path, tmp_path: Path) -> None:
    init = run / "pretrain" / "checkpoint.safetensors"
    settings = overrides(
        "finetune.head_input=['state', 'middle_block.mean']",
        "finetune.t_end=[0.8, 0.5]",
        "finetune.penalties=[0.01]",
    )
    command = ["--recipe", "images-32", "--data", str(photos), "--freeze", *settings, "--init", str(init)]
    assert main(["finetune", str(tmp_path), *command]) == 0
    model, facts = load_trained(tmp_path / "finetune" / "checkpoint.safetensors")
    assert model.head.columns == [(0, 768), (768 + 80, 768 + 96)]
    assert facts.recipe.finetune.t_end == (0.8, 0.5)


def test_folds_are_stratified_and_hold_each_row_out_once() -> None:
    labels = np.repeat([0, 1, 2], [10, 7, 23])
    folds = list(stratified_folds(labels, 5, seed=3))
    assert (np.sum(folds, axis=0) == 1).all()
    for label, count in enumerate((10, 7, 23)):
        held = [int((labels[fold] == label).sum()) for fold in folds]
        assert max(held) - min(held) <= 1, (label, count, held)


def test_a_class_of_one_image_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder(tmp_path / "photos", each=4, splits=("train",))
    for i in range(3):
        (photos / "train" / "red" / f"{i}.png").unlink()
    init = ["--init", str(run / "pretrain" / "checkpoint.safetensors"), "--freeze"]
    command = ["--recipe", "images-32", "--data", str(photos), *overrides(), *init]
    assert main(["finetune", str(tmp_path / "run"), *command]) == 1
    assert "one image alone of red" in capsys.readouterr().err
