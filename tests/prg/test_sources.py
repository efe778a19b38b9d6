"""Splits, classes and labels as folders and parquet have them; what is ambiguous is said, never guessed."""

import errno
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from entry.config import ImageSpec
from prg.errors import DataError
from prg.images.decoded import load_split
from prg.images.sets import Images, same_classes
from prg.images.splits import choose_split, splits
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
        *("train/@eaDir/1.png", "train/a/@eaDir/1.png/THUMB.jpg", "__MACOSX/train/a/1.png", "lost+found/1.png"),
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

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match="a/b"):
        patch.setattr(os, "scandir", denied)
        splits(str(folder))
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
    ],
)
def test_labels_that_are_none_are_named(labels: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        splits(str(table(tmp_path / "d" / "train.parquet", image=image_bytes(), label=labels)))


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
