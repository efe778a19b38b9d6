"""Studies: probes and distances against what is known, and every study by the command a user types."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from entry.config import ImageSpec
from prg.cli import main
from prg.commands.studies import STUDIES
from prg.console import track
from prg.evaluation import reliability
from prg.export import Export, export
from prg.extractor import Extractor
from prg.recipe import load_recipe
from prg.studies.corruptions import CORRUPTIONS, PUBLISHED
from prg.studies.probes import linear_probe, nearest_neighbours, top1
from prg.studies.samples import frechet_distance
from prg.studies.subject import Solve, Subject
from prg.trained import build_classifier, load_trained
from prg.training.run import open_run
from prg.unet import UNet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def entry(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "mine"
    assert main(["export", str(run), str(directory)]) == 0
    return directory


def test_calibration_of_a_model_that_is_as_right_as_it_is_sure() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (40_000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    honest = reliability(logits, labels)
    assert honest.ece < 0.01
    assert honest.nll == pytest.approx(float(-(p * np.log(p)).sum(1).mean()), abs=0.01)
    assert sum(honest.counts) == len(labels)
    boastful = reliability(3 * logits, labels)
    assert boastful.ece > 0.1
    assert boastful.nll > honest.nll


def test_calibration_by_hand() -> None:
    sure = reliability(np.array([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 0.0]]), np.array([0, 0, 1, 1]))
    assert sure.ece == pytest.approx(0.25)
    assert sure.counts[-1] == 4
    assert sure.accuracy[-1] == pytest.approx(0.75)


def clouds(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, 3, count)
    centres = np.zeros((3, 6))
    centres[[0, 1, 2], [0, 1, 2]] = 5
    features = centres[labels] + rng.normal(0, 1, (count, 6)) + 100
    return (features * [1, 1, 1, 1, 1, 30]).astype(np.float32), labels


def test_probes_find_classes_that_are_there_and_none_that_are_not() -> None:
    rng = np.random.default_rng(0)
    (a, labels), (b, truth) = clouds(rng, 300), clouds(rng, 200)
    assert top1(linear_probe(a, labels, b, 3), truth) > 0.95
    scaled = a / a.std(0), b / a.std(0)
    assert top1(nearest_neighbours(scaled[0], labels, scaled[1], 3), truth) > 0.95
    shuffled = rng.permutation(labels)
    assert top1(linear_probe(a, shuffled, b, 3), truth) < 0.6


def test_frechet_distance_of_normal_clouds_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (50_000, 3))
    b = rng.normal(0, 1, (50_000, 3)) * [1, 2, 3] + [1, 0, 0]
    assert frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_the_subject_answers_as_the_trained_model(run: Path, entry: Path, photos: Path) -> None:
    subject = Subject(entry)
    images = open_run(run, None).material("finetune").evaluated()[1]
    extractor, _ = load_trained(run / "finetune" / "checkpoint.safetensors")
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(images.pixels[:8]))
        expected = [t.numpy() for t in extractor.eval()(pixels, torch.full((8, 1), 0.8))]
    with track("features", 8) as bar:
        found = subject.features(images.pixels[:8], 0.8, subject.own, bar)
    for a, b in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_there_and_back_is_nearer_with_more_steps(entry: Path, run: Path) -> None:
    subject = Subject(entry)
    x = subject.latents(open_run(run, None).material("finetune").evaluated()[1].pixels[:4])
    errors = []
    for steps in (1, 4, 16):
        solve = Solve("midpoint", steps)
        back = subject.flow(subject.flow(x, 1.0, 0.0, solve), 0.0, 1.0, solve)
        errors.append(float((back - x).norm() / x.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"robustness"}))
def test_each_study_by_its_command(
    name: str, run: Path, entry: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, data in ((run, []), (entry, ["--data", str(photos)])):
        out = tmp_path / target.name / target.parent.name
        command = ["evaluate", str(target), *data, "--study", name, "--out", str(out), "--limit", "48"]
        assert main(command) == 0
        written = [Path(line) for line in capsys.readouterr().out.splitlines()]
        assert all(p.stat().st_size > 100 for p in written)
        found = json.loads((out / f"{name}.json").read_text())
        page = (out / f"{name}.md").read_text()
        assert f"prg evaluate mine {'--data photos ' if data else ''}--study {name} --limit 48" in page
        assert page.count("\n| ") == 1 + len(found["results"])
        assert str(tmp_path) not in page
        for picture in out.glob("*.png"):
            assert f"]({picture.name})" in page


@pytest.mark.parametrize("side", PUBLISHED)
def test_robustness_at_each_size_of_published_severities(
    side: int, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(f"images-{side}")
    entry, spec = tmp_path / "entry", recipe.image
    image = ImageSpec(size=side, resize=side, preprocessing="v2", mean=spec.mean, std=spec.std)
    labels = ("blue", "green", "red")
    model = build_classifier(UNet(recipe.unet), recipe, 3)
    extractor = Extractor(model.encoder, image, head=model.head)
    export(extractor, Export(image, 0.8, "hidden", {}, None, labels, (0.8,)), entry)
    command = ["evaluate", str(entry), "--data", str(photos), "--study", "robustness", "--limit", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "robustness.json").read_text())
    assert [r["corruption"] for r in found["results"]][: len(CORRUPTIONS)] == list(CORRUPTIONS)
    assert len(found["results"]) == len(CORRUPTIONS) + 1
    assert found["conditions"]["images"] == 2
    assert PUBLISHED[side] in (tmp_path / "robustness.md").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_accuracy_as_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["results"][0] == {"what": "top-1", "images": printed["images"], "value": printed["top1"]}
    assert np.array(found["confusion"]).sum() == printed["images"] == 120
    assert np.array(found["confusion"]).trace() == pytest.approx(120 * printed["top1"], abs=0.01)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_what_a_study_cannot_do_is_explained(
    run: Path, entry: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    for command, named in (
        ([str(run), "--study", "levels"], "--out"),
        ([str(run), "--stage", "pretrain"], "--study"),
        ([str(run), "--study", "steps", "--split", "test", *out], "--split"),
        ([str(run), "--study", "levels", "--limit", "11", *out], "12"),
        ([str(run), "--study", "steps", "--stage", "pretrain", *out], "head"),
        ([str(run), "--study", "robustness", *out], "16-pixel"),
        ([str(run), "--study", "samples", "--limit", "8", *out], "8"),
        ([str(entry), "--study", "levels", *out], "--data"),
        ([str(entry), "--study", "levels", "--data", str(photos), "--write", *out], "--write"),
    ):
        assert main(["evaluate", *command]) == 1
        assert named in capsys.readouterr().err
