"""From a folder of images to a served entry, by the commands a user types."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from workshop import CHECKPOINT, answer, evaluated, exported, new_run, overrides, refusal, trained_run

from entry.config import EntryError, read_entry
from entry.images import load_image
from entry.runner import Runner
from prg.checkpoint import Stage
from prg.errors import CheckpointError
from prg.evaluation import evaluate, record
from prg.trained import load_trained
from prg.training.finetune import finetune
from prg.training.run import open_run
from service.app import create_app
from service.settings import Settings

STAGES: tuple[Stage, ...] = ("pretrain", "finetune")


def test_measured_accuracy_is_served_accuracy(run: Path, photos: Path, tmp_path: Path) -> None:
    found = json.loads(answer("evaluate", run).splitlines()[-1])
    of_run = {k: found[k] for k in ("data", "images", "top1", "top5")}
    assert of_run["images"] == 120
    assert of_run["top1"] > 0.9
    entry = tmp_path / "models" / "mine"
    answer("export", run, entry)
    assert json.loads(answer("evaluate", entry, "--data", photos, "--write").splitlines()[-1]) == found
    card = (entry / "MODEL_CARD.md").read_text()
    assert f"| photos/test | 120 | {of_run['top1']:.4f} | 1.0000 |" in card
    assert "\n| blue | 40 | " in card
    # The figures are part of the entry, and its card is written from them.
    again = exported(run, shutil.copytree(entry, tmp_path / "again" / "mine"))
    rewritten = (again / "MODEL_CARD.md").read_text()
    assert card.split("## Version 1")[1] in rewritten.split("## Version 2")[0]
    with TestClient(create_app(Settings(model_repository=entry.parent))) as client:
        assert client.get("/models/mine").json()["accuracy"] == [of_run]
        right = 0
        for name in ("red", "green", "blue"):
            paths = sorted((photos / "test" / name).iterdir())
            files = [("files", (p.name, p.read_bytes())) for p in paths]
            items = client.post("/classify", files=files, params={"top_k": 1}).json()["data"]
            right += sum(item["predictions"][0]["label"] == name for item in items)
        assert right / 120 == of_run["top1"]


def test_the_card_of_many_classes_and_of_an_export_meanwhile(run: Path, tmp_path: Path) -> None:
    entry = exported(run, tmp_path / "mine")
    found = evaluate(entry, evaluated(run)[1], "photos")
    prg = found.entry.prg.model_copy(update={"labels": tuple(f"class {i}" for i in range(30))})
    confusion = np.zeros((30, 30), np.int64)
    confusion[:, 0] = np.arange(30)[::-1]  # the last one has no image
    confusion[np.arange(1, 29), np.arange(1, 29)] = np.arange(1, 29)
    many = replace(found, entry=replace(found.entry, prg=prg), confusion=confusion)
    assert many.by_class[29] == ("class 29", 0, None)
    worst_and_best = [f"class {i}" for i in (1, 2, 3, 4, 5, 25, 26, 27, 28, 0)]
    assert [name for name, _, _ in many.telling_classes] == worst_and_best
    record(exported(run, entry, compact=True), many)
    card = (entry / "MODEL_CARD.md").read_text()
    assert "| class 1 | 29 | 0.0345 |" in card
    assert "by_class" not in card
    assert [len(version.accuracy) for version in read_entry(entry).prg.versions.values()] == [1, 0]


@pytest.mark.parametrize("how", [{}, {"compact": True}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_the_entry_answers_as_the_trained_model(run: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    directory = exported(run, tmp_path / "mine", **how)
    extractor, _ = load_trained(run / "finetune" / CHECKPOINT)
    pixels = np.random.default_rng(2).integers(0, 256, (4, 3, 16, 16), np.uint8)
    levels = np.array([1, 0.8, 0.3, 0], np.float32)
    with torch.inference_mode():
        answers = extractor.eval()(torch.from_numpy(pixels), torch.from_numpy(levels)[:, None])
    found = Runner(directory).run(pixels, levels)
    for a, b in zip(found.values(), (t.numpy() for t in answers), strict=True):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > read_entry(directory).prg.tolerance.cosine
        lengths = np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert np.abs(lengths - 1).max() < 0.05


def test_the_same_weights_give_the_same_digests_and_compact_ones_are_smaller(
    run: Path, tmp_path: Path
) -> None:
    for compact in (False, False, True, True):
        entry = exported(run, tmp_path / "mine", compact=compact)
    found = [read_entry(entry).fingerprints(version) for version in "1234"]
    assert found[0] == found[1] != found[2] == found[3]
    large, small = ((entry / version / "model.pt").stat().st_size for version in "13")
    assert small < 0.65 * large


def test_an_export_is_as_it_was_trained_and_serves_as_the_recipe_says_now(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    before = json.loads((folder / "recipe.json").read_text())
    image, serve = before["image"] | {"mean": [0.1] * 3}, {"t_end": 0.6, "feature": "hidden"}
    (folder / "recipe.json").write_text(json.dumps(before | {"image": image, "serve": serve}))
    for stage in STAGES:
        prg = read_entry(exported(folder, tmp_path / stage, stage)).prg
        # at the level that the embedding was fitted at
        assert (prg.t_end, prg.feature) == (0.8, "hidden")
        assert list(prg.image.mean) == before["image"]["mean"]


def test_versions_share_what_they_must(run: Path, tmp_path: Path) -> None:
    entry = tmp_path / "mine"
    for version in ("1", "2"):
        assert read_entry(exported(run, entry)).default_version == version
    before = (entry / "config.pbtxt").read_bytes()
    with pytest.raises(EntryError, match="labels"):
        exported(run, entry, "pretrain")
    assert (entry / "config.pbtxt").read_bytes() == before
    assert sorted(p.name for p in entry.iterdir()) == ["1", "2", "MODEL_CARD.md", "config.pbtxt"]
    with pytest.raises(EntryError, match=str(tmp_path)):  # a folder that is something else
        exported(run, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_pretrained_model_alone(run: Path, photos: Path, tmp_path: Path) -> None:
    directory = exported(run, tmp_path / "features", "pretrain")
    entry = read_entry(directory)
    assert list(entry.outputs()) == ["STATE", "HIDDEN", "EMBEDDING"]
    pixels = load_image((photos / "test" / "red" / "0.png").read_bytes(), entry.prg.image)
    assert Runner(directory).run(pixels[None], np.ones(1, np.float32))["STATE"].shape == (1, 768)
    assert str(directory) in refusal("evaluate", directory, "--data", photos)


def test_the_dry_run_trains_nothing(tmp_path: Path, photos: Path) -> None:
    new = tmp_path / "new"
    command = ["--recipe", "images-32", "--data", photos, "--dry-run", *overrides()]
    for flags, work in (
        (["pretrain"], "pretrain 20 0"),  # 84 images in batches of 8, twice
        (["finetune"], "finetune 60 0"),
        (["finetune", "--freeze"], "finetune 1 0"),
    ):
        printed = " ".join(answer(flags[0], new, *command, *flags[1:]).split())
        for words in ('"network": "tiny16"', "parameters", "GFLOP", work, "hours"):
            assert words in printed
    assert f"{photos}: " in refusal("finetune", new, *command, "--init", photos)
    assert "data.validation" in refusal("pretrain", new, *command, "--set", "data.validation=0.999")
    assert not new.exists()


def test_errors_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, named in (
        ("pretrain RUN", "recipe.json: .*--recipe"),
        ("pretrain RUN --recipe images-33", "images-32"),
        ("pretrain RUN --recipe images-32", "--data"),
        ("pretrain RUN --recipe images-32 --data /none", "/none: "),
        ("evaluate RUN", "RUN: "),
        ("evaluate . --study steps --out out", r"\.: "),
        ("export RUN RUN", "recipe.json"),
    ):
        assert re.search(named, refusal(*command.split())), command


@pytest.mark.parametrize("path", ["otcfm", "gvp", "vp"])
def test_other_paths_go_the_whole_way(path: str, photos: Path, tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", photos, f"encoder.path={path}", "pretrain.epochs=1")
    entry = exported(run, tmp_path / "models" / path)
    assert read_entry(entry).prg.path == path
    assert evaluate(entry, evaluated(entry, photos)[1], "photos").accuracy.top1 > 0.8
    with pytest.raises(CheckpointError, match=rf"encoder\.path .*'{path}'.*'icfm'"):
        finetune(new_run(tmp_path / "other", photos), open_run(run).pretrained)
