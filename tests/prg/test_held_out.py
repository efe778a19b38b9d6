"""What is held out is a property of each image, and no model is evaluated on what it was trained on unasked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workshop import image_folder, overrides, trained_run

from entry.config import read_entry
from prg.checkpoint import read_facts
from prg.cli import main
from prg.errors import DataError
from prg.images.held_out import are_others, hold_out, key_of, knows, never_trained_on
from prg.images.sets import Images
from prg.recipe import Data
from prg.target import open_target
from prg.training.run import open_run

CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos without a test split, and its entry."""
    folder = tmp_path_factory.mktemp("home")
    run = trained_run(folder / "run", image_folder(folder / "photos", each=30, splits=("train",)))
    assert main(["export", str(run), str(folder / "entry")]) == 0
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return ["--recipe", "images-32", "--data", str(folder), *overrides(*more)]


def made(count: int, classes: int = 1) -> Images:
    keys = np.array([key_of(str(i).encode()) for i in range(count)], np.uint64)
    labels = np.arange(count) % classes
    return Images(np.arange(count)[:, None], labels, tuple(map(str, range(classes))), keys)


def trained_on(run: Path) -> tuple[set[int], set[int]]:
    """Keys of what a run's pretraining was given, and of what it held out."""
    images = open_run(run, None).training_images()
    return tuple(set(part.keys.tolist()) for part in hold_out(images, 0.3))  # type: ignore[return-value]


def test_shares_nest_and_neither_order_nor_company_matters() -> None:
    images = made(2000)
    training, held = hold_out(images, 0.2)
    assert sorted([*training.keys, *held.keys]) == sorted(images.keys)
    assert 0.15 < len(held) / len(images) < 0.25
    assert set(hold_out(images, 0.1)[1].keys) < set(held.keys) < set(hold_out(images, 0.4)[1].keys)
    shuffled = images.subset(np.random.default_rng(0).permutation(2000))
    for same in (0, 1):
        assert np.array_equal(hold_out(shuffled, 0.2)[same].keys, hold_out(images, 0.2)[same].keys)
    assert set(hold_out(images.subset(np.arange(1000)), 0.2)[1].keys) <= set(held.keys)


def test_what_an_earlier_training_was_trained_on_calibrates_nothing() -> None:
    before, now = hold_out(made(1000), 0.1)[1], hold_out(made(1000), 0.3)[1]
    assert now.digest != before.digest
    unseen = never_trained_on(now, 0.1)
    assert unseen is not None
    assert unseen.digest == before.digest
    assert never_trained_on(now, 0.0) is None
    assert never_trained_on(now, None) is now


def test_a_share_that_leaves_too_little_names_one_that_works() -> None:
    images = made(100)
    with pytest.raises(
        DataError, match=r"holds out \d of 100 images.* --set data\.validation=0\.\d+$"
    ) as error:
        hold_out(images, 0.02)
    assert len(hold_out(images, float(str(error.value).rpartition("=")[2]))[1]) >= 10
    with pytest.raises(DataError, match="--freeze, which holds none out"):
        hold_out(made(12), 0.5)
    with pytest.raises(DataError, match="to train on: add images$"):
        hold_out(made(12).unlabelled(), 0.5)
    every = made(200, 100)  # two images a class: some class loses both
    with pytest.raises(DataError, match="among them all of "):
        hold_out(every, 0.5)


