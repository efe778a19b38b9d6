"""Images decoded once: what is kept of them, and what is wrong with the files said at once."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workshop import CLASSES, image_folder, largest_file

from entry.config import ImageSpec
from prg.errors import DataError
from prg.images import decoded, parquet
from prg.images.decoded import Decoding, load_split
from prg.images.held_out import hold_out
from prg.images.source import Source
from prg.images.splits import splits

SPEC = ImageSpec(size=16, resize=16, preprocessing="v2", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return splits(str(image_folder(tmp_path / "images", each=3)))["train"]


def test_each_image_has_its_label_and_bad_files_are_named_or_left_out(
    tmp_path: Path, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "images" / "train" / "green" / "broken.png").write_bytes(b"no image")
    bad = splits(str(tmp_path / "images"))["train"]
    with pytest.raises(DataError, match=r"(?s)1 of 10 .*--skip-unreadable.*broken\.png"):
        load_split(bad, SPEC, cache)
    assert list(cache.iterdir()) == []
    for images in (load_split(source, SPEC, cache), load_split(bad, SPEC, cache, skip_unreadable=True)):
        assert images.pixels.shape == (9, 3, 16, 16)
        assert set(images.classes) == set(CLASSES)
        for pixels, label in zip(images.pixels, images.labels, strict=True):  # type: ignore[arg-type]
            assert images.classes[label] == ("red", "green", "blue")[pixels.mean((1, 2)).argmax()]
    assert "broken.png" in capsys.readouterr().err


def parquet_of(folder: Path, to: Path) -> Path:
    """The same images as two files of one split, whose second has the larger part."""
    files = sorted((folder / "train").rglob("*.png"))
    to.mkdir()
    for number, part in enumerate((files[:3], files[3:])):
        cells = [{"bytes": file.read_bytes(), "path": None} for file in part]
        table = pa.table({"image": cells, "label": [file.parent.name for file in part]})
        pq.write_table(table, to / f"train-{number}.parquet")
    return to


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_make_the_whole(
    tmp_path: Path, source: Source, kind: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded by several, each its own rows; also after a join that was interrupted."""
    monkeypatch.setattr(parquet, "ROWS", 2)
    if kind == "parquet":
        source = splits(str(parquet_of(tmp_path / "images", tmp_path / "parquet")))["train"]
    alone = load_split(source, SPEC, tmp_path / "alone")
    cache = tmp_path / "cache"
    decoding = Decoding(source, SPEC, cache, False, True)
    for number in range(parts):
        decoding.part(number, parts)
    first = decoding.part(0, parts).pixels
    first.write_bytes(first.read_bytes() + b"half of the next")
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "load_image", None)  # nothing is decoded twice
        together = decoding.whole(parts)
    assert np.array_equal(together.pixels, alone.pixels)
    assert np.array_equal(together.keys, alone.keys)
    assert np.array_equal(np.array(together.labels), np.array(alone.labels))
    assert sorted(cache.iterdir()) == sorted(decoding.files)
    assert [row for n in range(9) for row in source.rows(n, n + 1)] == list(source.rows())


def test_of_a_part_the_other_files_are_not_read_and_its_bad_files_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", each=3)
    (folder / "train" / "red" / "2.png").write_bytes(b"no image")
    source = splits(str(folder))["train"]
    decoding = Decoding(source, SPEC, tmp_path / "cache", False, True)
    decoding.part(1, 2)
    for name in ("0", "1"):
        (folder / "train" / "blue" / f"{name}.png").rename(tmp_path / f"{name}.png")
    decoding.part(1, 2)
    assert len(list(source.rows(4))) == 5
    for name in ("0", "1"):
        (tmp_path / f"{name}.png").rename(folder / "train" / "blue" / f"{name}.png")
    with pytest.raises(DataError, match=r"(?s)1 of 9 .*red/2\.png"):
        decoding.whole(2)
    assert list((tmp_path / "cache").iterdir()) == []


def test_some_of_the_images_take_no_memory_until_they_are_used(tmp_path: Path) -> None:
    source = splits(str(image_folder(tmp_path / "images", each=30)))["train"]
    images = load_split(source, SPEC.model_copy(update={"size": 64, "resize": 64}), tmp_path / "cache")
    tracemalloc.start()
    training, held_out = hold_out(images, 0.3)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < images.pixels[:].nbytes / 10
    some = training.subset(np.array([4, 0, 7])).subset(np.array([2, 0]))
    assert len(some.pixels) == 2
    for pixels, key in zip(some.pixels[:], some.keys, strict=True):
        assert np.array_equal(pixels, images.pixels[list(images.keys).index(key)])
    assert sorted([*training.keys, *held_out.keys]) == sorted(images.keys)


def test_decoded_images_are_kept(tmp_path: Path, source: Source) -> None:
    cache = tmp_path / "cache"
    load_split(source, SPEC, cache)
    kept = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    load_split(source, SPEC, cache)
    assert {f: f.stat().st_mtime_ns for f in cache.iterdir()} == kept
    next(cache.glob("*-pixels.npy")).unlink()  # as somebody who needed the room
    assert len(load_split(source, SPEC, cache)) == 9
    larger = SPEC.model_copy(update={"size": 32, "resize": 32})
    assert load_split(source, larger, cache).pixels.shape == (9, 3, 32, 32)
    with pytest.raises(DataError, match=r"9 of 9 .*\b32\b.*data\.enlarge"):
        load_split(source, larger, tmp_path / "other", enlarge=False)


def test_a_disk_that_is_full_while_decoding_leaves_nothing(tmp_path: Path, source: Source) -> None:
    with largest_file(4096), pytest.raises(OSError, match="too large"):
        load_split(source, SPEC, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
