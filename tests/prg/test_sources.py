"""Splits, classes and labels as folders and parquet have them; what is ambiguous is said, never guessed."""

import errno
import json
import os
import re
from dataclasses import replace
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
from tests.tiny import png

SPEC = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)


def pictures(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png())
    return folder


def table(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A parquet; features: what its columns are, as `datasets` has it in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path.parent


def loaded(folder: Path, cache: Path, split: str = "train", **columns: str) -> Images:
    return load_split(splits(str(folder), **columns)[split], SPEC, cache)


def named(images: Images) -> list[str]:
    assert images.labels is not None
    return [images.classes[i] for i in images.labels]


def reds(images: Images) -> list[float]:
    return images.pixels[:, 0].mean((1, 2)).tolist()


def image_bytes() -> list[dict[str, Any]]:
    return [{"bytes": png((i * 60, 0, 0)), "path": None} for i in range(4)]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/does/not/exist", ""),
        ("./neither", ""),
        ("no-photos/", ""),
        ("someone/something", ".*no route to the hub"),
    ],
)
def test_a_source_that_is_nowhere(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        assert name == "someone/something"  # a folder is not looked for on the hub
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=f"^{source}: {said}"):
        splits(source)


HIDDEN = (
    "train/a/._1.png train/.cache/1.png .small/1.png train/@eaDir/1.png train/a/@eaDir/1.png/THUMB.jpg "
    "__MACOSX/train/a/1.png lost+found/1.png $RECYCLE.BIN/1.png train/.ipynb_checkpoints/1.png"
)
"""As file managers leave beside photos."""


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (
            "Training/a/1.png val/b/1.png testing/a/1.png notes/read.txt classes.tsv",
            "train:a validation:b test:a",
        ),
        (
            "train/n1/images/1.JPEG train/n2/images/1.JPEG train/n2/2.JPEG",
            "train:n1,n2,n2",
        ),  # as Tiny-ImageNet
        ("test/cat/1.png", "test:cat"),
        # In a class, names of splits are names as any.
        ("a/img_test_1.png a/2.png b/validation.png", "train:a,a,b"),
        ("a/train/1.png a/test/1.png b/1.png", "train:a,a,b"),
        ("a/1.png 2.png", "train:"),
        ("1.png 2.png", "train:"),
        (f"{HIDDEN} train/a/1.png", "train:a"),
    ],
)
def test_splits_and_classes_of_folders(paths: str, classes: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", *paths.split())
    if HIDDEN in paths:
        pictures(folder, "System Volume Information/1.png")
        (folder / "train" / ".cache" / "link").symlink_to(tmp_path)
    images = {name: load_split(source, SPEC, tmp_path) for name, source in splits(str(folder)).items()}
    found = {name: ",".join(named(i)) if i.labels is not None else "" for name, i in images.items()}
    assert found == dict(entry.split(":") for entry in classes.split())


def test_why_images_have_no_labels_is_said(tmp_path: Path) -> None:
    found = splits(str(pictures(tmp_path / "d", "a/1.png", "2.png")))
    assert re.search(r"\b1\b.* 2\.png", found["train"].why_unlabelled)
    assert not splits(str(pictures(tmp_path / "e", "1.png")))["train"].why_unlabelled
    assert choose_split({"train": found["train"], "validation": found["train"]}, "valid", "d") == "validation"
    with pytest.raises(DataError, match="'extra'.* train"):
        choose_split(found, "extra", "d")


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        ("train/1.png bus/1.png car/1.png", r"train .* bus\b"),
        ("val/a/1.png valid/a/1.png", "validation"),
        ("cats/train/1.png cats/test/1.png dogs/train/1.png", r"cats/test\b.* test/cats\b"),
        ("train/a/1.png banner.png test.parquet", r"train/a/1\.png.* test\.parquet"),
        ("readme", "d: "),
        ("train.parquet", "d: .*parquet"),
    ],
)
def test_what_is_ambiguous_or_no_images_is_asked_about(paths: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):
        splits(str(pictures(tmp_path / "d", *paths.split())))


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


