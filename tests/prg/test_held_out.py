"""What is held out is a property of each image, and no model is evaluated on what it was trained on unasked."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workshop import (
    CHECKPOINT,
    CLASSES,
    answer,
    evaluated,
    exported,
    image_folder,
    new_run,
    refusal,
    trained_run,
)

from entry.config import read_entry
from prg.checkpoint import read_facts
from prg.commands.train import FREEZE
from prg.errors import CheckpointError, DataError
from prg.images.held_out import are_others, hold_out, key_of, knows, never_trained_on
from prg.images.sets import Images
from prg.recipe import Data
from prg.target import open_target
from prg.training.finetune import finetune
from prg.training.pretrain import pretrain
from prg.training.run import Run, open_run


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
    training, held = (part.keys for part in hold_out(images, 0.2))
    assert sorted([*training, *held]) == sorted(images.keys)
    assert 0.15 < len(held) / len(images) < 0.25
    assert set(hold_out(images, 0.1)[1].keys) < set(held) < set(hold_out(images, 0.4)[1].keys)
    shuffled = hold_out(images.subset(np.random.default_rng(0).permutation(2000)), 0.2)
    for found, keys in zip(shuffled, (training, held), strict=True):
        assert np.array_equal(found.keys, keys)
    assert set(hold_out(images.subset(np.arange(1000)), 0.2)[1].keys) <= set(held)


def test_what_an_earlier_training_was_trained_on_calibrates_nothing() -> None:
    before, now = hold_out(made(1000), 0.1)[1], hold_out(made(1000), 0.3)[1]
    unseen = never_trained_on(now, 0.1)
    assert unseen is not None
    assert unseen.digest == before.digest != now.digest
    assert never_trained_on(now, 0.0) is None
    assert never_trained_on(now, None) is now


def test_a_share_that_leaves_too_little_names_one_that_works() -> None:
    images = made(100)
    with pytest.raises(DataError, match=r"data\.validation=0\.\d+$") as error:
        hold_out(images, 0.02)
    assert len(hold_out(images, float(str(error.value).rpartition("=")[2]))[1]) >= 10
    with pytest.raises(DataError, match="--freeze"):
        hold_out(made(12), 0.5)
    with pytest.raises(DataError) as error:
        hold_out(made(12).unlabelled(), 0.5)
    assert "--" not in str(error.value)  # neither a share nor a frozen encoder would do
    pairs = made(200, 100)  # two images a class: some class loses both
    held = pairs.keys < 2**63
    with pytest.raises(
        DataError, match=" ".join(f"{i}[,;]" for i in range(100) if held[i] and held[i + 100])
    ):
        hold_out(pairs, 0.5)


def test_a_split_is_known_by_the_share_of_its_images_that_were_trained_on() -> None:
    images = made(4000)
    trained, fresh = images.subset(np.arange(2000)), images.subset(np.arange(2000, 4000))
    kept = trained.kept_keys
    assert not knows(kept, fresh)
    assert knows(kept, images)  # a half
    assert knows(kept, trained.subset(np.arange(500)))
    smallest = np.argsort(trained.keys)[:5]
    for copies in (1, 2):  # by chance
        assert not knows(kept, images.subset(np.concatenate([smallest[:copies], np.arange(2000, 4000)])))
    again = trained.subset(np.concatenate([np.full(70, smallest[0]), np.arange(2000)]))
    assert again.kept_keys == kept  # copies among them change nothing
    # That it is another one shows only where keys show something.
    assert are_others([kept], fresh)
    assert not are_others([kept], trained)
    assert not are_others([kept, fresh.kept_keys], fresh)
    assert not are_others([], fresh)
    assert not are_others([kept], trained.subset(np.argsort(trained.keys)[-20:]))  # whose keys are not kept


def test_added_and_renamed_images_are_never_evaluated_on_if_trained_on(home: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(home / "photos", tmp_path / "photos")
    more = image_folder(tmp_path / "more", each=30, splits=("train",), seed=1)
    for colour in CLASSES:
        for i, file in enumerate(sorted((grown / "train" / colour).iterdir())):
            file.rename(file.with_name(f"renamed {97 * i % 100}.png"))
        for file in (more / "train" / colour).iterdir():
            shutil.copy(file, grown / "train" / colour / f"a {file.name}")
    was_trained, was_held_out = trained_on(home / "run")
    for target in (home / "run", home / "entry"):
        name, images = evaluated(target, grown)
        assert name == "photos/held-out"
        keys = set(images.keys.tolist())
        assert keys > was_held_out
        assert not keys & was_trained


def test_images_trained_on_are_known_again_in_another_split(home: Path, tmp_path: Path) -> None:
    other, parquet = tmp_path / "other", tmp_path / "parquet"
    shutil.copytree(home / "photos" / "train", other / "test")
    files = sorted(other.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    parquet.mkdir()
    table = pa.table({"image": cells, "label": [file.parent.name for file in files]})
    pq.write_table(table, parquet / "test.parquet")
    for data in (other, parquet):
        name, images = evaluated(home / "entry", data)
        assert name == f"{data.name}/test (held out)"
        assert set(images.keys.tolist()) == trained_on(home / "run")[1]
    # Also where a later training was on others.
    more = image_folder(tmp_path / "more", each=30, splits=("train",), seed=1)
    finetune(new_run(tmp_path / "run", more), home / "entry")
    entry = exported(tmp_path / "run", tmp_path / "entry")
    found = json.loads(answer("evaluate", entry, "--data", other, "--seen").splitlines()[-1])
    assert (found["data"], found["images"]) == ("other/test (seen in training)", 90)


def test_too_small_an_inherited_share_is_refused_before_training(home: Path, tmp_path: Path) -> None:
    few = image_folder(tmp_path / "few", each=9, splits=("train",), seed=5)
    with pytest.raises(DataError, match=r"0\.3 .*--freeze"):
        finetune(new_run(tmp_path / "run", few, "data.validation=0.5"), home / "entry")
    assert not (tmp_path / "run" / "finetune" / CHECKPOINT).exists()
    for i, colour in enumerate(CLASSES):
        (tmp_path / "trained" / colour).mkdir(parents=True)
        for file in sorted((home / "photos" / "train" / colour).iterdir())[i : i + 3]:
            shutil.copy(file, tmp_path / "trained" / colour)
    with pytest.raises(DataError, match="--seen"):
        evaluated(home / "entry", tmp_path / "trained")


@pytest.mark.parametrize("begin", ["run/finetune/checkpoint.safetensors", "entry"])
def test_the_smallest_share_of_all_trainings_counts(begin: str, home: Path, tmp_path: Path) -> None:
    photos = home / "photos"
    run = new_run(tmp_path / "run", photos, "data.validation=0.5", "seed=5", "finetune.epochs=1")
    finetune(run, home / begin)
    facts = read_facts(run.finetuned)
    assert facts.held_out == 0.3
    assert [line.split(":")[0] for line in facts.history][:2] == ["pretrain", "finetune"]
    entry = exported(run.folder, tmp_path / "entry")
    assert read_entry(entry).prg.versions["1"].held_out == 0.3
    for target, data in ((run.folder, Data()), (entry, Data(source=str(photos)))):
        material = open_target(target, "finetune", tmp_path / target.name, data).material
        assert set(material.training()[1].keys.tolist()) == trained_on(home / "run")[1]


def test_what_may_have_been_seen_is_evaluated_on_when_asked_and_labelled(home: Path, tmp_path: Path) -> None:
    entry = shutil.copytree(home / "entry", tmp_path / "entry")
    config = entry / "config.pbtxt"
    config.write_text(config.read_text().replace('\\"held_out\\":0.3', '\\"held_out\\":null'))
    assert read_entry(entry).prg.versions["1"].held_out is None
    evaluate = ["evaluate", entry, "--data", home / "photos"]
    study = ["--study", "steps", "--out", tmp_path / "out"]
    for more in ([], ["--split", "train"], study):
        assert "--seen" in refusal(*evaluate, *more)
    answer(*evaluate, "--seen", "--write")
    [accuracy] = read_entry(entry).prg.versions["1"].accuracy
    assert (accuracy.data, accuracy.images) == ("photos/train (seen in training)", 90)
    answer(*evaluate, *study, "--seen")
    page = (tmp_path / "out" / "steps.md").read_text()
    assert "--seen" in page
    assert "- held out: not from training" in page


def test_a_head_fitted_to_all_images_is_evaluated_on_others_only(home: Path, tmp_path: Path) -> None:
    """They are taken whole though their split is called train: the keys show it. Else the name counts."""
    run, photos = tmp_path / "run", home / "photos"
    finetune(new_run(run, photos, *FREEZE), home / "entry")
    entry = exported(run, tmp_path / "entry")
    for target, data in ((run, None), (entry, photos)):
        with pytest.raises(DataError, match=r"photos.*--freeze.*--data"):
            evaluated(target, data)
    tests = image_folder(tmp_path / "tests", each=4, splits=("test",), seed=3)
    assert evaluated(entry, tests)[0] == "tests/test"
    other = image_folder(tmp_path / "other", each=4, splits=("train",), seed=3)
    for target in (run, entry, home / "entry"):
        for data in (other, other / "train"):  # of splits, or of classes alone
            name, images = evaluated(target, data)
            assert (name, len(images)) == (f"{data.name}/train (not trained on)", 12)
    shutil.copy(next((photos / "train" / "red").iterdir()), other / "train" / "red" / "known.png")
    with pytest.raises(DataError, match="--seen"):
        evaluated(entry, other)


def test_a_run_is_evaluated_on_a_folder_without_images_to_train_on(home: Path, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "other", each=4, splits=("test",), seed=3)
    assert evaluated(home / "run", other)[0] == "other/test"
    with pytest.raises(DataError, match=r"'train'.* test\b"):
        evaluated(home / "run", other, "train")
    labels = 'data.labels=["red", "green", "blue", "grey"]'  # names that its classes have already
    run = open_run(home / "run", None, [f"data.source={other}", labels])
    assert run.found["test"].classes == ("blue", "green", "red")


def test_training_on_another_split_than_train(home: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(home / "photos", tmp_path / "photos")
    image_folder(photos, each=20, splits=("dev",), seed=2)
    run = trained_run(tmp_path / "run", photos, "data.train=validation")
    for target, data in ((run, None), (exported(run, tmp_path / "entry"), photos)):
        name, images = evaluated(target, data, "dev")
        assert name == "photos/held-out"
        assert len(images) < 60
        name, images = evaluated(target, data, "train")
        assert (name, len(images)) == ("photos/train", 90)


def test_a_test_split_without_labels_is_skipped_unless_named(home: Path, tmp_path: Path) -> None:
    """As a competition hands it out."""
    photos = shutil.copytree(home / "photos", tmp_path / "photos")
    (photos / "test").mkdir()
    shutil.copy(photos / "train" / "red" / "0.png", photos / "test" / "0.png")
    for target in (home / "run", home / "entry"):
        assert evaluated(target, photos)[0] == "photos/held-out"
    with pytest.raises(DataError, match=r"data\.test"):
        finetune(new_run(tmp_path / "run", photos, "data.test=test"), home / "run" / "pretrain" / CHECKPOINT)


@pytest.mark.parametrize("train", [pretrain, finetune])
def test_other_images_are_another_run(train: Callable[[Run], None], home: Path, tmp_path: Path) -> None:
    folder, photos = (shutil.copytree(home / name, tmp_path / name) for name in ("run", "photos"))
    checkpoint = folder / train.__name__ / CHECKPOINT
    before = checkpoint.read_bytes()

    def go_on() -> None:
        try:
            train(open_run(folder, None, [f"data.source={photos}"]))
        finally:
            assert checkpoint.read_bytes() == before

    red = photos / "train" / "red"
    (red / "3.png").rename(red / "z.png")  # the same under another name
    go_on()
    training, _ = trained_on(home / "run")
    file = next(f for f in sorted(red.parent.glob("blue/*")) if key_of(f.read_bytes()) in training)
    moved = file.rename(red.parent / "green" / "moved.png")
    # Labels count where they are learned.
    with pytest.raises(CheckpointError, match=r"trained\.digest") if train is finetune else nullcontext():
        go_on()
    moved.rename(file)
    for name in ("0.png", "2.png"):  # as many, but others
        shutil.copy(red / "1.png", red / name)
    with pytest.raises(CheckpointError, match=r"trained\."):
        go_on()
