"""The search example: what it finds, and what it refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from examples.search import main
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
    return brought_up_to_date(tmp_path)


def brought_up_to_date(home: Path, name: str = "photos", *options: str) -> Path:
    """Embed the photos, and index the vectors."""
    out, entry = str(home / f"{name}-vectors"), str(home / "models" / "tiny")
    assert prg(["embed", str(home / "photos"), "--entry", entry, "--out", out, *options]) == 0
    assert main(["index", out, str(home / f"{name}.usearch")]) == 0
    return home / f"{name}.usearch"


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
    entry, unit = str(tmp_path / "models" / "tiny"), brought_up_to_date(tmp_path, "unit", "--normalize")
    (tmp_path / "copy.png").write_bytes((tmp_path / "photos" / "07.png").read_bytes())
    capsys.readouterr()
    query = ["query", str(unit), str(tmp_path / "copy.png"), "--entry", entry]
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


def test_new_vectors_are_added_and_removed_ones_go(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = index.parent
    (home / "photos" / "30.png").write_bytes(png((240, 0, 15)))
    (home / "photos" / "00.png").write_bytes(png((232, 0, 23)))  # now as red as 29
    (home / "photos" / "28.png").unlink()
    capsys.readouterr()
    brought_up_to_date(home)
    assert "30 pictures, 2 added and 2 removed" in capsys.readouterr().out
    assert main(["query", str(index), str(home / "photos" / "29.png"), "-k", "3", "--exact"]) == 0
    found = [Path(line.split()[1]).stem for line in capsys.readouterr().out.splitlines()[1:]]
    assert found[0] == "00"
    assert set(found) == {"00", "30", "27"}


def test_vectors_of_another_model_are_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = index.parent
    write_tiny_entry(home / "models", head=False)
    entry, out = str(home / "models" / "tiny"), str(home / "other.npy")
    assert prg(["embed", str(home / "photos"), "--entry", entry, "--out", out]) == 0
    assert main(["index", out, str(index)]) == 1
    assert "fingerprint" in capsys.readouterr().err


def test_an_index_of_another_version_is_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = index.with_suffix(".json")
    facts = json.loads(about.read_text())
    del facts["made_by"]
    about.write_text(json.dumps(facts))
    assert main(["query", str(index), str(index.parent / "photos" / "29.png")]) == 1
    assert "index again" in capsys.readouterr().err
