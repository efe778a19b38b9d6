"""Studies: probes and distances against what is known, and every study by the command a user types."""

import json
from pathlib import Path

import numpy as np
import pytest
from workshop import answer, evaluated, refusal

from entry.config import ImageSpec
from entry.runner import Runner
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
from prg.trained import build_classifier
from prg.unet import UNet

pytestmark = pytest.mark.slow


def test_calibration_of_a_model_that_is_as_right_as_it_is_sure() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (40_000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    honest, boastful = reliability(logits, labels), reliability(3 * logits, labels)
    assert honest.ece < 0.01
    assert honest.nll == pytest.approx(float(-(p * np.log(p)).sum(1).mean()), abs=0.01)
    assert sum(honest.counts) == len(labels)
    assert boastful.ece > 0.1
    assert boastful.nll > honest.nll
    sure = reliability(50 * np.eye(2)[[0, 0, 1, 0]], np.array([0, 0, 1, 1]))
    assert (sure.ece, sure.counts[-1], sure.accuracy[-1]) == (pytest.approx(0.25), 4, pytest.approx(0.75))


def test_probes_find_classes_that_are_there_and_none_that_are_not() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500)
    # Three clouds, of numbers of very different size.
    features = (5 * np.eye(6)[labels] + rng.normal(0, 1, (500, 6)) + 100) * [1, 1, 1, 1, 1, 30]
    a, b = features[:300].astype(np.float32), features[300:].astype(np.float32)
    known, truth = labels[:300], labels[300:]
    assert top1(linear_probe(a, known, b, 3), truth) > 0.95
    assert top1(nearest_neighbours(a / a.std(0), known, b / a.std(0), 3), truth) > 0.95
    assert top1(linear_probe(a, rng.permutation(known), b, 3), truth) < 0.6


def test_frechet_distance_of_normal_clouds_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (50_000, 3))
    b = rng.normal(0, 1, (50_000, 3)) * [1, 2, 3] + [1, 0, 0]
    assert frechet_distance(a, b) == pytest.approx(1 + 0 + 1 + 4, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_subject_answers_as_the_entry_and_comes_back_nearer_with_more_steps(
    run: Path, entry: Path
) -> None:
    subject, pixels = Subject(entry), evaluated(run)[1].pixels[:8]
    expected = Runner(entry).run(np.ascontiguousarray(pixels), np.full(8, 0.8, np.float32))
    with track("features", 8) as bar:
        found = subject.features(pixels, 0.8, subject.own, bar)
    for a, b in zip(found.values(), expected.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    x, errors = subject.latents(pixels[:4]), []
    for steps in (1, 4, 16):
        solve = Solve("midpoint", steps)
        back = subject.flow(subject.flow(x, 1.0, 0.0, solve), 0.0, 1.0, solve)
        errors.append(float((back - x).norm() / x.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"robustness"}))
def test_each_study_by_its_command(name: str, run: Path, entry: Path, photos: Path, tmp_path: Path) -> None:
    for target, data in ((run, []), (entry, ["--data", photos])):
        out = tmp_path / target.name / target.parent.name
        printed = answer("evaluate", target, *data, "--study", name, "--out", out, "--limit", 48)
        assert all(Path(line).stat().st_size > 100 for line in printed.splitlines())
        found = json.loads((out / f"{name}.json").read_text())
        page = (out / f"{name}.md").read_text()
        assert f"prg evaluate mine {'--data photos ' if data else ''}--study {name} --limit 48" in page
        assert page.count("\n| ") == 1 + len(found["results"])
        assert str(tmp_path) not in page
        for picture in out.glob("*.png"):
            assert f"]({picture.name})" in page


@pytest.mark.parametrize("side", PUBLISHED)
def test_robustness_at_each_size_of_published_severities(side: int, photos: Path, tmp_path: Path) -> None:
    recipe = load_recipe(f"images-{side}")
    image = ImageSpec(
        **recipe.image.model_dump(include={"size", "resize", "mean", "std"}), preprocessing="v2"
    )
    model = build_classifier(UNet(recipe.unet), recipe, 3)
    extractor = Extractor(model.encoder, image, head=model.head)
    labels = ("blue", "green", "red")
    export(extractor, Export(image, 0.8, "hidden", {}, None, labels, (0.8,)), tmp_path / "entry")
    command = ["evaluate", tmp_path / "entry", "--data", photos, "--study", "robustness", "--limit", "2"]
    assert len(answer(*command, "--out", tmp_path).splitlines()) == 4
    found = json.loads((tmp_path / "robustness.json").read_text())
    assert [r["corruption"] for r in found["results"]][: len(CORRUPTIONS)] == list(CORRUPTIONS)
    assert len(found["results"]) == len(CORRUPTIONS) + 1
    assert found["conditions"]["images"] == 2
    assert PUBLISHED[side] in (tmp_path / "robustness.md").read_text()


def test_accuracy_as_files(run: Path, tmp_path: Path) -> None:
    printed = json.loads(answer("evaluate", run, "--out", tmp_path).splitlines()[-1])
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["results"][0] == {"what": "top-1", "images": printed["images"], "value": printed["top1"]}
    assert np.array(found["confusion"]).sum() == printed["images"] == 120
    assert np.array(found["confusion"]).trace() == pytest.approx(120 * printed["top1"], abs=0.01)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_what_a_study_cannot_do_is_explained(run: Path, entry: Path, photos: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path]
    for command, named in (
        ([run, "--study", "levels"], "--out"),
        ([run, "--stage", "pretrain"], "--study"),
        ([run, "--study", "steps", "--split", "test", *out], "--split"),
        ([run, "--study", "levels", "--limit", "11", *out], "12"),
        ([run, "--study", "steps", "--stage", "pretrain", *out], "head"),
        ([run, "--study", "robustness", *out], "16-pixel"),
        ([run, "--study", "samples", "--limit", "8", *out], "8"),
        ([entry, "--study", "levels", *out], "--data"),
        ([entry, "--study", "levels", "--data", photos, "--write", *out], "--write"),
    ):
        assert named in refusal("evaluate", *command)