def test_added_and_renamed_images_are_never_evaluated_on_if_trained_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = shutil.copytree(home / "photos", tmp_path / "photos")
    more = image_folder(tmp_path / "more", each=30, splits=("train",), seed=1)
    for colour in ("red", "green", "blue"):
        for i, file in enumerate(sorted((grown / "train" / colour).iterdir())):
            file.rename(file.with_name(f"renamed {97 * i % 100}.png"))
        for file in (more / "train" / colour).iterdir():
            shutil.copy(file, grown / "train" / colour / f"a {file.name}")
    was_trained, was_held_out = trained_on(home / "run")
    for target in (home / "run", home / "entry"):
        material = open_target(target, "finetune", tmp_path / target.name, Data(source=str(grown))).material
        name, images = material.evaluated()
        assert name == "photos/held-out"
        keys = set(images.keys.tolist())
        assert keys > was_held_out
        assert not keys & was_trained
        assert main(["evaluate", str(target), "--data", str(grown)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == len(images)


def test_a_split_is_known_by_the_share_of_its_images_that_were_trained_on() -> None:
    images = made(4000)
    trained, fresh = images.subset(np.arange(2000)), images.subset(np.arange(2000, 4000))
    kept = trained.kept_keys
    assert not knows(kept, fresh)
    assert knows(kept, images)  # a half
    assert knows(kept, trained.subset(np.arange(500)))
    smallest = np.argsort(trained.keys)[:5]  # chance copies
    assert not knows(kept, images.subset(np.concatenate([smallest[:1], np.arange(2000, 4000)])))
    assert not knows(kept, images.subset(np.concatenate([smallest[:2], np.arange(2000, 4000)])))
    again = trained.subset(np.concatenate([np.full(70, smallest[0]), np.arange(2000)]))
    assert again.kept_keys == kept  # copies among them change nothing


@pytest.mark.parametrize("form", ["images", "parquet"])
def test_images_trained_on_are_known_again_in_another_split(
    form: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    if form == "images":
        shutil.copytree(home / "photos" / "train", other / "test")
    else:
        files = sorted((home / "photos" / "train").glob("*/*.png"))
        labels = sorted({file.parent.name for file in files})
        table = {
            "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "label": [file.parent.name for file in files],
        }
        assert labels == ["blue", "green", "red"]
        other.mkdir()
        pq.write_table(pa.table(table), other / "test.parquet")
    assert main(["evaluate", str(home / "entry"), "--data", str(other)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["data"], found["images"]) == ("other/test (held out)", len(trained_on(home / "run")[1]))
    run, entry = tmp_path / "run", tmp_path / "entry"
    more = image_folder(tmp_path / "more", each=30, splits=("train",), seed=1)
    assert main(["finetune", str(run), *command(more), "--init", str(home / "entry")]) == 0
    assert main(["export", str(run), str(entry)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(entry), "--data", str(other), "--seen"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["data"], found["images"]) == ("other/test (seen in training)", 90)


def test_too_small_an_inherited_share_is_refused_before_training(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = image_folder(tmp_path / "few", each=9, splits=("train",), seed=5)
    init = ["--init", str(home / "entry")]
    assert main(["finetune", str(tmp_path / "run"), *command(few, "data.validation=0.5"), *init]) == 1
    assert "a share of 0.3 holds out" in (said := capsys.readouterr().err)
    assert "begin from a model that held out more" in said
    assert not (tmp_path / "run" / "finetune" / CHECKPOINT).exists()
    trained = tmp_path / "trained"
    for i, colour in enumerate(("red", "green", "blue")):
        for file in sorted((home / "photos" / "train" / colour).iterdir())[i : i + 3]:
            (trained / colour).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, trained / colour)
    assert main(["evaluate", str(home / "entry"), "--data", str(trained)]) == 1
    assert "--seen" in capsys.readouterr().err


@pytest.mark.parametrize("begin", ["checkpoint", "entry"])
def test_the_smallest_share_of_all_trainings_counts(begin: str, home: Path, tmp_path: Path) -> None:
    init = home / "entry" if begin == "entry" else home / "run" / "finetune" / CHECKPOINT
    run, entry = tmp_path / "run", tmp_path / "entry"
    settings = command(home / "photos", "data.validation=0.5", "seed=5", "finetune.epochs=1")
    assert main(["finetune", str(run), *settings, "--init", str(init)]) == 0
    facts = read_facts(run / "finetune" / CHECKPOINT)
    assert facts.held_out == 0.3
    assert [line.split(":")[0] for line in facts.history][:2] == ["pretrain", "finetune"]
    assert main(["export", str(run), str(entry)]) == 0
    assert read_entry(entry).prg.versions["1"].held_out == 0.3
    for target, data in ((run, Data()), (entry, Data(source=str(home / "photos")))):
        material = open_target(target, "finetune", tmp_path / target.name, data).material
        assert set(material.training()[1].keys.tolist()) == trained_on(home / "run")[1]


def test_what_may_have_been_seen_is_evaluated_on_when_asked_and_labelled(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = shutil.copytree(home / "entry", tmp_path / "entry")
    config = entry / "config.pbtxt"
    config.write_text(config.read_text().replace('\\"held_out\\":0.3', '\\"held_out\\":null'))
    assert read_entry(entry).prg.versions["1"].held_out is None
    evaluate = ["evaluate", str(entry), "--data", str(home / "photos")]
    for more in ([], ["--split", "train"], ["--study", "steps", "--out", str(tmp_path / "out")]):
        assert main([*evaluate, *more]) == 1
        assert "may have been trained on these images" in capsys.readouterr().err
    assert main([*evaluate, "--seen", "--write"]) == 0
    [accuracy] = read_entry(entry).prg.versions["1"].accuracy
    assert (accuracy.data, accuracy.images) == ("photos/train (seen in training)", 90)
    study = ["--study", "steps", "--out", str(tmp_path / "out"), "--seen"]
    assert main([*evaluate, *study]) == 0
    page = (tmp_path / "out" / "steps.md").read_text()
    assert "--seen" in page
    assert "- held out: not from training" in page


def test_a_head_fitted_to_all_images_asks_for_others(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = ["--init", str(home / "entry"), "--freeze"]
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos"), *init]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "name a test split or other images" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "few")]) == 0
    assert main(["evaluate", str(tmp_path / "few"), "--data", str(home / "photos")]) == 1
    assert "holds none of them out (with --freeze, the head is fitted to all" in capsys.readouterr().err
    other = image_folder(tmp_path / "other", each=4, splits=("test",), seed=3)
    assert main(["evaluate", str(tmp_path / "few"), "--data", str(other)]) == 0


def test_other_images_are_taken_whole_though_their_folder_is_called_train(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nothing was held out. Their keys show it; where these show nothing, the name counts."""
    run, few = tmp_path / "run", tmp_path / "few"
    init = ["--init", str(home / "entry"), "--freeze"]
    assert main(["finetune", str(run), *command(home / "photos"), *init]) == 0
    assert main(["export", str(run), str(few)]) == 0
    other = image_folder(tmp_path / "other", each=4, splits=("train",), seed=3)
    for target in (run, few, home / "entry"):
        for data in (other, other / "train"):  # of splits, or of classes alone
            capsys.readouterr()
            assert main(["evaluate", str(target), "--data", str(data)]) == 0
            found = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert (found["data"], found["images"]) == (f"{data.name}/train (not trained on)", 12)
    shutil.copy(next((home / "photos" / "train" / "red").iterdir()), other / "train" / "red" / "known.png")
    assert main(["evaluate", str(few), "--data", str(other)]) == 1
    assert "may have been trained on these images" in capsys.readouterr().err


def test_keys_show_others_only_where_they_show_something() -> None:
    images = made(4000)
    trained, fresh = images.subset(np.arange(2000)), images.subset(np.arange(2000, 4000))
    assert are_others([trained.kept_keys], fresh)
    assert not are_others([trained.kept_keys], trained)
    assert not are_others([trained.kept_keys, fresh.kept_keys], fresh)
    assert not are_others([], fresh)
    largest = np.argsort(trained.keys)[-20:]  # none of those whose keys are kept
    assert not are_others([trained.kept_keys], trained.subset(largest))


def test_a_run_is_evaluated_on_a_folder_without_images_to_train_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = image_folder(tmp_path / "other", each=4, splits=("test",), seed=3)
    assert main(["evaluate", str(home / "run"), "--data", str(other)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "other/test"
    assert main(["evaluate", str(home / "run"), "--data", str(other), "--split", "train"]) == 1
    assert "no split 'train' (there are: test)" in capsys.readouterr().err


def test_images_named_as_the_recipe_names_its_classes_keep_their_names(home: Path, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "other", each=1, splits=("test",))
    recipe = open_run(
        home / "run", None, [f"data.source={other}", 'data.labels=["red", "green", "blue", "grey"]']
    )
    assert recipe.found["test"].classes == ("blue", "green", "red")


def test_training_on_another_split_than_train(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, run = shutil.copytree(home / "photos", tmp_path / "photos"), tmp_path / "run"
    image_folder(photos, each=20, splits=("unlabelled",), seed=2)
    (photos / "unlabelled").rename(photos / "dev")
    assert main(["pretrain", str(run), *command(photos, "data.train=validation")]) == 0
    assert main(["finetune", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "entry")]) == 0
    for target, data in ((run, []), (tmp_path / "entry", ["--data", str(photos)])):
        for split, name in (("dev", "photos/held-out"), ("train", "photos/train")):
            capsys.readouterr()
            assert main(["evaluate", str(target), *data, "--split", split]) == 0
            found = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert found["data"] == name
            assert found["images"] < 60 if split == "dev" else found["images"] == 90


def test_a_test_split_without_labels_is_skipped_unless_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a competition hands it out."""
    photos = shutil.copytree(home / "photos", tmp_path / "photos")
    (photos / "test").mkdir()
    shutil.copy(photos / "train" / "red" / "0.png", photos / "test" / "0.png")
    for target in (home / "run", home / "entry"):
        assert main(["evaluate", str(target), "--data", str(photos)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "photos/held-out"
    init = ["--init", str(home / "run" / "pretrain" / CHECKPOINT)]
    named = ["finetune", str(tmp_path / "run"), *command(photos, "data.test=test"), *init]
    for more in ([], ["--dry-run"]):
        assert main([*named, *more]) == 1
        assert "data.test = 'test' has no labels" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_other_images_are_another_run(
    stage: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    other = shutil.copytree(home / "photos", tmp_path / "photos")
    (other / "train" / "red" / "3.png").rename(
        other / "train" / "red" / "z.png"
    )  # the same under another name
    assert main([stage, str(run), "--data", str(other)]) == 0
    assert "done already: " in capsys.readouterr().out
    shutil.copy(other / "train" / "red" / "1.png", other / "train" / "red" / "0.png")  # as many, but others
    shutil.copy(other / "train" / "red" / "1.png", other / "train" / "red" / "2.png")
    assert main([stage, str(run), "--data", str(other)]) == 1
    assert "trained." in capsys.readouterr().err


def test_labels_count_where_they_are_learned(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    other = shutil.copytree(home / "photos", tmp_path / "photos")
    training, _ = trained_on(home / "run")
    file = next(f for f in sorted((other / "train" / "blue").iterdir()) if key_of(f.read_bytes()) in training)
    file.rename(other / "train" / "green" / "moved.png")
    assert main(["pretrain", str(run), "--data", str(other)]) == 0
    assert main(["finetune", str(run), "--data", str(other)]) == 1
    assert "trained.digest was" in capsys.readouterr().err
