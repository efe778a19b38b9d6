"""`prg embed` from Lance datasets, and its vectors into one."""

import json
from contextlib import closing
from pathlib import Path

import fsspec
import lance
import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from prg.embed import lance as source
from prg.embed.local import Local
from prg.embed.outputs import Done, Job, check, embed, read_file
from prg.errors import DataError
from tests.blocks import ROOT, blocks
from tests.tiny import png, write_tiny_entry


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return write_tiny_entry(tmp_path / "models")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ROWS", 8)


def run(entry: Path, out: Path, *sources: object, number: int = 0, count: int = 1) -> Done:
    job = Job([str(s) for s in sources], str(out), number=number, count=count)
    check(job)
    with closing(Local(entry)) as embedder:
        return embed(job, embedder)


def write(place: object, *reds: int | bytes | None, **options: object) -> None:
    """A red is an image, bytes are themselves."""
    cells = [png((red * 8, 0, 0)) if isinstance(red, int) else red for red in reds]
    lance.write_dataset(pa.table({"image": pa.array(cells, pa.binary())}), str(place), **options)


def reds_of(out: Path) -> dict[str, int | None]:
    """By id; None where there is an error. Every id once."""
    _, rows = read_file(out)
    assert len(set(rows.ids)) == len(rows.ids)
    reds = [None if np.isnan(vector[0]) else round(vector[0] * 255 / 8) for vector in rows.vectors]
    return {name.rpartition("#")[2]: red for name, red in zip(rows.ids, reds, strict=True)}


@pytest.mark.parametrize("name", ["vectors", "vectors.parquet"])
def test_every_row_once_and_a_bad_one_with_its_error(name: str, entry: Path, tmp_path: Path) -> None:
    place, out = tmp_path / "a.lance", tmp_path / name
    write(place, *range(20), b"no image", None, max_rows_per_file=12)
    done = run(entry, out, f"{place}/")
    assert (done.summary.images, done.summary.computed, done.summary.failed) == (22, 20, 2)
    numbers = lance.dataset(str(place)).scanner(with_row_id=True).to_table()["_rowid"].to_pylist()
    expected: list[int | None] = [*range(20), None, None]
    assert reds_of(out) == dict(zip(map(str, numbers), expected, strict=True))
    assert f"{place}#0" in read_file(out)[1].ids
    assert run(entry, out, f"{place}/").summary.computed == 0


def test_rows_that_come_go_or_move_cost_no_others(
    entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out = tmp_path / "a.lance", tmp_path / "vectors"
    write(place, *range(20), enable_stable_row_ids=True)
    run(entry, out, place)
    write(place, 20, 21, mode="append")
    assert run(entry, out, place).summary.computed == 2
    lance.dataset(str(place)).delete("_rowid = 3")
    # A row of each later shard is now in the one before.
    assert run(entry, out, place).summary.computed <= 2
    lance.dataset(str(place)).optimize.compact_files()
    assert run(entry, out, place).summary.computed == 0
    assert reds_of(out) == {str(i): i for i in range(22) if i != 3}


def test_shards_are_of_rows_and_of_one_version(entry: Path, tmp_path: Path) -> None:
    place, out = tmp_path / "a.lance", tmp_path / "vectors"
    write(place, *range(20))
    done = [run(entry, out, place, number=i, count=3) for i in (2, 0, 1)]
    assert [d.complete for d in done] == [False, False, True]
    assert [d.summary.computed for d in done] == [4, 8, 8]
    assert len(reds_of(out)) == 20

    # Others of the same number between two shards.
    run(entry, out, place, number=0, count=2)
    for file in sorted(place.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    write(place, *range(10, 30))
    assert not run(entry, out, place, number=1, count=2).complete
    assert run(entry, out, place, number=0, count=2).complete
    assert sorted(map(str, reds_of(out).values())) == sorted(map(str, range(10, 30)))


def test_blobs_and_structs_are_images_too(entry: Path, tmp_path: Path) -> None:
    images = [png((red * 8, 0, 0)) for red in range(3)]
    blob = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    for name, table in {
        "blob": pa.table({"image": images}, pa.schema([blob])),
        "struct": pa.table({"n": [0, 1, 2], "image": [{"bytes": image} for image in images]}),
    }.items():
        lance.write_dataset(table, str(tmp_path / f"{name}.lance"))
        run(entry, tmp_path / name, tmp_path / f"{name}.lance")
        assert reds_of(tmp_path / name) == {"0": 0, "1": 1, "2": 2}


def test_a_dataset_in_a_bucket(entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}", skip_instance_cache=True).mkdir(
            "bucket"
        )
        write("s3://bucket/a.lance", *range(20))
        run(entry, tmp_path / "vectors", "s3://bucket/a.lance/")
    finally:
        server.stop()
    assert reds_of(tmp_path / "vectors") == {str(i): i for i in range(20)}
    assert "s3://bucket/a.lance#3" in read_file(tmp_path / "vectors")[1].ids


def test_what_is_broken_is_named_and_what_is_there_stays(entry: Path, tmp_path: Path) -> None:
    place, out = tmp_path / "a.lance", tmp_path / "vectors"
    write(place, *range(20))
    run(entry, out, place)
    [data] = (place / "data").iterdir()
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.lance"):
        run(entry, out, place)
    assert not (out / "_SUCCESS").exists()
    data.write_bytes(whole)
    assert run(entry, out, place).summary.computed == 0
    assert len(reds_of(out)) == 20


def test_what_is_no_dataset_of_images_is_refused(entry: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.lance").mkdir()
    write(tmp_path / "empty.lance")
    lance.write_dataset(pa.table({"n": [1]}), str(tmp_path / "numbers.lance"))
    for name, words in {
        "none": "not readable as a Lance dataset",
        "folder": "not readable as a Lance dataset",
        "empty": "no images in it",
        "numbers": r"no column of images \(columns: n\)",
    }.items():
        with pytest.raises(DataError, match=rf"{name}\.lance: {words}"):
            run(entry, tmp_path / "vectors", tmp_path / f"{name}.lance")
    with pytest.raises(DataError, match="named by itself"):
        run(entry, tmp_path / "vectors", tmp_path)


def test_the_page_s_programs_bring_the_vectors_into_lance(
    entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    programs = [b.text for b in blocks(ROOT / "docs" / "embedding.md") if "import lance\n" in b.text]
    assert len(programs) == 2

    def check(*expected: int | None) -> None:
        done = run(entry, Path("vectors"), "photos.lance")
        assert done.summary.computed == computed
        for program in programs:
            exec(compile(program, "embedding.md", "exec"), {})
        photos = lance.dataset("photos.lance").to_table()
        reds = [vector and round(vector[0] * 255 / 8) for vector in photos["embedding"].to_pylist()]
        assert reds == list(expected)
        own = lance.dataset("vectors.lance").to_table()
        assert sorted(map(str, own["embedding"].to_pylist())) == sorted(
            map(str, photos["embedding"].to_pylist())
        )
        assert json.loads(own.schema.metadata[b"prg"])["dim"] == len(own["embedding"][0])
        assert lance.dataset("photos.lance").schema.names == ["image", "embedding"]

    write("photos.lance", *range(12), b"no image", *range(12, 20), max_rows_per_file=12)
    lance.dataset("photos.lance").delete("_rowid = 5")
    first = [*(red for red in range(12) if red != 5), None, *range(12, 20)]
    computed = 19
    check(*first)
    write("photos.lance", 21, 22, mode="append")
    computed = 2
    check(*first, 21, 22)
