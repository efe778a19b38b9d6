"""What a model is judged by: images it never saw, under the classes it was trained on, or an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from workshop import image_folder, overrides, trained_run

from prg.checkpoint import load_checkpoint, read_facts, save_checkpoint
from prg.cli import main
from prg.studies.target import open_target
from prg.training.data import deal


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos without a split to be judged by, and its entry."""
    folder = tmp_path_factory.mktemp("home")
    run = trained_run(folder / "run", image_folder(folder / "photos", each=12, splits=("train",)))
    assert main(["export", str(run), str(folder / "entry")]) == 0
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return ["--recipe", "images-32", "--data", str(folder), *overrides(*more)]


def test_images_that_were_added_are_not_judged_by_what_was_held_back(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(home / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 7
    grown = shutil.copytree(home / "photos", tmp_path / "photos")
    for i in range(4):
        shutil.copy(grown / "train" / "red" / f"{i}.png", grown / "train" / "red" / f"0{i}.png")
    assert main(["evaluate", str(home / "run"), "--data", str(grown)]) == 1
    assert "40 images, not those of which" in capsys.readouterr().err
    _, material = open_target(home / "run", "finetune", tmp_path / "scratch", str(grown))
    assert [len(part) for part in material.training()] == [32, 8]
    assert "was trained on other images than photos/train" in capsys.readouterr().err
    assert main(["evaluate", str(home / "run"), "--data", str(grown), "--split", "train"]) == 0
    assert "note: the model was trained on" not in capsys.readouterr().err
    assert main(["evaluate", str(home / "run"), "--split", "train"]) == 0
    assert "note: the model was trained on photos/train but for a share held back" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_as_many_images_but_others_are_not_gone_on_with(
    stage: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A moved file deals all of them anew: what was held back would be trained on, or judged by."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    other = shutil.copytree(home / "photos", tmp_path / "photos")
    (other / "train" / "red" / "3.png").rename(other / "train" / "red" / "z.png")
    if stage == "pretrain":
        shutil.rmtree(run / "finetune")
    assert main([stage, str(run), "--data", str(other)]) == 1
    assert "the images or their labels are others, though as many" in capsys.readouterr().err
    if stage == "finetune":
        assert main(["evaluate", str(run), "--data", str(other)]) == 1
        assert "36 images, not those of which" in capsys.readouterr().err
    for target, held_back in ((run, 7), (home / "entry", 4)):
        _, material = open_target(target, stage, tmp_path / target.name, str(other))
        assert len(material.training()[1]) == held_back
        assert "was trained on other images than photos/train, or on these in an" in capsys.readouterr().err


def test_a_run_from_before_images_were_digested_goes_on(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    for stage in ("finetune", "pretrain"):  # a fine-tuning names its pretraining's sum
        path = run / stage / "checkpoint.safetensors"
        saved = load_checkpoint(path, stage)
        del saved.facts["settings"]["digests"]
        save_checkpoint(path, saved)
        assert main([stage, str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0


def test_what_a_fine_tuning_before_records_began_from_is_known_of_its_pretraining(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(run / "finetune")
    assert main(["finetune", str(run), "--set", "seed=3", "--set", "finetune.epochs=1"]) == 0
    path = run / "finetune" / "checkpoint.safetensors"
    saved = load_checkpoint(path, "finetune")
    del saved.facts["init"]["seen"]
    save_checkpoint(path, saved)
    capsys.readouterr()
    main(["evaluate", str(run)])
    assert "held back different images" in capsys.readouterr().err


def test_labels_count_where_they_are_learned(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    other = shutil.copytree(home / "photos", tmp_path / "photos")
    (other / "train" / "blue" / "9.png").rename(other / "train" / "green" / "-.png")  # the same order
    assert main(["pretrain", str(run), "--data", str(other)]) == 0
    assert "done already: " in capsys.readouterr().out
    assert main(["finetune", str(run), "--data", str(other)]) == 1
    assert "the images or their labels are others" in capsys.readouterr().err


def test_an_entry_on_images_that_it_never_saw(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos", each=10, splits=("train",))
    _, material = open_target(home / "entry", "finetune", tmp_path / "scratch", str(photos))
    assert [len(part) for part in material.training()] == [27, 3]
    assert "note: entry was trained on other images than photos" in capsys.readouterr().err


@pytest.mark.parametrize("begin", ["checkpoint", "entry"])
def test_a_second_fine_tuning_holds_back_what_the_first_did(
    begin: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = home / "entry" if begin == "entry" else home / "run" / "finetune" / "checkpoint.safetensors"
    again = ["finetune", str(tmp_path / "run"), "--init", str(init), "--freeze"]
    for other in ("seed=1", "data.validation=0.3"):
        assert main([*again, *command(home / "photos", other)]) == 1
        assert "hold back the same: --set data.validation=0.2 --set seed=0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "recipe.json").exists()
    assert (
        main([*again, *command(home / "photos", "data.validation=0.1")]) == 0
    )  # a part of what was held back
    capsys.readouterr()
    other, third = tmp_path / "other", tmp_path / "third"
    fewer = image_folder(tmp_path / "photos", each=10, splits=("train",))
    assert main([*again[:1], str(other), *again[2:], *command(fewer, "seed=1")]) == 0
    assert "was fine-tuned on other images than these" in capsys.readouterr().err
    if begin == "entry":
        assert main(["export", str(other), str(tmp_path / "again")]) == 0
        init = tmp_path / "again"
    else:
        init = other / "finetune" / "checkpoint.safetensors"
    capsys.readouterr()
    onward = ["finetune", str(third), "--init", str(init), "--freeze", *command(home / "photos", "seed=1")]
    assert main(onward) == 1
    assert "hold back the same: --set data.validation=0.2 --set seed=0" in capsys.readouterr().err


def test_what_to_begin_from_is_there_and_a_checkpoint(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, start = tmp_path / "run", home / "run" / "pretrain" / "checkpoint.safetensors"
    begin = ["finetune", str(run), "--freeze", *command(home / "photos")]
    for init, said in (
        (home / "run", f"a folder; name a checkpoint in it: {start} or"),
        (home / "run" / "pretrain", f"a folder; name a checkpoint in it: {start}"),
        (home / "entry" / "1" / "model.pt", f"a part of an entry; name the entry's folder: {home / 'entry'}"),
        (home / "entry" / "1", f"a part of an entry; name the entry's folder: {home / 'entry'}"),
        (home, f"a folder of entries; name one: {home / 'entry'}"),
    ):
        assert main([*begin, "--init", str(init)]) == 1
        assert said in capsys.readouterr().err
    nothing = tmp_path / "no.safetensors"
    assert main([*begin, "--init", str(nothing)]) == 1
    assert "no.safetensors: no such checkpoint; make it" in capsys.readouterr().err
    assert main([*begin, "--init", str(start)]) == 0
    assert main([*begin, "--init", str(nothing)]) == 1
    assert "no.safetensors: no such checkpoint; what was begun from it goes on" in capsys.readouterr().err


def test_one_class_is_none(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where --data names one class's folder instead of the folder above it."""
    wrong = tmp_path / "photos"
    shutil.copytree(home / "photos" / "train" / "red", wrong / "red")
    init = ["--init", str(home / "run" / "pretrain" / "checkpoint.safetensors")]
    for more in ([], ["--dry-run"]):
        assert main(["finetune", str(tmp_path / "run"), *command(wrong), *init, *more]) == 1
        assert "all images to train on are of one class, 'red'" in capsys.readouterr().err


@pytest.mark.parametrize(("spoil", "said"), [("split", "no split 'extra'"), ("file", "1 of 13 files are no")])
def test_a_fine_tuning_says_before_it_trains_what_it_could_not_be_judged_by(
    spoil: str, said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shutil.copytree(home / "photos", tmp_path / "photos")
    more = []
    if spoil == "file":
        image_folder(photos, each=4, splits=("test",))
        (photos / "test" / "red" / "bad.png").write_bytes(b"no image")
    else:
        more = ["data.test=extra"]
    init = ["--init", str(home / "run" / "pretrain" / "checkpoint.safetensors")]
    assert main(["finetune", str(tmp_path / "run"), *command(photos, *more), *init]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "images to train on" not in error
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_test_split_without_labels_is_none_to_be_judged_by(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a competition hands it out."""
    photos = shutil.copytree(home / "photos", tmp_path / "photos")
    (photos / "test").mkdir()
    shutil.copy(photos / "train" / "red" / "0.png", photos / "test" / "0.png")
    assert main(["evaluate", str(home / "run"), "--data", str(photos)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "photos/held-out"
    assert main(["evaluate", str(home / "entry"), "--data", str(photos)]) == 1
    assert (
        "no split test or validation to judge by (there are: test (no labels), train)"
        in capsys.readouterr().err
    )
    init = ["--init", str(home / "run" / "pretrain" / "checkpoint.safetensors")]
    named = ["finetune", str(tmp_path / "run"), *command(photos, "data.test=test"), *init]
    for more in ([], ["--dry-run"]):
        assert main([*named, *more]) == 1
        assert "data.test = 'test' has no labels" in capsys.readouterr().err


def test_a_fine_tuning_says_what_it_trains_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = ["--init", str(home / "run" / "pretrain" / "checkpoint.safetensors"), "--set", "finetune.epochs=1"]
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos"), *init]) == 0
    told = "29 images to train on and 7 held back to choose by; 3 classes: blue, green, red"
    assert told in capsys.readouterr().err
    bare = image_folder(tmp_path / "bare", each=4, splits=("train",)) / "train"
    for colour in ("red", "green", "blue"):
        (bare / colour / "0.png").rename(bare / f"{colour}.png")
    assert main(["finetune", str(tmp_path / "other"), *command(bare), *init]) == 1
    assert "images to train on" not in (error := capsys.readouterr().err)
    assert "no labels; fine-tuning needs one sub-folder of images a class: 3 of its images" in error


@pytest.mark.parametrize(("name", "there"), [("nothing", "no such folder"), (".", "no run and no entry")])
def test_what_is_neither_run_nor_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, there: str
) -> None:
    for more in ([], ["--study", "steps", "--out", str(tmp_path / "out")]):
        assert main(["evaluate", str(tmp_path / name), *more]) == 1
        assert f"{there}; name the folder of a run" in capsys.readouterr().err


def test_each_stage_is_judged_by_what_was_held_back_from_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(run / "finetune")
    again = ["finetune", str(run), "--set", "data.validation=0.5", "--set", "finetune.epochs=1"]
    assert main(again) == 0
    parts = [
        [len(part) for part in open_target(run, stage, tmp_path / stage)[1].training()]
        for stage in ("pretrain", "finetune")
    ]
    assert parts == [[29, 7], [29, 7]]  # of the 18 held back from fine-tuning, pretraining saw 11
    shutil.rmtree(run / "finetune")
    assert main([*again, "--set", "seed=3"]) == 0
    assert (
        "was pretrained on some of the images held back now, without their labels" in capsys.readouterr().err
    )
    assert len(open_target(run, "pretrain", tmp_path / "again")[1].training()[1]) == 7
    assert capsys.readouterr().err.count("note:") == 0
    assert main(["evaluate", str(run)]) == 0
    common = len(np.intersect1d(deal(36, 0.2, 0)[1], deal(36, 0.5, 3)[1]))
    assert 0 < common < 7
    result = capsys.readouterr()
    assert json.loads(result.out.splitlines()[-1])["images"] == common
    assert f"held back different images of photos/train; judged by the {common} in common" in result.err
    shutil.rmtree(run / "finetune")
    seed = next(s for s in range(99) if not len(np.intersect1d(deal(36, 0.2, 0)[1], deal(36, 0.1, s)[1])))
    again[3] = "data.validation=0.1"
    assert main([*again, "--set", f"seed={seed}"]) == 0
    assert main(["evaluate", str(run)]) == 1
    assert "and none in common" in capsys.readouterr().err


def test_images_of_two_folders(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pretrained on many without labels, fine-tuned on some: what pretraining may have seen is said."""
    run, more = tmp_path / "run", image_folder(tmp_path / "more", each=20, splits=("train",))
    assert main(["pretrain", str(run), *command(more)]) == 0
    assert main(["finetune", str(run), "--data", str(home / "photos")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert "was also trained on other images than" in capsys.readouterr().err
    _, material = open_target(run, "pretrain", tmp_path / "scratch", str(more))
    assert [len(part) for part in material.training()] == [48, 12]
    assert capsys.readouterr().err.count("note:") == 0


def test_training_on_another_split_than_train(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, run = shutil.copytree(home / "photos", tmp_path / "photos"), tmp_path / "run"
    image_folder(photos, each=4, splits=("unlabelled",))
    (photos / "unlabelled").rename(photos / "dev")
    assert main(["pretrain", str(run), *command(photos, "data.train=validation")]) == 0
    facts = read_facts(run / "pretrain" / "checkpoint.safetensors")
    assert facts["settings"]["images"] == 10
    assert main(["finetune", str(run)]) == 0
    for split, images in (([], 2), (["--split", "train"], 36), (["--split", "dev"], 12)):
        capsys.readouterr()
        assert main(["evaluate", str(run), *split]) == 0
        result = capsys.readouterr()
        assert json.loads(result.out.splitlines()[-1])["images"] == images
        assert ("was trained on photos/dev but for a share" in result.err) == (images == 12)
    assert main(["export", str(run), str(tmp_path / "entry")]) == 0
    written = ["evaluate", str(tmp_path / "entry"), "--data", str(photos), "--write"]
    assert main(written) == 1
    assert "the model was trained on these images; --write is for others" in capsys.readouterr().err
    assert main([*written, "--split", "train"]) == 0


def test_an_entry_is_judged_by_what_both_halves_held_back(home: Path, tmp_path: Path) -> None:
    run, entry = tmp_path / "run", tmp_path / "entry"
    init = ["--init", str(home / "run" / "pretrain" / "checkpoint.safetensors")]
    other = command(home / "photos", "data.validation=0.3", "seed=5", "finetune.epochs=1")
    assert main(["finetune", str(run), *other, *init]) == 0
    assert main(["export", str(run), str(entry)]) == 0
    common = np.intersect1d(deal(36, 0.2, 0)[1], deal(36, 0.3, 5)[1])
    for directory, count in ((entry, len(common)), (home / "entry", 7)):
        _, material = open_target(directory, "finetune", tmp_path / directory.name, str(home / "photos"))
        assert [len(part) for part in material.training()] == [36 - count, count]


def test_names_that_the_recipe_gives_hold_for_every_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos", each=8)
    shutil.rmtree(photos / "test" / "green")
    names = 'data.labels=["sky", "grass", "rose"]'
    assert main(["reproduce", "images-32", str(tmp_path / "run"), *command(photos, names)[2:]]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 16
    assert read_facts(tmp_path / "run" / "finetune" / "checkpoint.safetensors")["classes"] == [
        *("sky", "grass", "rose")
    ]


def test_a_fine_tuning_does_not_go_on_with_other_classes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    other = shutil.copytree(home / "photos", tmp_path / "photos")
    (other / "train" / "red").rename(other / "train" / "pink")
    assert main(["finetune", str(run), "--data", str(other)]) == 1
    assert "classes was ['blue', 'green', 'red'], is ['blue', 'green', 'pink']" in capsys.readouterr().err
    assert json.loads((run / "recipe.json").read_text())["data"]["source"] == str(home / "photos")


def test_a_fine_tuning_goes_on_without_what_it_began_from(home: Path, tmp_path: Path) -> None:
    init = ["--init", str(home / "run" / "pretrain" / "checkpoint.safetensors")]
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos"), *init]) == 0
    assert main(["finetune", str(tmp_path / "run")]) == 0
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos", "finetune.lr=0.5")]) == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("class", "split 'test' has classes that training never saw: violet"),
        ("labels", "no labels; fine-tuning needs one sub-folder of images a class"),
        ("file", "1 of 25 files are no usable images"),
        ("split", "no split 'extra' (there are: train, test)"),
    ],
)
def test_a_reproduction_says_before_it_trains_what_it_could_not_judge_by(
    spoil: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos", each=8)
    more = []
    if spoil == "class":
        shutil.copytree(photos / "test" / "red", photos / "test" / "violet")
    elif spoil == "labels":
        (photos / "train" / "red" / "0.png").rename(photos / "train" / "0.png")
    elif spoil == "file":
        (photos / "test" / "red" / "bad.png").write_bytes(b"no image")
    else:
        more = ["data.test=extra"]
    reproduce = ["reproduce", "images-32", str(tmp_path / "run"), *command(photos, *more)[2:]]
    assert main(reproduce) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "pretrain").exists()
    if spoil == "file":
        assert main(["evaluate", str(tmp_path / "none"), "--data", str(photos)]) == 1
        capsys.readouterr()
        assert main([*reproduce, "--skip-unreadable"]) == 0
        evaluate = ["evaluate", str(tmp_path / "run" / "entry"), "--data", str(photos)]
        assert main(evaluate) == 1
        assert "--skip-unreadable" in capsys.readouterr().err
        assert main([*evaluate, "--skip-unreadable"]) == 0
    else:
        assert main([*reproduce, "--dry-run"]) == 1
        assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named_first(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    out = ["--out", str(tmp_path / "out" / "levels")]
    assert main(["evaluate", str(tmp_path / "no-run"), "--study", "levels", *out]) == 1
    assert str(tmp_path / "out") in capsys.readouterr().err
