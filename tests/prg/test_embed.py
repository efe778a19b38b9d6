"""`prg embed`: folders to one file, continued where it was stopped, a bad file no failed job."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from entry.config import read_entry, write_entry
from prg.cli import main
from prg.client import Client
from prg.embed import partitions
from prg.embed.engines import Rows
from prg.embed.local import Local
from prg.embed.remote import Remote
from service.settings import Settings
from tests.serving import served
from tests.tiny import png, tiny_digest, write_tiny_entry


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty pictures in two folders, whose red tells which they are; one file is none."""
    for i in range(30):
        place = tmp_path / "pictures" / f"folder-{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02}.png").write_bytes(png((i * 8, 0, 0)))
    (tmp_path / "pictures" / "folder-0" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "pictures" / "notes.txt").write_text("passed over")
    return tmp_path / "pictures"


def check(vectors: np.ndarray, paths: list[str], level: float = 0.8) -> None:
    for path, vector in zip(paths, vectors, strict=True):
        if path.endswith("bad.jpg"):
            assert np.isnan(vector).all()
        else:
            assert vector == pytest.approx([int(Path(path).stem) * 8 / 255, 0, 0, level], abs=1e-6)


def test_npy(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry, out = write_tiny_entry(tmp_path / "models"), tmp_path / "vectors.npy"
    assert main(["embed", str(pictures), "--entry", str(entry), "--out", str(out), "--t-end", "0.5"]) == 0
    assert "1 files could not be used" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()]
    assert len(lines) == 31
    assert [Path(line["path"]).name for line in lines if "error" in line] == ["bad.jpg"]
    check(np.load(out), [line["path"] for line in lines], 0.5)
    about = json.loads((tmp_path / "vectors.about.json").read_text())
    assert (about["fingerprint"], about["feature"], about["t_end"]) == (tiny_digest()[:12], "embedding", 0.5)
    assert not out.with_name("vectors.npy.parts").exists()


def test_parquet_patterns_and_each_file_once(pictures: Path, tmp_path: Path) -> None:
    entry, out = write_tiny_entry(tmp_path / "models"), tmp_path / "vectors.parquet"
    sources = [f"{pictures}/**/1*.png", str(pictures / "folder-0" / "10.png"), str(pictures / "folder-0")]
    assert main(["embed", *sources, "--entry", str(entry), "--out", str(out)]) == 0
    table = pq.read_table(out)
    paths = table["path"].to_pylist()
    assert len(paths) == len(set(paths)) == 5 + 16
    check(np.stack(table["embedding"].to_numpy()), paths)
    about = json.loads(table.schema.metadata[b"prg"])
    assert about == {
        "fingerprint": tiny_digest()[:12],
        "feature": "embedding",
        "t_end": 0.8,
        "normalize": False,
    }
    assert [e is None for e in table["error"].to_pylist()] == [not p.endswith("bad.jpg") for p in paths]


