"""Images decoded once: what is kept of them, and what is wrong with the files said at once."""

from pathlib import Path

import pytest
from workshop import CLASSES, image_folder, largest_file

from entry.config import ImageSpec
from prg.errors import DataError
from prg.images.decoded import load_split
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