def test_a_folder_that_is_a_link_is_named(tmp_path: Path) -> None:
    folder, other = pictures(tmp_path / "d", "train/a/1.png"), pictures(tmp_path / "other", "val/a/1.png")
    (folder / "val").symlink_to(other / "val")
    with pytest.raises(DataError, match=f"{folder / 'val'}: .*{other / 'val'}"):
        splits(str(folder))
    (tmp_path / "all").symlink_to(other)
    assert set(splits(str(tmp_path / "all"))) == {"validation"}  # the folder that was named may be one


def test_two_spellings_of_a_name_are_one_class(tmp_path: Path) -> None:
    """A Mac writes ä as an a and its dots."""
    composed, apart = (normalize(form, "Bär") for form in ("NFC", "NFD"))
    paths = f"train/{composed}/1.png", f"train/{apart}/2.png", f"test/{apart}/3.png", "train/Wolf/1.png"
    found = splits(str(pictures(tmp_path / "d", *paths)))
    assert found["train"].classes == (composed, "Wolf")
    for trained in ((composed, "Wolf"), (apart, "Wolf")):
        check_classes_were_seen(trained, {0, 1}, {"test": found["test"]})
        assert numbers_of(found["train"].classes, trained) == [0, 1]
    label = [composed, apart, "Wolf", apart]
    parquet = table(tmp_path / "p" / "train.parquet", image=image_bytes(), label=label)
    assert named(loaded(parquet, tmp_path / "cache")) == [composed, composed, "Wolf", composed]


def test_what_is_skipped_and_what_is_empty_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "d", "train/a/1.png", "train/b/1.png")
    for name in ("train/c/deeper", "test/a"):
        (folder / name).mkdir(parents=True)
    pictures(folder / "train", "c/1.psd", "c/2.PSD", "a/notes.txt", "b/.DS_Store", "readme")
    assert loaded(folder, tmp_path / "cache").classes == ("a", "b")
    empty, skipped = capsys.readouterr().err.splitlines()[:2]
    assert re.search(r"\btest\b", empty)
    for said in ("4 files", ".psd (2), .txt (1), none (1)", f" c (of {folder / 'train'})"):
        assert said in skipped
    loaded(pictures(tmp_path / "plain", "a/1.png"), tmp_path / "cache")
    assert "note: " not in capsys.readouterr().err


def test_classes_are_matched_by_name_and_numbered_ones_by_number_not_by_place(tmp_path: Path) -> None:
    images = loaded(pictures(tmp_path / "d", *(f"{i}/1.png" for i in range(12))), tmp_path / "cache")
    assert images.classes[2] == "10"  # as names are sorted
    for trained in (tuple(map(str, range(12))), tuple("abcdefghijkl")):
        assert same_classes(images, trained, "d").labels.tolist() == [*map(int, named(images))]  # type: ignore[union-attr]
    three = Images(images.pixels[:3], np.arange(3), tuple("cab"), images.keys[:3])
    for trained in (tuple("abc"), tuple("abcd")):
        found = same_classes(three, trained, "d")
        assert (found.classes, named(found)) == (trained, named(three))
    for classes, strange in (("789", "7, 8, 9"), ("axc", "x"), ("xyz", "x, y, z")):
        with pytest.raises(DataError, match=strange):
            same_classes(replace(three, classes=tuple(classes)), tuple("abc"), "d")


@pytest.mark.parametrize(
    ("name", "labels", "classes", "bad"),
    [
        ("label", [0, 1, 2, 0], ("0", "1", "2"), ""),
        ("labels", ["dog", "cat", "dog", "ant"], ("ant", "cat", "dog"), ""),
        ("Category", ["0", "1", "0", "1"], ("0", "1"), ""),
        ("label", [-1] * 4, (), ""),
        ("label", [None] * 4, (), ""),
        ("label", [0.5] * 4, (), "0.5"),
        ("label", [0, 1, -1, 0], None, "-1"),
        ("label", [1_700_000_000, 1, 2, 3], None, "1700000000"),
    ],
)
def test_a_column_of_labels_is_known_by_its_name_and_kind(
    name: str, labels: list[Any], classes: tuple[str, ...] | None, bad: str, tmp_path: Path
) -> None:
    columns = {"image": [cell["bytes"] for cell in image_bytes()], name: labels, "caption": list("abcd")}
    folder = table(tmp_path / "d" / "train.parquet", **columns)
    if bad:
        with pytest.raises(DataError, match=rf"'label': .*{bad}\b"):
            splits(str(folder), label_column="label")
    if classes is None:
        return
    images = loaded(folder, tmp_path / "cache")
    assert (images.classes, reds(images)) == (classes, [0, 60, 120, 180])
    if classes:
        assert named(images) == [str(label) for label in labels]
        return
    with pytest.raises(DataError, match="'label'|--label-column, of image, label, caption"):
        same_classes(images, ("0", "1"), "d")
    assert splits(str(folder), label_column="caption")["train"].classes == tuple("abcd")


