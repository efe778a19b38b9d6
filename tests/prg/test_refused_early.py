"""What stands in the way of a training or an evaluation is said before any time is spent on it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from workshop import CHECKPOINT, answer, image_folder, new_run, overrides, refusal

from prg.checkpoint import read_facts
from prg.commands.train import FREEZE
from prg.errors import CheckpointError, DataError
from prg.reproduce import reproduce
from prg.training.finetune import finetune
from prg.training.pretrain import pretrain
from prg.training.run import open_run


@pytest.fixture
def init(home: Path) -> Path:
    return home / "run" / "pretrain" / CHECKPOINT


def test_what_to_begin_from_is_there_and_a_checkpoint(home: Path, init: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", home / "photos", *FREEZE)
    entry, nothing = home / "entry", tmp_path / "no.safetensors"
    for wrong, meant in (
        (home / "run", init),
        (home / "run" / "pretrain", init),
        (entry / "1" / "model.pt", entry),
        (entry / "1", entry),
        (home, entry),
    ):
        with pytest.raises(CheckpointError, match=rf"^{wrong}: .* {meant}( or |$)"):
            finetune(run, wrong)
    with pytest.raises(CheckpointError, match=rf"^{nothing}: "):
        finetune(run, nothing)
    finetune(run, init)
    with pytest.raises(CheckpointError, match=r"no\.safetensors.*without --init"):
        finetune(run, nothing)
    finetune(open_run(run.folder))  # what was begun from it is not needed any more
    with pytest.raises(CheckpointError, match=r"finetune\.lr"):
        finetune(open_run(run.folder, None, ["finetune.lr=0.5"]))


@pytest.mark.parametrize(
    ("spoil", "named"), [("class", "violet"), ("labels", "0.png"), ("file", "bad.png"), ("split", "'extra'")]
)
def test_what_could_not_be_evaluated_does_not_begin(
    spoil: str, named: str, init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos")
    changes = ["data.test=extra"] if spoil == "split" else []
    if spoil == "class":
        shutil.copytree(photos / "test" / "red", photos / "test" / "violet")
    elif spoil == "labels":
        (photos / "train" / "red" / "0.png").rename(photos / "train" / "0.png")
    elif spoil == "file":
        (photos / "test" / "red" / "bad.png").write_bytes(b"no image")
    run = new_run(tmp_path / "run", photos, *changes)
    for begin in (lambda: finetune(run, init), lambda: next(reproduce(run))):
        with pytest.raises(DataError, match=named):
            begin()
    assert "images to train on" not in capsys.readouterr().err
    assert {path.name for path in run.folder.glob("*")} <= {"data"}
    command = ["reproduce", "images-32", run.folder, "--data", photos, *overrides(*changes)]
    if spoil == "file":
        answer(*command, "--skip-unreadable")
        evaluate = ["evaluate", run.folder / "entry", "--data", photos]
        assert "--skip-unreadable" in refusal(*evaluate)
        answer(*evaluate, "--skip-unreadable")
    else:
        assert named in refusal(*command, "--dry-run")


def test_one_class_and_too_few_images_are_refused(init: Path, home: Path, tmp_path: Path) -> None:
    one, few, run = tmp_path / "one", tmp_path / "few", tmp_path / "run"
    # As where --data names one class's folder instead of the folder above it.
    shutil.copytree(home / "photos" / "train" / "red", one / "red")
    with pytest.raises(DataError, match="'red'"):
        finetune(new_run(run, one), init)
    image_folder(few, each=4, splits=("train",))
    with pytest.raises(DataError, match=r"\b12\b"):
        pretrain(new_run(run, few))
    with pytest.raises(DataError, match="--freeze"):
        finetune(new_run(run, few), init)
    assert not (run / "recipe.json").exists()
    finetune(new_run(run, few, *FREEZE), init)


def test_names_that_the_recipe_gives_hold_for_every_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos")
    shutil.rmtree(photos / "test" / "green")
    run = new_run(tmp_path / "run", photos, 'data.labels=["sky", "grass", "rose"]')
    *_, figures = reproduce(run)
    assert json.loads(figures)["images"] == 40
    facts = read_facts(run.finetuned)
    assert facts.classes == ("sky", "grass", "rose")
    images = facts.trained.images  # type: ignore[union-attr]
    numbers = images, 60 - images, 3, "sky, grass, rose"  # what it trains on is said
    assert re.search(r"\b.*\b".join(map(str, numbers)), capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_to_is_named_first(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    out = ["--out", tmp_path / "out" / "levels"]
    assert str(tmp_path / "out") in refusal("evaluate", tmp_path / "no-run", "--study", "levels", *out)
