"""`prg embed` from and to URLs, against a server that speaks S3."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from prg.embed import stores
from prg.embed.local import Local
from prg.embed.outputs import Done, Job, check, embed
from prg.embed.rows import from_parquet
from prg.embed.sources import find
from prg.errors import DataError
from tests.tiny import png, write_tiny_entry


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer("127.0.0.1", 0)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"bucket-{abs(hash(request.node.name))}"
    files.mkdir(name)
    yield f"s3://{name}"
    fsspec.filesystem("s3").clear_instance_cache()


def run(entry: Path, out: str, *sources: str) -> Done:
    job = Job(sources, out)
    check(job)
    with closing(Local(entry)) as embedder:
        return embed(job, embedder)


def rows_of(out: str) -> dict[str, list[float]]:
    store = stores.open_store(out)
    assert "_SUCCESS" in store.names()
    parts = [from_parquet(store.read(name)) for name in store.names() if name.startswith("part-")]
    rows = {name: list(v) for part in parts for name, v in zip(part.ids, part.vectors, strict=True)}
    assert len(rows) == sum(len(part.ids) for part in parts)
    return rows


def test_a_bucket_in_and_out(bucket: str, tmp_path: Path) -> None:
    entry, photos, out = write_tiny_entry(tmp_path), f"{bucket}/photos", f"{bucket}/vectors/"
    store = fsspec.filesystem("s3")
    for i in range(5):
        store.pipe(f"{photos}/a/{i}.png", png((i * 8, 0, 0)))
    store.pipe(f"{photos}/.thumbnails/1.png", png())
    assert run(entry, out, photos).summary.computed == 5
    rows = rows_of(out)
    assert rows.keys() == {f"{photos}/a/{i}.png" for i in range(5)}
    assert rows[f"{photos}/a/3.png"] == pytest.approx([24 / 255, 0, 0, 0.8])

    store.pipe(f"{photos}/a/3.png", png((80, 0, 0)))
    store.rm(f"{photos}/a/4.png")
    store.invalidate_cache()
    assert run(entry, out, photos).summary.computed == 1
    assert len(rows_of(out)) == 4
    assert run(entry, out, photos).summary.computed == 0


def test_patterns_and_single_objects(bucket: str) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/3.png", "b/4.txt"):
        fsspec.filesystem("s3").pipe(f"{bucket}/{name}", png())
    assert find([f"{bucket}/*/*.png"]).files == [f"{bucket}/a/1.png", f"{bucket}/b/3.png"]
    assert find([f"{bucket}/a/1.png"]).files == [f"{bucket}/a/1.png"]
    for nothing in (f"{bucket}/none/", f"{bucket}/*.gif", "s3://no-such-bucket/"):
        with pytest.raises(DataError, match=nothing.replace("*", r"\*")):
            find([nothing])
