"""Splits, classes and labels as folders and parquet have them; what is ambiguous is said, never guessed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from entry.config import ImageSpec
from prg.cli import parser
from prg.commands import options
from prg.errors import DataError
from prg.images.decoded import load_split
from prg.images.parquet import cell_bytes
from prg.images.sets import Images, check_classes_were_seen, numbers_of, same_classes
from prg.images.splits import choose_split, splits
from prg.recipe import load_recipe
from prg.training.run import Run
from tests.tiny import png

SPEC = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)


def pictures(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png())
    return folder


def table(path: Path, **columns: Any) -> Path:
    """A parquet without Hugging Face's schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path.parent


def loaded(folder: Path, cache: Path, split: str = "train") -> Images:
    return load_split(splits(str(folder))[split], SPEC, cache)


def test_folders_of_splits_by_any_of_their_names(tmp_path: Path) -> None:
    folder = pictures(
        tmp_path / "d", "Training/a/1.png", "val/a/1.png", "testing/a/1.png", "notes/read.txt", "classes.tsv"
    )
    assert set(splits(str(folder))) == {"train", "validation", "test"}
    found = splits(str(folder))
    assert choose_split(found, "valid", "d") == "validation"
    with pytest.raises(DataError, match="no split 'extra' .there are: "):
        choose_split(found, "extra", "d")


def test_a_class_named_like_a_split_is_asked_about(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", "train/1.png", "bus/1.png", "car/1.png")
    with pytest.raises(DataError, match="train is the name of a split, but there are images in bus"):
        splits(str(folder))
    with pytest.raises(DataError, match="several folders are its validation split"):
        splits(str(pictures(tmp_path / "e", "val/a/1.png", "valid/a/1.png")))


def test_a_file_named_like_a_split_is_an_image_as_any(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", "a/img_test_1.png", "a/2.png", "b/validation.png")
    [(name, source)] = splits(str(folder)).items()
    assert (name, source.count, source.classes) == ("train", 3, ("a", "b"))


def test_what_is_hidden_is_no_image(tmp_path: Path) -> None:
    """As file managers leave beside photos."""
    folder = pictures(
        *(tmp_path / "d", "train/a/1.png", "train/a/._1.png", "train/.cache/1.png", ".small/1.png"),
        *(
            "train/@eaDir/1.png",
            "train/a/@eaDir/1.png/THUMB.jpg",
            "__MACOSX/train/a/1.png",
            "lost+found/1.png",
        ),
        *("$RECYCLE.BIN/1.png", "System Volume Information/1.png", "train/.ipynb_checkpoints/1.png"),
    )
    (folder / "train" / ".cache" / "link").symlink_to(tmp_path)
    images = loaded(folder, tmp_path / "cache")
    assert (len(images), images.classes) == (1, ("a",))


def test_what_can_not_be_read_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "d", "a/1.png", "a/b/1.png", "c/1.png")
    scandir = os.scandir

    def denied(path: Path) -> Any:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="a/b"):
        splits(str(folder))
    monkeypatch.undo()
    (folder / "c" / "loop").symlink_to("loop")  # a link of which nobody can say whether it leads to a folder
    with pytest.raises(OSError, match="c/loop"):
        splits(str(folder))


def test_a_class_is_the_folder_in_the_split(tmp_path: Path) -> None:
    """As in Tiny-ImageNet: train/n01443537/images/….JPEG."""
    folder = pictures(tmp_path / "d", "train/n1/images/1.JPEG", "train/n2/images/1.JPEG", "train/n2/2.JPEG")
    images = loaded(folder, tmp_path / "cache")
    assert images.classes == ("n1", "n2")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]


def test_one_class_alone_is_one(tmp_path: Path) -> None:
    assert loaded(pictures(tmp_path / "d", "test/cat/1.png"), tmp_path / "cache", "test").classes == ("cat",)