IMAGE = {"_type": "Image"}
LABEL = {"_type": "ClassLabel", "names": ["a", "b"]}
MASKS = [{"bytes": png((9, 9, 9)), "path": None}] * 4


def test_the_metadata_says_which_column_is_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever bytes lie before it, such as a digest, and whichever columns are named like labels."""
    columns = {"digest": [b"0123"] * 4, "y": [7, 7, 7, 7], "image": image_bytes(), "kind": [1, 0, 1, 0]}
    features = {"image": IMAGE, "kind": LABEL, "gone": IMAGE}
    images = loaded(table(tmp_path / "d" / "train.parquet", features, **columns), tmp_path / "cache")
    assert named(images) == ["b", "a", "b", "a"]
    assert reds(images) == [0, 60, 120, 180]
    assert len(re.findall("train: .*'image'.*'kind'", capsys.readouterr().err)) == 1
    del columns["y"]  # without metadata: a struct with bytes goes before bytes
    assert reds(loaded(table(tmp_path / "e" / "train.parquet", **columns), tmp_path / "cache")) == reds(
        images
    )


def test_several_columns_are_asked_about_and_one_is_named(tmp_path: Path) -> None:
    columns = {"coarse": [0, 0, 0, 1], "fine": [0, 1, 1, 0], "mask": MASKS, "image": image_bytes()}
    features = {"coarse": LABEL, "fine": LABEL, "mask": IMAGE, "image": IMAGE}
    folder = table(tmp_path / "d" / "train.parquet", features, **columns)
    plain = table(tmp_path / "e" / "train.parquet", a=[png()], b=[png()], labels=["x"], Class=["y"])
    for source, image, asked in (
        (folder, "", "mask, image;.*--image-column"),
        (folder, "image", "coarse, fine;.*--label-column"),
        (plain, "", "a, b;.*--image-column"),
        (plain, "b", "labels, Class;.*--label-column"),
    ):
        with pytest.raises(DataError, match=asked):
            splits(str(source), image_column=image)
    for image, label, shades, classes in (
        ("mask", "fine", [9] * 4, "abba"),
        ("image", "coarse", [0, 60, 120, 180], "aaab"),
    ):  # the decoded images of one column are not those of the other
        images = loaded(folder, tmp_path / "cache", image_column=image, label_column=label)
        assert reds(images) == shades
        assert named(images) == list(classes)
    for option, flag in (("image_column", "--image-column"), ("label_column", "--label-column")):
        with pytest.raises(DataError, match=f"'none'.*{flag}: coarse, fine, mask, image"):
            splits(str(folder), **{"image_column": "image", option: "none"})
    with pytest.raises(DataError, match="'fine' .*int64"):
        splits(str(folder), image_column="fine", label_column="fine")


def test_cells_that_only_name_a_file(tmp_path: Path) -> None:
    folder, other = pictures(tmp_path / "d", "img/0.png"), pictures(tmp_path / "other", "1.png")
    cells = [{"bytes": None, "path": path} for path in ("img/0.png", str(other / "1.png"))]
    source = splits(str(table(folder / "data.parquet", picture=cells)))["data"]
    assert [content for _, content, _ in source.rows()] == [png(), png()]
    (other / "1.png").unlink()
    with pytest.raises(DataError, match=rf"data\.parquet, row 1, column 'picture': .*{other}/1\.png"):
        load_split(source, SPEC, tmp_path / "cache", skip_unreadable=True)
    for empty in (None, {"bytes": None, "path": None}):
        assert cell_bytes(empty, folder, "here") == b""
    with pytest.raises(DataError, match=r"here: .* a\b"):
        cell_bytes({"bytes": None, "path": "a"}, None, "here")


def test_the_columns_are_options_of_every_command_with_data(tmp_path: Path) -> None:
    given = ["--data", str(tmp_path), "--image-column", "photo", "--label-column", "kind"]
    for command in (
        "pretrain run --recipe images-32",
        "finetune run --recipe images-32",
        "reproduce images-32 run",
        "evaluate entry",
        "import diffusers net run --recipe images-32",
        "import official net run --recipe images-32",
        "export run entry",
    ):
        arguments = parser().parse_args([*command.split(), *given])
        changed = options.images(arguments)
        assert changed == {"source": str(tmp_path), "image_column": "photo", "label_column": "kind"}
        if command.startswith("pretrain"):
            data = load_recipe("images-32", options.overrides(arguments)).data
            assert (data.image_column, data.label_column) == ("photo", "kind")


@pytest.mark.parametrize("of", ["files", "hub"])
def test_named_classes_and_hidden_labels(of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` writes them, and as the hub gives them."""
    names = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(), "fine_label": names})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    sets = {
        split: datasets.Dataset.from_dict(
            {"img": [Image.fromarray(p) for p in pixels], "fine_label": labels}, features
        )
        for split, labels in (("train", [1, 0, 0]), ("test", [-1, -1, -1]))
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(sets))
    source = "someone/something"
    if of == "files":
        source = str(tmp_path)
        for name, rows in sets.items():
            rows.to_parquet(str(tmp_path / f"{name}-00000-of-00001.parquet"))
    found = splits(source)
    images = load_split(found["train"], SPEC, tmp_path / "cache")
    assert named(images) == ["b", "a", "a"]
    assert np.array_equal(images.pixels, pixels.transpose(0, 3, 1, 2))
    assert found["test"].classes == ()
    with pytest.raises(DataError, match="'fine_label'"):
        same_classes(load_split(found["test"], SPEC, tmp_path / "cache"), ("a", "b"), "test")


