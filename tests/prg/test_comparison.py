"""The comparison's table, made whole on a small image folder, and not made twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import image_folder, overrides

from benchmarks import comparison
from benchmarks.arms import ARMS, flops
from benchmarks.comparison import labelled_share
from prg.cli import main
from prg.images.sets import Images
from prg.recipe import load_recipe


def test_the_table_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder(tmp_path / "photos")
    run, entry, out = tmp_path / "run", tmp_path / "entries" / "tiny", tmp_path / "out"
    settings = overrides("finetune.lr=0.003")
    assert main(["pretrain", str(run), "--recipe", "images-32", "--data", str(photos), *settings]) == 0
    assert main(["export", str(run), str(entry), "--stage", "pretrain"]) == 0
    command = [str(tmp_path / "table"), "--data", str(photos), "--recipe", "images-32", *settings]
    command += ["--entry", str(entry), "--images", "64", "--out", str(out)]
    command += ["--tuning", "32", "--shares", "0.1", "1", "--seeds", "2"]
    assert comparison.main(command) == 0
    kept = (tmp_path / "table" / "results.json").read_bytes()
    runs = json.loads(kept)["runs"]
    assert len(runs) == len(ARMS) * 2 * 2 + 2 * (2 + 1)
    assert [p.name for p in (tmp_path / "table").iterdir() if p.is_dir()] == ["data"]
    table = json.loads((out / "comparison.json").read_text())
    assert len(table["results"]) == len(ARMS) + 2
    again = "FOLDER --data photos/ --recipe images-32 --entry tiny --images 64 --tuning 32 --shares 0.1 1 --seeds 2"
    assert again in table["conditions"]["command"]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # colours are what tells these classes apart: with all labels a probe on the reversed image must see them
    assert runs["state/1/0"]["top1"] > 0.9
    capsys.readouterr()
    assert comparison.main(command) == 0
    assert "fine-tuning" not in capsys.readouterr().err
    assert (tmp_path / "table" / "results.json").read_bytes() == kept
    with pytest.raises(SystemExit, match="of other settings"):
        comparison.main([*command, "--images", "32"])


def test_arms_share_their_compute(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10-small")
    entry = Path("model_repository/prg-cifar10-pretrained")
    torch.manual_seed(0)
    cost = {name: flops(arm.build(recipe, 10, entry), recipe) for name, arm in ARMS.items()}
    assert cost["scratch"] == cost["finetuned"]
    assert cost["resnet"] == pytest.approx(cost["scratch"], rel=0.1)
    assert cost["at-one"] < cost["scratch"]


def test_a_share_has_every_class_and_no_image_twice() -> None:
    images = Images(
        np.arange(1000), np.repeat(np.arange(10), 100), tuple("abcdefghij"), np.arange(1000, dtype=np.uint64)
    )
    few = [labelled_share(images, 0.05, seed) for seed in (0, 0, 1)]
    for some in few:
        assert some.labels is not None
        assert np.bincount(some.labels).tolist() == [5] * 10
        assert len(set(some.pixels.tolist())) == 50
    assert np.array_equal(few[0].pixels, few[1].pixels)
    assert not np.array_equal(few[0].pixels, few[2].pixels)