def test_it_goes_on_where_it_was_stopped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(partitions, "PART", 8)
    entry, out = write_tiny_entry(tmp_path / "models"), tmp_path / "vectors.npy"
    command = ["embed", str(pictures), "--entry", str(entry), "--out", str(out)]
    real, asked = Local.embed, []

    def stopped(self: Local, files: list[Path]) -> Rows:
        asked.append(len(files))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, files)

    monkeypatch.setattr(Local, "embed", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert not out.exists()
    assert main([*command, "--normalize"]) == 1
    assert "begun with other images, weights or options" in capsys.readouterr().err
    assert main(command) == 0
    assert asked == [8, 8, 8, 8, 7]
    check(
        np.load(out),
        [json.loads(line)["path"] for line in (tmp_path / "vectors.jsonl").read_text().splitlines()],
    )


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    write_tiny_entry(tmp_path / "served")
    with served(Settings(model_repository=tmp_path / "served")) as address:
        yield f"http://{address}"


def test_a_service_gives_the_same(pictures: Path, tmp_path: Path, url: str) -> None:
    entry = write_tiny_entry(tmp_path / "models")
    options = ["--feature", "state", "--normalize", "--t-end", "0.25"]
    for where, name in ((["--entry", str(entry)], "a.npy"), (["--url", url], "b.npy")):
        assert main(["embed", str(pictures), *where, *options, "--out", str(tmp_path / name)]) == 0
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert np.allclose(a, b, equal_nan=True, atol=1e-6)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_weights_replaced_meanwhile_are_not_mixed(
    pictures: Path,
    tmp_path: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(partitions, "PART", 16)
    real = Remote.embed

    def replaced(self: Remote, files: list[Path]) -> Rows:
        rows = real(self, files)
        return replace(rows, fingerprint="0" * 12) if len(files) < 16 else rows

    monkeypatch.setattr(Remote, "embed", replaced)
    out = tmp_path / "vectors.npy"
    assert main(["embed", str(pictures), "--url", url, "--out", str(out)]) == 1
    assert "was replaced meanwhile" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_strange_names_and_dangling_links_are_rows(tmp_path: Path, url: str, suffix: str) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / f"vectors.{suffix}"
    pictures.mkdir()
    Path(os.fsdecode(bytes(pictures) + b"/\xff.png")).write_bytes(png())
    (pictures / "gone.png").symlink_to("nowhere")
    assert main(["embed", str(pictures), "--url", url, "--out", str(out)]) == 0
    if suffix == "npy":
        rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        vectors = np.load(out)
    else:
        rows = pq.read_table(out).to_pylist()
        vectors = np.stack([row["embedding"] for row in rows])
    assert [Path(row["path"]).name for row in rows] == ["gone.png", "\\xff.png"]
    assert "No such file" in rows[0]["error"]
    assert np.isnan(vectors[0]).all()
    assert vectors[1] == pytest.approx([1, 0, 0, 0.8])


def test_a_folder_that_is_a_link_is_an_error(
    pictures: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (pictures / "more").symlink_to(tmp_path / "elsewhere")
    assert main(["embed", str(pictures), "--url", url, "--out", str(tmp_path / "v.npy")]) == 1
    assert f"{pictures / 'more'}: a link to" in capsys.readouterr().err


def test_the_client_sends_a_file_of_any_name(tmp_path: Path, url: str) -> None:
    strange = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))
    strange.write_bytes(png())
    with Client(url) as client:
        assert client.embed([strange]).vectors[0] == pytest.approx([1, 0, 0, 0.8])


def test_a_file_that_goes_away_is_a_row(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with closing(Remote(url, None, {})) as service:
        rows = service.embed([tmp_path / "gone.png", tmp_path / "a.png"])
    assert "No such file" in rows.errors[0]
    assert np.isnan(rows.vectors[0]).all()
    assert rows.vectors[1] == pytest.approx([1, 0, 0, 0.8])


def test_no_service_is_explained(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prg.client.RETRIES", 0)
    command = ["embed", str(pictures), "--url", "http://127.0.0.1:1", "--out", str(tmp_path / "a.npy")]
    assert main(command) == 1
    assert "no service answers at http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["/none", "--out", "a.npy", "--entry", "ENTRY"], "/none: no such file"),
        (["EMPTY", "--out", "a.npy", "--entry", "ENTRY"], "no images in"),
        (["EMPTY", "--out", "a.csv", "--entry", "ENTRY"], "must end in .npy or .parquet"),
        (["EMPTY", "--out", "a.npy", "--entry", "/none"], "config.pbtxt"),
        (["EMPTY", "--out", "a.npy", "--entry", "ENTRY", "--t-end", "2"], "from 0 to 1"),
        (["EMPTY", "--out", "a.npy", "--entry", "ENTRY", "--model", "x"], "--url"),
    ],
)
def test_errors_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], named: str
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"ENTRY": str(write_tiny_entry(tmp_path / "models")), "EMPTY": str(tmp_path / "empty")}
    assert main(["embed", *(names.get(word, word) for word in command)]) == 1
    assert named in capsys.readouterr().err


def test_another_head_on_the_same_encoder_goes_on(tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path)

    def identity(**changed: str) -> dict[str, object]:
        entry = read_entry(directory)
        entry.prg.versions["1"] = entry.prg.versions["1"].model_copy(update=changed)
        write_entry(directory, entry)
        with closing(Local(directory)) as embedder:
            return embedder.identity

    before = identity()
    assert identity(model="0" * 64) == before
    assert identity(encoder="0" * 64) != before
