"""The search example: what it finds, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from examples.search import main
from prg.cli import main as prg
from tests.tiny import png, write_tiny_entry

ENTRY = ("--entry", "models/tiny")
Asked = Callable[..., list[list[str]]]


def index(name: str = "photos", *options: str) -> int:
    """Embed the photos, and index the vectors."""
    assert prg(["embed", "photos", *ENTRY, "--out", f"{name}-vectors", *options]) == 0
    return main(["index", f"{name}-vectors", f"{name}.usearch"])


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder has an index of thirty pictures from blue to red, and of one file that is none."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.png").write_bytes(png((i * 8, 0, 255 - i * 8)))
    (folder / "bad.png").write_bytes(b"no image")
    write_tiny_entry(Path("models"))
    assert index() == 0
    Path("new.png").write_bytes(png((1, 0, 254)))
    return folder


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Asked:
    """asked(picture, ...) -> (similarity, path) of each that is found."""

    def query(picture: str, *options: str, name: str = "photos") -> list[list[str]]:
        capsys.readouterr()
        assert main(["query", f"{name}.usearch", picture, *options]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    return query


def test_the_nearest_of_all(asked: Asked) -> None:
    found = asked("new.png", *ENTRY, "-k", "5", "--exact", "--grid", "grid.png")
    assert len(found) == 5
    assert all(int(Path(path).stem) < 15 for _, path in found)
    with Image.open("grid.png") as drawn:
        assert drawn.width > 5 * 64


def test_a_picture_of_the_index_needs_no_model_however_it_is_written(asked: Asked) -> None:
    Path("link").symlink_to("photos")
    for photo in ("photos/29.png", "./photos/../photos/29.png", "link/29.png"):
        found = asked(photo, "-k", "3")
        assert len(found) == 3
        assert "29" not in {Path(path).stem for _, path in found}


def test_the_query_is_normalised_as_the_index_is(photos: Path, asked: Asked) -> None:
    assert index("unit", "--normalize") == 0
    Path("copy.png").write_bytes((photos / "07.png").read_bytes())
    [[similarity, path]] = asked("copy.png", *ENTRY, "-k", "1", "--exact", name="unit")
    assert path.endswith("07.png")
    assert float(similarity) > 0.999


def test_new_vectors_are_added_and_removed_ones_go(
    photos: Path, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "30.png").write_bytes(png((240, 0, 15)))
    (photos / "00.png").write_bytes(png((232, 0, 23)))  # now as red as 29
    (photos / "28.png").unlink()
    capsys.readouterr()
    assert index() == 0
    assert "30 pictures, 2 added and 2 removed" in capsys.readouterr().out
    found = [Path(path).stem for _, path in asked("photos/29.png", "-k", "3", "--exact")]
    assert found[0] == "00"
    assert set(found) == {"00", "30", "27"}


def test_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny_entry(Path("other"), head=False)
    embedded = ["embed", "photos", "--entry", str(other), "--out", "other.npy"]
    assert prg(embedded) == 0
    about = Path("photos.json")
    for command, named in (
        (["query", "photos.usearch", "new.png"], "--entry or --url"),
        (["query", "photos.usearch", "new.png", "--entry", str(other)], "embed again"),
        (["index", "other.npy", "photos.usearch"], "fingerprint"),
        (["query", "photos.usearch", "photos/29.png"], "index again"),
    ):
        if named == "index again":  # as another version wrote it
            about.write_text(json.dumps({"keys": json.loads(about.read_text())["keys"]}))
        assert main(command) == 1
        assert named in capsys.readouterr().err
