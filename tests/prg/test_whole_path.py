"""From a folder of images to a served entry, by the commands a user types."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from workshop import image_folder, overrides, trained_run

from entry.config import read_entry
from entry.images import load_image
from entry.runner import Runner
from prg.cli import main
from prg.evaluation import evaluate, record
from prg.trained import load_trained
from prg.training.run import open_run
from service.app import create_app
from service.settings import Settings


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "photos", each=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("run") / "mine", photos)


def figures(printed: str) -> dict[str, float]:
    table: dict[str, float] = json.loads(printed.splitlines()[-1])
    return table


def test_measured_accuracy_is_served_accuracy(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run)]) == 0
    printed = figures(capsys.readouterr().out)
    of_run = {k: printed[k] for k in ("data", "images", "top1", "top5")}
    assert of_run["images"] == 120
    assert of_run["top1"] > 0.9
    entry = tmp_path / "models" / "mine"
    assert main(["export", str(run), str(entry)]) == 0
    assert main(["evaluate", str(entry), "--data", str(photos), "--write"]) == 0
    assert figures(capsys.readouterr().out) == printed
    card = (entry / "MODEL_CARD.md").read_text()
    assert f"| photos/test | 120 | {of_run['top1']:.4f} | 1.0000 |" in card
    assert "Classes of photos/test:\n\n| class | images | top-1 |\n|---|---|---|\n| blue | 40 | " in card
    again = tmp_path / "again"  # the figures are part of the entry, and its card is written from them
    shutil.copytree(entry, again / "mine")
    assert main(["export", str(run), str(again / "mine")]) == 0
    assert (
        card.split("## Version 1")[1]
        in (again / "mine" / "MODEL_CARD.md").read_text().split("## Version 2")[0]
    )
    with TestClient(create_app(Settings(model_repository=entry.parent))) as client:
        assert client.get("/models/mine").json()["accuracy"] == [of_run]
        right = 0
        for name in ("red", "green", "blue"):
            paths = sorted((photos / "test" / name).iterdir())
            files = [("files", (p.name, p.read_bytes())) for p in paths]
            items = client.post("/classify", files=files, params={"top_k": 1}).json()["data"]
            right += sum(item["predictions"][0]["label"] == name for item in items)
        assert right / 120 == of_run["top1"]


def test_of_many_classes_the_card_has_the_worst_and_the_best(run: Path, photos: Path, tmp_path: Path) -> None:
    entry = tmp_path / "mine"
    assert main(["export", str(run), str(entry)]) == 0
    found = evaluate(entry, open_run(run, None).material("finetune").evaluated()[1], "photos")
    labels = tuple(f"class {i}" for i in range(30))
    prg = found.entry.prg.model_copy(update={"labels": labels})
    confusion = np.zeros((30, 30), np.int64)
    confusion[:, 0] = np.arange(30)[::-1]  # the last one has no image
    confusion[np.arange(1, 29), np.arange(1, 29)] = np.arange(1, 29)
    many = replace(found, entry=replace(found.entry, prg=prg), confusion=confusion)
    assert len(many.by_class) == 30
    assert many.by_class[29] == ("class 29", 0, None)
    names = [name for name, _, _ in many.telling_classes]
    assert names == [f"class {i}" for i in (1, 2, 3, 4, 5, 25, 26, 27, 28, 0)]
    record(entry, many)
    card = (entry / "MODEL_CARD.md").read_text()
    assert "| class 1 | 29 | 0.0345 |" in card
    assert "by_class" not in card


@pytest.mark.parametrize("flags", [[], ["--compact"], ["--precision", "bf16"], ["--precision", "fp16"]])
def test_the_entry_answers_as_the_trained_model(run: Path, tmp_path: Path, flags: list[str]) -> None:
    directory = tmp_path / "mine"
    assert main(["export", str(run), str(directory), *flags]) == 0
    entry = read_entry(directory)
    extractor, _ = load_trained(run / "finetune" / "checkpoint.safetensors")
    pixels = np.random.default_rng(2).integers(0, 256, (4, 3, 16, 16), np.uint8)
    levels = np.array([1, 0.8, 0.3, 0], np.float32)
    with torch.inference_mode():
        answers = extractor.eval()(torch.from_numpy(pixels), torch.from_numpy(levels)[:, None])
    expected = [t.numpy() for t in answers]
    found = Runner(directory).run(pixels, levels)
    for a, b in zip(found.values(), expected, strict=True):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > entry.prg.tolerance.cosine
        lengths = np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert np.abs(lengths - 1).max() < 0.05


def test_the_same_weights_give_the_same_digests(run: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    for flags in ([], ["--compact"]):
        for _ in range(2):
            assert main(["export", str(run), str(directory), *flags]) == 0
    found = [read_entry(directory).fingerprints(str(version)) for version in (1, 2, 3, 4)]
    assert found[0] == found[1] != found[2] == found[3]


def test_an_export_is_as_it_was_trained_and_serves_as_the_recipe_says_now(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "recipe.json").read_text()
    changed = json.loads(before)
    changed["image"]["mean"] = [0.1, 0.1, 0.1]
    changed["serve"] = {"t_end": 0.6, "feature": "hidden"}
    try:
        (run / "recipe.json").write_text(json.dumps(changed))
        for stage in ("finetune", "pretrain"):
            assert main(["export", str(run), str(tmp_path / stage), "--stage", stage]) == 0
            prg = read_entry(tmp_path / stage).prg
            # at the level that the embedding was fitted at
            assert (prg.t_end, prg.feature) == (0.8, "hidden")
            assert list(prg.image.mean) == json.loads(before)["image"]["mean"]
    finally:
        (run / "recipe.json").write_text(before)
    assert main(["finetune", str(run), "--set", "encoder.steps=3"]) == 1
    assert "encoder.steps was 2, is 3" in capsys.readouterr().err
    assert (run / "recipe.json").read_text() == before


def test_another_beginning_is_another_run(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    command = [str(other), "--recipe", "images-32", "--data", str(photos), *overrides("seed=7")]
    assert main(["pretrain", *command]) == 0
    init = str(other / "pretrain" / "checkpoint.safetensors")
    assert main(["finetune", str(run), "--init", init]) == 1
    assert "init was" in capsys.readouterr().err


def test_figures_of_a_version_survive_an_export_meanwhile(run: Path, photos: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    assert main(["export", str(run), str(directory)]) == 0
    measured = evaluate(directory, open_run(run, None).material("finetune").evaluated()[1], "photos")
    assert main(["export", str(run), str(directory), "--compact"]) == 0
    record(directory, measured)
    entry = read_entry(directory)
    assert [len(entry.prg.versions[v].accuracy) for v in ("1", "2")] == [1, 0]


def test_compact_entries_are_smaller(run: Path, tmp_path: Path) -> None:
    sizes = []
    for flags in ([], ["--compact"]):
        directory = tmp_path / f"entry{len(flags)}"
        assert main(["export", str(run), str(directory), *flags]) == 0
        sizes.append((directory / "1" / "model.pt").stat().st_size)
    assert sizes[1] < 0.65 * sizes[0]


def test_versions_share_what_they_must(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "mine"
    for version in ("1", "2"):
        assert main(["export", str(run), str(directory)]) == 0
        assert read_entry(directory).default_version == version
    before = (directory / "config.pbtxt").read_bytes()
    assert main(["export", str(run), str(directory), "--stage", "pretrain"]) == 1
    error = capsys.readouterr().err
    assert "labels" in error
    assert "Export under a new name" in error
    assert (directory / "config.pbtxt").read_bytes() == before
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2", "MODEL_CARD.md", "config.pbtxt"]


def test_a_folder_that_is_something_else_is_not_touched(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", str(run), str(tmp_path)]) == 1
    assert "is no entry" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_pretrained_model_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "features"
    assert main(["export", str(run), str(directory), "--stage", "pretrain"]) == 0
    entry = read_entry(directory)
    assert list(entry.outputs()) == ["STATE", "HIDDEN", "EMBEDDING"]
    image = Image.new("RGB", (16, 16), "red")
    image.save(tmp_path / "a.png")
    pixels = load_image((tmp_path / "a.png").read_bytes(), entry.prg.image)
    assert Runner(directory).run(pixels[None], np.ones(1, np.float32))["STATE"].shape == (1, 768)
    assert main(["evaluate", str(directory), "--data", str(tmp_path)]) == 1
    capsys.readouterr()


def test_the_dry_run_trains_nothing(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--recipe", "images-32", "--data", str(photos), "--dry-run", *overrides()]
    for flags, work in (
        (["pretrain"], "pretrain 20 0"),  # 84 images in batches of 8, twice
        (["finetune"], "finetune 60 0"),
        (["finetune", "--freeze"], "finetune 1 0"),
    ):
        assert main([flags[0], str(tmp_path / "new"), *command, *flags[1:]]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert '"network": "tiny16"' in printed
        for words in ("parameters", "GFLOP an evaluation", work, "hours"):
            assert words in printed
    assert main(["finetune", str(tmp_path / "new"), *command, "--init", str(photos)]) == 1
    assert f"{photos}: no such checkpoint" in capsys.readouterr().err
    for stage in ("pretrain", "finetune"):
        assert main([stage, str(tmp_path / "new"), *command, "--set", "data.validation=0.999"]) == 1
        assert "data.validation" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["pretrain", "RUN"], "begin one by `prg pretrain` or `prg finetune` with --recipe"),
        (["pretrain", "RUN", "--recipe", "images-33"], "images-32"),
        (["pretrain", "RUN", "--recipe", "images-32"], "--data"),
        (["pretrain", "RUN", "--recipe", "images-32", "--data", "/none"], "/none"),
        (["finetune", "RUN"], "recipe.json"),
        (["evaluate", "RUN"], "RUN"),
        (["export", "RUN", "RUN"], "recipe.json"),
    ],
)
def test_errors_are_explained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("prg: ")
    assert named in error
    assert "Traceback" not in error


@pytest.mark.parametrize("path", ["otcfm", "gvp", "vp"])
def test_other_paths_go_the_whole_way(
    path: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, entry = str(tmp_path / "run"), tmp_path / "models" / path
    settings = overrides(f"encoder.path={path}", "pretrain.epochs=1", "finetune.epochs=6")
    assert main(["pretrain", run, "--recipe", "images-32", "--data", str(photos), *settings]) == 0
    assert main(["finetune", run]) == 0
    assert main(["export", run, str(entry)]) == 0
    assert read_entry(entry).prg.path == path
    assert main(["evaluate", str(entry), "--data", str(photos)]) == 0
    assert figures(capsys.readouterr().out)["top1"] > 0.8
    other = [*overrides(), "--init", str(tmp_path / "run" / "pretrain" / "checkpoint.safetensors")]
    command = ["finetune", str(tmp_path / "other"), "--recipe", "images-32", "--data", str(photos), *other]
    assert main(command) == 1
    assert f"encoder.path was '{path}', is 'icfm'" in capsys.readouterr().err