def test_parquet_in_folders_of_splits(tmp_path: Path) -> None:
    """As the hub's own conversions lie: a folder a configuration, in it one a split."""
    for split in ("train", "test"):
        for part in ("0000.parquet", "0001.parquet"):
            table(tmp_path / "d" / "plain" / split / part, image=[png()], label=["a"])
    table(tmp_path / "d" / ".cache" / "old.parquet", image=[png()], label=["a"])
    for folder in (tmp_path / "d", tmp_path / "d" / "plain"):
        found = splits(str(folder))
        assert {name: source.count for name, source in found.items()} == {"train": 2, "test": 2}


def test_files_of_a_split_have_the_same_columns_and_lie_in_one_folder(tmp_path: Path) -> None:
    for name, columns in (("train-0", "image label"), ("train-1", "image kind"), ("test", "image")):
        table(tmp_path / "d" / f"{name}.parquet", **{column: [png()] for column in columns.split()})
    with pytest.raises(DataError, match=r"train-1\.parquet: .*'label'"):
        splits(str(tmp_path / "d"), "image", "label")
    (tmp_path / "d" / "train-1.parquet").unlink()
    table(tmp_path / "d" / "train-0.parquet", image=[png()] * 2, label=["a", "b"])
    found = splits(str(tmp_path / "d"), label_column="label")  # which one split lacks, as a competition's
    assert {name: source.classes for name, source in found.items()} == {"train": ("a", "b"), "test": ()}
    for name in ("fine", "coarse"):  # configurations of a dataset
        table(tmp_path / "e" / name / "train-00000-of-00001.parquet", image=[png()], label=[name])
    with pytest.raises(DataError, match="'train' .*coarse .*fine"):
        splits(str(tmp_path / "e"))
    assert splits(str(tmp_path / "e" / "fine"))["train"].classes == ("fine",)


def test_parquet_without_images(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    with pytest.raises(DataError, match=r"train\.parquet: .*columns: text\b"):
        splits(str(table(file, text=["a"])))
    empty = pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    with pytest.raises(DataError, match=f"^{tmp_path}: "):
        splits(str(table(file, image=empty, label=pa.array([], pa.int64()))))