def test_images_beside_folders_have_no_labels(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", "a/1.png", "2.png")
    assert loaded(folder, tmp_path / "cache").labels is None
    assert (
        splits(str(folder))["train"].why_unlabelled == "1 of its images, such as 2.png, are in no sub-folder"
    )
    assert not splits(str(pictures(tmp_path / "e", "1.png", "2.png")))["train"].why_unlabelled


def test_two_spellings_of_a_name_are_one_class(tmp_path: Path) -> None:
    """A Mac writes ä as an a and its dots."""
    composed, apart = (normalize(form, "Bär") for form in ("NFC", "NFD"))
    paths = f"train/{composed}/1.png", f"train/{apart}/2.png", f"test/{apart}/3.png", "train/Wolf/1.png"
    found = splits(str(pictures(tmp_path / "d", *paths)))
    assert found["train"].classes == (composed, "Wolf")
    for trained in ((composed, "Wolf"), (apart, "Wolf")):
        check_classes_were_seen(trained, {0, 1}, {"test": found["test"]})
        assert numbers_of(found["train"].classes, trained) == [0, 1]
    parquet = table(
        tmp_path / "p" / "train.parquet", image=image_bytes(), label=[composed, apart, "Wolf", apart]
    )
    images = loaded(parquet, tmp_path / "cache")
    assert images.classes == (composed, "Wolf")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 0]


def test_splits_below_the_classes_are_no_photos_of_them(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", "cats/train/1.png", "cats/test/1.png", "dogs/train/1.png")
    with pytest.raises(DataError, match="below the classes, as cats/test; .* as test/cats"):
        splits(str(folder))
    (folder / "dogs" / "1.png").write_bytes(png())  # so train is only what a part of the cats does
    assert splits(str(folder))["train"].classes == ("cats", "dogs")


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail(name))
    with pytest.raises(DataError, match="no-photos/: no such folder"):
        splits("no-photos/")


def test_numbered_folders_are_matched_by_number_not_by_place(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", *(f"{i}/1.png" for i in range(12)))
    images = loaded(folder, tmp_path / "cache")
    assert images.classes[2] == "10"  # as names are sorted
    for trained in (tuple(str(i) for i in range(12)), tuple("abcdefghijkl")):
        assert images.labels is not None
        found = same_classes(images, trained, "d").labels
        assert found is not None
        assert [images.classes[i] for i in images.labels] == [str(i) for i in found]
    seven = Images(images.pixels[:3], np.arange(3), ("7", "8", "9"), images.keys[:3])
    with pytest.raises(DataError, match="never saw: 7, 8, 9"):
        same_classes(seven, ("a", "b", "c"), "d")


def image_bytes() -> list[dict[str, Any]]:
    return [{"bytes": png((i * 60, 0, 0)), "path": None} for i in range(4)]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([0, 1, 2, 0], ("0", "1", "2"), [0, 1, 2, 0]),
        (["dog", "cat", "dog", "ant"], ("ant", "cat", "dog"), [2, 1, 2, 0]),
        ([-1, -1, -1, -1], (), None),
        ([None, None, None, None], (), None),
    ],
)
def test_labels_of_parquet(
    labels: list[Any], classes: tuple[str, ...], numbers: list[int] | None, tmp_path: Path
) -> None:
    images = loaded(
        table(tmp_path / "d" / "train.parquet", image=image_bytes(), label=labels), tmp_path / "cache"
    )
    assert images.classes == classes
    assert (None if images.labels is None else images.labels.tolist()) == numbers


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, -1, 0], "some images have no label"),
        ([0.5, 1.0, 2.0, 0.0], "whole numbers or names are needed"),
        ([1_700_000_000, 1, 2, 3], "a label 1700000000; classes are numbered from 0 on, or named"),
    ],
)
def test_labels_that_are_none_are_named(labels: list[Any], said: str, tmp_path: Path) -> None:
    folder = table(tmp_path / "d" / "train.parquet", image=image_bytes(), label=labels)
    with pytest.raises(DataError, match=said):
        splits(str(folder), label_column="label")


