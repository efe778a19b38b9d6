"""The search example: what it finds, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.search import main, read_vectors
from prg.cli import main as prg
from tests.tiny import png, write_tiny_entry


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of thirty pictures from dark to bright red, and one file that is none."""
    for i in range(30):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{i:02}.png").write_bytes(png((i * 8, 0, 255 - i * 8)))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    write_tiny_entry(tmp_path / "models")
    vectors = tmp_path / "vectors.parquet"
    entry = str(tmp_path / "models" / "tiny")
    assert prg(["embed", str(tmp_path / "photos"), "--entry", entry, "--out", str(vectors)]) == 0
    assert main(["index", str(vectors), str(tmp_path / "photos.usearch")]) == 0
    return tmp_path / "photos.usearch"


def test_the_nearest_of_all(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    (tmp_path / "new.png").write_bytes(png((1, 0, 254)))
    grid = tmp_path / "grid.png"
    query = ["query", str(index), str(tmp_path / "new.png"), "--entry", str(tmp_path / "models" / "tiny")]
    assert main([*query, "-k", "5", "--exact", "--grid", str(grid)]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(found) == 5
    assert all(int(Path(path).stem) < 15 for _, path in found)
    with Image.open(grid) as drawn:
        assert drawn.width > 5 * 64


def test_a_picture_of_the_index_needs_no_model(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    photo = str(index.parent / "photos" / "29.png")
    assert main(["query", str(index), photo, "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == photo
    assert len(lines) == 4
    assert photo not in "".join(lines[1:])


def test_a_picture_of_the_index_is_known_however_it_is_written(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (index.parent / "link").symlink_to(index.parent / "photos")
    monkeypatch.chdir(index.parent)
    capsys.readouterr()
    for photo in ("photos/29.png", "./photos/../photos/29.png", "link/29.png"):
        assert main(["query", index.name, photo, "-k", "3"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert "29.png" not in "".join(lines[1:])


def test_the_query_is_normalised_as_the_index_is(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry, vectors = str(tmp_path / "models" / "tiny"), str(tmp_path / "unit.parquet")
    assert prg(["embed", str(tmp_path / "photos"), "--entry", entry, "--out", vectors, "--normalize"]) == 0
    assert main(["index", vectors, str(tmp_path / "unit.usearch")]) == 0
    (tmp_path / "copy.png").write_bytes((tmp_path / "photos" / "07.png").read_bytes())
    capsys.readouterr()
    query = ["query", str(tmp_path / "unit.usearch"), str(tmp_path / "copy.png"), "--entry", entry]
    assert main([*query, "-k", "1", "--exact"]) == 0
    similarity, path = capsys.readouterr().out.splitlines()[1].split()
    assert path.endswith("07.png")
    assert float(similarity) > 0.999


def test_what_it_refuses(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.png").write_bytes(png())
    assert main(["query", str(index), str(tmp_path / "new.png")]) == 1
    assert "--entry or --url" in capsys.readouterr().err
    other = write_tiny_entry(tmp_path / "other", head=False)
    assert main(["query", str(index), str(tmp_path / "new.png"), "--entry", str(other)]) == 1
    assert "embed again" in capsys.readouterr().err


def test_both_forms_of_vectors_are_read(index: Path, tmp_path: Path) -> None:
    entry, photos = str(tmp_path / "models" / "tiny"), str(tmp_path / "photos")
    assert prg(["embed", photos, "--entry", entry, "--out", str(tmp_path / "v.npy")]) == 0
    a, b = read_vectors(tmp_path / "v.npy"), read_vectors(tmp_path / "vectors.parquet")
    assert np.array_equal(a[0], b[0], equal_nan=True)
    assert a[1] == b[1]
    assert "fingerprint" in b[2]
    assert a[2] == b[2]


def test_an_index_of_another_version_is_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = index.with_suffix(".json")
    facts = json.loads(about.read_text())
    del facts["made_by"]
    about.write_text(json.dumps(facts))
    assert main(["query", str(index), str(index.parent / "photos" / "29.png")]) == 1
    assert "index the vectors again" in capsys.readouterr().err
