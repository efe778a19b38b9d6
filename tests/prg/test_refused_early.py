"""What stands in the way of a training or an evaluation is said before any time is spent on it."""

import json
import shutil
from pathlib import Path

import pytest
from workshop import image_folder, overrides, trained_run

from prg.checkpoint import read_facts
from prg.cli import main

CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos without a test split, and its entry."""
    folder = tmp_path_factory.mktemp("home")
    run = trained_run(folder / "run", image_folder(folder / "photos", splits=("train",)))
    assert main(["export", str(run), str(folder / "entry")]) == 0
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return ["--recipe", "images-32", "--data", str(folder), *overrides(*more)]


def test_what_to_begin_from_is_there_and_a_checkpoint(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, start = tmp_path / "run", home / "run" / "pretrain" / CHECKPOINT
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
    assert "no.safetensors: no such checkpoint; name one" in capsys.readouterr().err
    assert main([*begin, "--init", str(start)]) == 0
    assert main([*begin, "--init", str(nothing)]) == 1
    assert "no.safetensors: no such checkpoint; what was begun from it goes on" in capsys.readouterr().err
    assert main(["finetune", str(run)]) == 0


def test_one_class_is_none(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where --data names one class's folder instead of the folder above it."""
    wrong = tmp_path / "photos"
    shutil.copytree(home / "photos" / "train" / "red", wrong / "red")
    init = ["--init", str(home / "run" / "pretrain" / CHECKPOINT)]
    for more in ([], ["--dry-run"]):
        assert main(["finetune", str(tmp_path / "run"), *command(wrong), *init, *more]) == 1
        assert "all images to train on are of one class, 'red'" in capsys.readouterr().err


@pytest.mark.parametrize(("spoil", "said"), [("split", "no split 'extra'"), ("file", "1 of 13 files are no")])
def test_a_fine_tuning_that_could_not_be_evaluated_does_not_begin(
    spoil: str, said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shutil.copytree(home / "photos", tmp_path / "photos")
    more = []
    if spoil == "file":
        image_folder(photos, each=4, splits=("test",))
        (photos / "test" / "red" / "bad.png").write_bytes(b"no image")
    else:
        more = ["data.test=extra"]
    init = ["--init", str(home / "run" / "pretrain" / CHECKPOINT)]
    assert main(["finetune", str(tmp_path / "run"), *command(photos, *more), *init]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "images to train on" not in error
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_fine_tuning_says_what_it_trains_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = ["--init", str(home / "run" / "pretrain" / CHECKPOINT), "--set", "finetune.epochs=1"]
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos"), *init]) == 0
    trained = read_facts(tmp_path / "run" / "finetune" / CHECKPOINT).trained
    assert trained is not None
    counts = f"{trained.images} images to train on and {60 - trained.images} held out to choose by"
    assert f"{counts}; 3 classes: blue, green, red" in capsys.readouterr().err
    bare = image_folder(tmp_path / "bare", each=4, splits=("train",)) / "train"
    for colour in ("red", "green", "blue"):
        (bare / colour / "0.png").rename(bare / f"{colour}.png")
    assert main(["finetune", str(tmp_path / "other"), *command(bare), *init]) == 1
    assert "images to train on" not in (error := capsys.readouterr().err)
    assert (
        "no labels; fine-tuning needs one sub-folder of images a class, or a column of labels: 3 of its images"
        in error
    )


def test_too_few_images_to_hold_some_out(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = image_folder(tmp_path / "few", each=4, splits=("train",))
    assert main(["pretrain", str(tmp_path / "run"), *command(few)]) == 1
    assert "of 12 images; at least 10 are needed" in capsys.readouterr().err
    init = ["--init", str(home / "run" / "pretrain" / CHECKPOINT)]
    assert main(["finetune", str(tmp_path / "run"), *command(few), *init]) == 1
    assert "or fit a head alone by --freeze" in capsys.readouterr().err
    assert not (tmp_path / "run" / "recipe.json").exists()
    assert main(["finetune", str(tmp_path / "run"), *command(few), *init, "--freeze"]) == 0


@pytest.mark.parametrize(("name", "there"), [("nothing", "no such folder"), (".", "no run and no entry")])
def test_what_is_neither_run_nor_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, there: str
) -> None:
    for more in ([], ["--study", "steps", "--out", str(tmp_path / "out")]):
        assert main(["evaluate", str(tmp_path / name), *more]) == 1
        assert f"{there}; name the folder of a run" in capsys.readouterr().err


def test_names_that_the_recipe_gives_hold_for_every_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos")
    shutil.rmtree(photos / "test" / "green")
    names = 'data.labels=["sky", "grass", "rose"]'
    assert main(["reproduce", "images-32", str(tmp_path / "run"), *command(photos, names)[2:]]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 40
    assert read_facts(tmp_path / "run" / "finetune" / CHECKPOINT).classes == ("sky", "grass", "rose")


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
    init = ["--init", str(home / "run" / "pretrain" / CHECKPOINT)]
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos"), *init]) == 0
    assert main(["finetune", str(tmp_path / "run")]) == 0
    assert main(["finetune", str(tmp_path / "run"), *command(home / "photos", "finetune.lr=0.5")]) == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("class", "split 'test' has classes that training never saw: violet"),
        ("labels", "no labels; fine-tuning needs one sub-folder of images a class"),
        ("file", "1 of 61 files are no usable images"),
        ("split", "no split 'extra' (there are: test, train)"),
    ],
)
def test_a_reproduction_that_could_not_be_evaluated_does_not_begin(
    spoil: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos")
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
        assert main([*reproduce, "--skip-unreadable"]) == 0
        evaluate = ["evaluate", str(tmp_path / "run" / "entry"), "--data", str(photos)]
        assert main(evaluate) == 1
        assert "--skip-unreadable" in capsys.readouterr().err
        assert main([*evaluate, "--skip-unreadable"]) == 0
    else:
        assert main([*reproduce, "--dry-run"]) == 1
        assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    out = ["--out", str(tmp_path / "out" / "levels")]
    assert main(["evaluate", str(tmp_path / "no-run"), "--study", "levels", *out]) == 1
    assert str(tmp_path / "out") in capsys.readouterr().err
