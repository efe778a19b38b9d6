"""A whole experiment by one command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from workshop import image_folder, overrides

from entry.config import read_entry
from prg.cli import main
from prg.recipe import load_recipe
from prg.training.costs import training_flops


def command(folder: Path) -> list[str]:
    photos = folder / "photos"
    if not photos.exists():
        image_folder(photos)
    return ["reproduce", "images-32", str(folder / "run"), "--data", str(photos), *overrides()]


def test_all_stages_then_nothing_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(command(tmp_path)) == 0
    *stages, figures = capsys.readouterr().out.splitlines()
    assert stages == [f"{name}: done" for name in ("pretrain", "finetune", "export", "evaluate")]
    entry = read_entry(run / "entry")
    assert [a.model_dump() for a in entry.prg.versions["1"].accuracy] == [json.loads(figures)]
    assert json.loads(figures)["data"] == "photos/test"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert main(command(tmp_path)) == 0
    *stages, again = capsys.readouterr().out.splitlines()
    assert all(line.endswith("done already") for line in stages)
    assert again == figures
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    extra = tmp_path / "photos" / "test" / "red" / "0.png"
    extra.with_name("z.png").write_bytes(extra.read_bytes())
    assert main(command(tmp_path)) == 0
    *stages, grown = capsys.readouterr().out.splitlines()
    assert stages[2:] == ["export: done already", "evaluate: done"]
    assert json.loads(grown)["images"] == json.loads(figures)["images"] + 1
    red, blue = (tmp_path / "photos" / "test" / name / "1.png" for name in ("red", "blue"))
    red.write_bytes(blue.read_bytes())  # as many, but not the same
    assert main(command(tmp_path)) == 0
    *stages, altered = capsys.readouterr().out.splitlines()
    assert stages[2:] == ["export: done already", "evaluate: done"]
    assert json.loads(altered)["top1"] < json.loads(grown)["top1"] == 1
    (run / "finetune" / "curves.png").unlink()  # as a kill after the last step would leave it
    assert main(command(tmp_path)) == 0
    stages = capsys.readouterr().out.splitlines()
    assert stages[:3] == ["pretrain: done already", "finetune: done already", "export: done already"]
    assert (run / "finetune" / "curves.png").exists()
    assert main([*command(tmp_path), "--set", "seed=3"]) == 1
    assert "seed was 0, is 3" in capsys.readouterr().err


def test_a_frozen_head_needs_a_split_to_be_evaluated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "photos", splits=("train",))
    frozen = ["--set", "finetune.freeze=true", "--set", "finetune.head=linear"]
    assert main([*command(tmp_path), *frozen]) == 1
    assert "no split to evaluate on" in capsys.readouterr().err
    assert not (tmp_path / "run" / "pretrain").exists()


def test_the_dry_run_tells_all_stages_and_begins_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    rows = {w[0]: w[1:] for line in printed.splitlines() if (w := line.split())}
    assert rows["pretrain"][:2] == ["10", "0"]  # 42 images in batches of 8, twice
    assert rows["finetune"][:2] == ["30", "0"]
    assert rows["evaluate"][0] == "1"
    assert all(float(x) > 0 for name in ("pretrain", "finetune", "evaluate") for x in rows[name][2:])
    assert "an estimate: the stage's FLOPs by 50 TFLOP/s" in printed
    assert not (tmp_path / "run").exists()


def test_flops_of_many_steps_are_counted_from_two() -> None:
    recipe = load_recipe("images-32", [item for item in overrides() if item != "--set"])
    counted = [
        training_flops(recipe.model_copy(update={"encoder": replace(recipe.encoder, steps=n)}), "finetune")
        for n in (1, 2, 3)
    ]
    assert counted[2] - counted[1] == counted[1] - counted[0] > 0