def described(path: Path, features: dict[str, Any], **columns: Any) -> Path:
    """A parquet whose metadata says what its columns are, as `datasets` writes it."""
    written = json.dumps({"info": {"features": features}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata({b"huggingface": written}), path)
    return path.parent


IMAGE = {"_type": "Image"}
MASKS = [{"bytes": png((9, 9, 9)), "path": None}] * 4


def test_the_metadata_says_which_column_is_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever bytes lie before it, such as a digest, and whichever columns are named like labels."""
    columns = {"digest": [b"0123"] * 4, "y": [7, 7, 7, 7], "image": image_bytes(), "kind": [1, 0, 1, 0]}
    features = {"image": IMAGE, "kind": {"_type": "ClassLabel", "names": ["a", "b"]}, "gone": IMAGE}
    images = loaded(described(tmp_path / "d" / "train.parquet", features, **columns), tmp_path / "cache")
    assert images.classes == ("a", "b")
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert images.pixels[:, 0].mean((1, 2)).tolist() == [0, 60, 120, 180]
    said = "train: images from the column 'image', labels from 'kind'\n"
    assert capsys.readouterr().err.count(said) == 1
    plain = table(tmp_path / "e" / "train.parquet", **{k: columns[k] for k in ("digest", "image", "kind")})
    assert len(loaded(plain, tmp_path / "cache")) == 4  # a struct with bytes goes before bytes
    assert "'image', no column of labels" in capsys.readouterr().err


def test_several_columns_are_asked_about_and_one_is_named(tmp_path: Path) -> None:
    labels = {"_type": "ClassLabel", "names": ["a", "b"]}
    columns = {"coarse": [0, 0, 0, 1], "fine": [0, 1, 1, 0], "mask": MASKS, "image": image_bytes()}
    features = {"coarse": labels, "fine": labels, "mask": IMAGE, "image": IMAGE}
    folder = str(described(tmp_path / "d" / "train.parquet", features, **columns))
    with pytest.raises(DataError, match="images: mask, image; name one with --image-column"):
        splits(folder)
    with pytest.raises(DataError, match="labels: coarse, fine; name one with --label-column"):
        splits(folder, image_column="image")
    for image, label, reds, numbers in (
        ("mask", "fine", [9] * 4, [0, 1, 1, 0]),
        ("image", "coarse", [0, 60, 120, 180], [0, 0, 0, 1]),
    ):  # the decoded images of one column are not those of the other
        source = splits(folder, image_column=image, label_column=label)["train"]
        images = load_split(source, SPEC, tmp_path / "cache")
        assert images.pixels[:, 0].mean((1, 2)).tolist() == reds
        assert images.labels is not None
        assert images.labels.tolist() == numbers
    for option, named in (("image_column", "--image-column"), ("label_column", "--label-column")):
        with pytest.raises(DataError, match=f"no column 'none'.*{named}: coarse, fine, mask, image"):
            splits(folder, **{"image_column": "image", option: "none"})
    with pytest.raises(DataError, match="the column 'fine' is of int64, and images are bytes"):
        splits(folder, image_column="fine", label_column="fine")
    plain = str(table(tmp_path / "e" / "train.parquet", a=[png()], b=[png()], labels=["x"], Class=["y"]))
    with pytest.raises(DataError, match="several columns may be the images: a, b"):
        splits(plain)
    with pytest.raises(DataError, match="several columns may be the labels: labels, Class"):
        splits(plain, image_column="b")


@pytest.mark.parametrize(
    ("name", "labels"), [("labels", [0, 1, 0, 1]), ("Category", ["0", "1", "0", "1"]), ("label", [0.5] * 4)]
)
def test_a_column_of_labels_is_known_by_its_name_and_kind(
    name: str, labels: list[Any], tmp_path: Path
) -> None:
    folder = table(
        tmp_path / "d" / "train.parquet", image=image_bytes(), **{name: labels}, caption=list("abcd")
    )
    images = loaded(folder, tmp_path / "cache")
    if labels[0] != 0.5:
        assert images.classes == ("0", "1")
        return
    said = "no labels: no column of labels is known; name it with --label-column, of image, label, caption"
    with pytest.raises(DataError, match=said):
        same_classes(images, ("0", "1"), "d")
    assert splits(str(folder), label_column="caption")["train"].classes == tuple("abcd")


def test_cells_that_only_name_a_file(tmp_path: Path) -> None:
    folder, other = pictures(tmp_path / "d", "img/0.png"), pictures(tmp_path / "other", "1.png")
    cells = [{"bytes": None, "path": path} for path in ("img/0.png", str(other / "1.png"))]
    source = splits(str(table(folder / "data.parquet", picture=cells)))["data"]
    assert [content for _, content, _ in source.rows()] == [png(), png()]
    (other / "1.png").unlink()
    said = f"row 1, column 'picture': holds no bytes, but the path {other}/1.png, which can't be read"
    with pytest.raises(DataError, match=f"data.parquet, {said}"):
        load_split(source, SPEC, tmp_path / "cache", skip_unreadable=True)
    for empty in (None, {"bytes": None, "path": None}):
        assert cell_bytes(empty, folder, "here") == b""
    with pytest.raises(DataError, match="here: holds no bytes, but the path a"):
        cell_bytes({"bytes": None, "path": "a"}, None, "here")


def test_columns_are_found_without_what_trains() -> None:
    """For `prg embed`, which needs neither torch nor datasets."""
    code = "import sys, prg.images.parquet; sys.exit(len({'torch', 'datasets', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_of_a_split_have_the_same_columns(tmp_path: Path) -> None:
    table(tmp_path / "d" / "train-0.parquet", image=[png()], label=["a"])
    table(tmp_path / "d" / "train-1.parquet", image=[png()], class_=["a"])
    with pytest.raises(DataError, match=r"train-1.parquet: no column 'label', which other files"):
        splits(str(tmp_path / "d"))


def test_a_column_that_one_split_lacks_is_no_error(tmp_path: Path) -> None:
    table(tmp_path / "d" / "train.parquet", image=[png()] * 2, kind=["a", "b"])
    table(tmp_path / "d" / "test.parquet", image=[png()])  # a competition's
    found = splits(str(tmp_path / "d"), label_column="kind")
    assert {name: source.classes for name, source in found.items()} == {"train": ("a", "b"), "test": ()}


def test_the_columns_are_options_of_every_command_with_data(tmp_path: Path) -> None:
    run = ["run", "--recipe", "images-32"]
    given = ["--data", str(tmp_path), "--image-column", "photo", "--label-column", "kind"]
    for command in (
        *(["pretrain", *run], ["finetune", *run], ["reproduce", "images-32", "run"], ["evaluate", "entry"]),
        *(
            ["import", "diffusers", "net", *run],
            ["import", "official", "net", *run],
            ["export", "run", "entry"],
        ),
    ):
        changed = options.images(parser().parse_args([*command, *given]))
        assert changed == {"source": str(tmp_path), "image_column": "photo", "label_column": "kind"}
    table(
        tmp_path / "train.parquet",
        photo=[png((i, 0, 0)) for i in range(4)],
        kind=list("abab"),
        other=[png()] * 4,
    )
    recipe = load_recipe("images-32", options.overrides(parser().parse_args(["pretrain", *run, *given])))
    source = Run(tmp_path / "run", recipe).sources[1]["train"]
    assert source.classes == ("a", "b")
    assert [content for _, content, _ in source.rows()] == [png((i, 0, 0)) for i in range(4)]


def test_hidden_labels_of_named_classes_are_none(tmp_path: Path) -> None:
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"img": [Image.new("RGB", (16, 16))] * 2, "fine_label": [-1, -1]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "d" / "test.parquet"))
    rows["fine_label"] = [1, 0]
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "d" / "train.parquet"))
    hidden = loaded(tmp_path / "d", tmp_path / "cache", "test")
    with pytest.raises(DataError, match="no labels"):
        same_classes(hidden, ("a", "b"), "test")
    named = loaded(tmp_path / "d", tmp_path / "cache")
    assert named.classes == ("a", "b")
    assert named.labels is not None
    assert named.labels.tolist() == [1, 0]


def test_parquet_in_folders_of_splits(tmp_path: Path) -> None:
    """As the hub's own conversions lie: a folder a configuration, in it one a split."""
    for split in ("train", "test"):
        for part in ("0000.parquet", "0001.parquet"):
            table(tmp_path / "d" / "plain" / split / part, image=[png()], label=["a"])
    table(tmp_path / "d" / ".cache" / "old.parquet", image=[png()], label=["a"])
    for folder in (tmp_path / "d", tmp_path / "d" / "plain"):
        found = splits(str(folder))
        assert {name: source.count for name, source in found.items()} == {"train": 2, "test": 2}


def test_two_configurations_are_not_mixed(tmp_path: Path) -> None:
    for name in ("fine", "coarse"):
        table(tmp_path / "d" / name / "train-00000-of-00001.parquet", image=[png()], label=[name])
    with pytest.raises(DataError, match="split 'train' lies in .*coarse and in .*fine; name one of these"):
        splits(str(tmp_path / "d"))
    assert splits(str(tmp_path / "d" / "fine"))["train"].classes == ("fine",)


def test_images_beside_parquet_are_asked_about(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", "train/a/1.png", "banner.png")
    table(folder / "test.parquet", image=[png()], label=["a"])
    with pytest.raises(
        DataError, match="images, such as train/a/1.png, beside parquet, such as test.parquet"
    ):
        splits(str(folder))


def test_images_as_plain_bytes(tmp_path: Path) -> None:
    folder = table(tmp_path / "d" / "train.parquet", picture=[png((200, 0, 0)), png((0, 200, 0))])
    images = loaded(folder, tmp_path / "cache")
    assert images.labels is None
    assert images.pixels.mean((2, 3)).argmax(1).tolist() == [0, 1]


def test_parquet_without_rows(tmp_path: Path) -> None:
    empty = pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    with pytest.raises(DataError, match="no images found"):
        splits(str(table(tmp_path / "d" / "train.parquet", image=empty, label=pa.array([], pa.int64()))))


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [Image.new("RGB", (16, 16), (i * 90, 0, 0)) for i in range(2)]}
    given = {
        "train": datasets.Dataset.from_dict(rows | {"label": [1, 0]}, features),
        "test": datasets.Dataset.from_dict(rows | {"label": [-1, -1]}, features),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(given))
    found = splits("someone/something")
    images = load_split(found["train"], SPEC, tmp_path / "cache")
    assert images.classes == ("a", "b")
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0]
    assert images.pixels[:, 0].mean((1, 2)).tolist() == [0, 90]
    assert found["test"].classes == ()


def test_files_of_other_endings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "d", "a/1.png", "b/1.png")
    (folder / "c").mkdir()
    for name in ("c/1.heic", "c/2.HEIC", "a/notes.txt", "b/.DS_Store", "readme"):
        (folder / name).write_bytes(b"")
    assert loaded(folder, tmp_path / "cache").classes == ("a", "b")
    said = capsys.readouterr().err
    assert "4 files in" in said
    assert "because of their ending: .heic (2), .txt (1), none (1); no images at all in c (of " in said
    loaded(pictures(tmp_path / "plain", "a/1.png"), tmp_path / "cache")
    assert "because of their ending" not in capsys.readouterr().err


def test_a_class_without_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "d", "train/a/1.png", "train/b/1.png")
    for name in ("train/c/deeper", "test/a"):
        (folder / name).mkdir(parents=True)
    assert loaded(folder, tmp_path / "cache").classes == ("a", "b")
    said = capsys.readouterr().err
    assert f"no images at all in c (of {folder / 'train'})" in said
    assert "no images in the split test, which is left out" in said
