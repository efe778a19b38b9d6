"""Images from folders and parquet, and what is wrong with them said at once."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from workshop import CLASSES, image_folder, largest_file, overrides

from entry.config import ImageSpec
from prg.cli import main
from prg.errors import DataError
from prg.images.decoded import load_split
from prg.images.held_out import key_of
from prg.images.sets import Images, same_classes
from prg.images.splits import splits

SPEC = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_an_image_folder(tmp_path: Path) -> None:
    found = splits(str(image_folder(tmp_path / "images", each=3)))
    assert found.keys() == {"train", "test"}
    images = load_split(found["train"], SPEC, tmp_path / "cache")
    assert images.pixels.shape == (9, 3, 16, 16)
    assert set(images.classes) == set(CLASSES)
    for pixels, label in zip(images.pixels, images.labels, strict=True):  # type: ignore[arg-type]
        assert images.classes[label] == ("red", "green", "blue")[pixels.mean((1, 2)).argmax()]


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", each=3) / "train" / "red"
    [(name, split)] = splits(str(folder)).items()
    assert name == "train"
    assert load_split(split, SPEC, tmp_path / "cache").labels is None


@pytest.mark.parametrize("named", [True, False])
def test_parquet_as_datasets_writes_it(tmp_path: Path, named: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    label = datasets.ClassLabel(names=["a", "b"]) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [0, 1, 0, 1, 1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    found = splits(str(tmp_path))
    images = load_split(found["train"], SPEC, tmp_path / "cache")
    assert np.array_equal(images.pixels, pixels.transpose(0, 3, 1, 2))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0, 1, 1, 0]
    assert images.classes == (("a", "b") if named else ("0", "1"))


def test_decoded_images_are_kept(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", each=2, splits=("train",))
    load_split(splits(str(folder))["train"], SPEC, tmp_path / "cache")
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    load_split(splits(str(folder))["train"], SPEC, tmp_path / "cache")
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()} == kept
    next((tmp_path / "cache").glob("*-pixels.npy")).unlink()  # as somebody who needed the room
    assert len(load_split(splits(str(folder))["train"], SPEC, tmp_path / "cache")) == 6
    other = SPEC.model_copy(update={"size": 8, "resize": 8})
    assert load_split(splits(str(folder))["train"], other, tmp_path / "cache").pixels.shape[2:] == (8, 8)


def test_bad_files_are_named_and_nothing_is_kept(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", each=2, splits=("train",))
    (folder / "train" / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 7 files.*remove them, .*:\n.*broken\.png"):
        load_split(splits(str(folder))["train"], SPEC, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("source", ["/does/not/exist", "./neither"])
def test_a_missing_folder(source: str) -> None:
    with pytest.raises(DataError, match="no such folder"):
        splits(source)


def test_a_folder_that_is_a_link_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", each=2, splits=("train",))
    other = image_folder(tmp_path / "other", each=2, splits=("val",))
    (folder / "val").symlink_to(other / "val")
    with pytest.raises(DataError, match=rf"val: a link to {other / 'val'}.*not followed"):
        splits(str(folder))
    (tmp_path / "all").symlink_to(other)
    assert set(splits(str(tmp_path / "all"))) == {"validation"}  # the folder that was named may be one


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        splits(str(tmp_path))


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not readable as parquet"):
        splits(str(tmp_path))


def test_parquet_without_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no column of images .columns: text"):
        splits(str(tmp_path))


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="someone/something: neither a folder here nor a dataset"):
        splits("someone/something")


def images(count: int, classes: tuple[str, ...]) -> Images:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None]
    keys = np.array([key_of(bytes([i])) for i in range(count)], np.uint64)
    return Images(pixels, np.arange(count) % len(classes), classes, keys)


def test_classes_are_matched_by_name() -> None:
    found = same_classes(images(3, ("c", "a")), ("a", "b", "c"), "test")
    assert found.labels is not None
    assert found.labels.tolist() == [2, 0, 2]
    numbered = same_classes(images(2, ("0", "1")), ("cat", "dog"), "test")
    assert numbered.classes == ("cat", "dog")
    for classes in (("a", "x"), ("x", "y", "z")):
        with pytest.raises(DataError, match="never saw: "):
            same_classes(images(3, classes), ("a", "b", "c"), "test")


@pytest.mark.skipif("PRG_TEST_DATA" not in os.environ, reason="PRG_TEST_DATA is not set")
def test_cifar10_as_published() -> None:
    found = splits(os.environ["PRG_TEST_DATA"] + "/cifar10")
    assert {name: split.count for name, split in found.items()} == {"train": 50_000, "test": 10_000}
    assert next(found["train"].rows())[2] == 6
    _, content, label = next(found["test"].rows())
    assert label == 3
    assert Image.open(io.BytesIO(content)).size == (32, 32)


def test_unreadable_files_are_left_out_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "images", each=3, splits=("train",))
    (folder / "train" / "red" / "broken.png").write_bytes(b"no image")
    source = splits(str(folder))["train"]
    images = load_split(source, SPEC, tmp_path / "cache", skip_unreadable=True)
    assert "left out 1 of 10 files" in capsys.readouterr().err
    assert images.pixels.shape == (9, 3, 16, 16)
    assert images.labels is not None
    for pixels, label in zip(images.pixels, images.labels, strict=True):
        assert images.classes[label] == ("red", "green", "blue")[pixels.mean((1, 2)).argmax()]
    with pytest.raises(DataError, match="--skip-unreadable"):
        load_split(source, SPEC, tmp_path / "cache")


def test_images_smaller_than_the_network_are_named(tmp_path: Path) -> None:
    source = splits(str(image_folder(tmp_path / "images", each=2, splits=("train",))))["train"]
    larger = SPEC.model_copy(update={"size": 32, "resize": 32})
    with pytest.raises(DataError, match=r"6 of 6 images are smaller than the network's 32 pixels.*enlarge"):
        load_split(source, larger, tmp_path / "cache", enlarge=False)
    assert len(load_split(source, larger, tmp_path / "cache")) == 6


def test_a_disk_that_is_full_while_decoding_leaves_nothing(tmp_path: Path) -> None:
    source = splits(str(image_folder(tmp_path / "images", each=20, splits=("train",))))["train"]
    with largest_file(4096), pytest.raises(OSError, match="too large"):
        load_split(source, SPEC, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_class_that_training_never_saw_is_named_before_fine_tuning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = image_folder(tmp_path / "photos")
    (photos / "test" / "violet").mkdir()
    (photos / "test" / "red" / "0.png").rename(photos / "test" / "violet" / "0.png")
    command = ["--recipe", "images-32", "--data", str(photos), *overrides("pretrain.epochs=1")]
    assert main(["pretrain", str(tmp_path / "run"), *command]) == 0
    assert main(["finetune", str(tmp_path / "run")]) == 1
    assert "split 'test' has classes that training never saw: violet" in capsys.readouterr().err
    assert not (tmp_path / "run" / "finetune").exists()
