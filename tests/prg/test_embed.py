"""`prg embed`: what is computed, what is kept, and what is written."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entry.config import read_entry, write_entry
from prg.cli import main
from prg.client import Client
from prg.embed import partitions
from prg.embed.local import Local
from prg.embed.outputs import Done, Job, check, embed, read_file
from prg.embed.remote import Remote
from prg.errors import DataError
from service.settings import Settings
from tests.serving import served
from tests.tiny import png, tiny_digest, write_tiny_entry


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return write_tiny_entry(tmp_path / "models")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty pictures in two folders, whose red says which they are; and odd files among them."""
    folder = tmp_path / "pictures"
    for i in range(30):
        (folder / f"folder-{i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"folder-{i % 2}" / f"{i:02}.png").write_bytes(png((i * 8, 0, 0)))
    (folder / "folder-0" / "bad.jpg").write_bytes(b"no image")
    (folder / "folder-0" / "._00.png").write_bytes(b"what a Mac leaves")
    (folder / "notes.txt").write_text("no image either")
    return folder


class Counting(Local):
    """Remembers how many images it computed."""

    def __init__(self, entry: Path, **options: Any) -> None:
        super().__init__(entry, **options)
        self.computed = 0

    def embed(self, prepared: list[np.ndarray]) -> list[np.ndarray | str]:
        self.computed += len(prepared)
        return super().embed(prepared)


Run = Callable[..., tuple[Done, int]]


@pytest.fixture
def run(entry: Path) -> Run:
    """run(out, *sources, ...) -> what was done, and how many images the model computed."""

    def one(
        out: Path, *sources: object, options: dict[str, Any] | None = None, **job: Any
    ) -> tuple[Done, int]:
        embedder = Counting(entry, **(options or {}))
        asked = Job([str(source) for source in sources], str(out), **job)
        check(asked)
        return embed(asked, embedder), embedder.computed

    return one


def rows_of(out: Path) -> dict[str, np.ndarray | None]:
    """Vector by id; None where there is an error. Every id once."""
    _, rows = read_file(out)
    assert len(set(rows.ids)) == len(rows.ids)
    good = zip(rows.ids, rows.vectors, rows.errors, strict=True)
    return {name: None if error else vector for name, vector, error in good}


def check_red(rows: dict[str, np.ndarray | None], level: float = 0.8, atol: float = 1e-6) -> None:
    for name, vector in rows.items():
        if name.endswith("bad.jpg"):
            assert vector is None
        else:
            assert vector is not None
            assert np.allclose(vector, [int(Path(name).stem) * 8 / 255, 0, 0, level], atol=atol)


OUTS = ["vectors", "vectors.npy", "vectors.parquet"]


@pytest.mark.parametrize("name", OUTS)
def test_each_form_has_every_image_once(name: str, pictures: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / name
    sources = (pictures / "folder-0", f"{pictures}/**/1*.png", pictures / "folder-0" / "10.png")
    done, computed = run(out, *sources, options={"t_end": 0.5})
    rows = rows_of(out)
    assert (len(rows), computed, done.summary.failed) == (16 + 5, 20, 1)
    check_red(rows, 0.5)
    about, whole = read_file(out)
    assert (about["fingerprint"], about["feature"], about["t_end"]) == (tiny_digest()[:12], "embedding", 0.5)
    assert (about["dim"], about["dtype"], about["normalize"]) == (4, "float32", False)
    for id, digest in zip(whole.ids, whole.digests, strict=True):
        assert digest == hashlib.sha256(Path(id).read_bytes()).hexdigest()
    left = {path.name for path in tmp_path.iterdir()} - {"models", "pictures"}
    beside = {"vectors.jsonl", "vectors.about.json"} if name == "vectors.npy" else set()
    assert left == {name} | beside


@pytest.mark.parametrize("name", OUTS)
def test_only_what_changed_is_computed_again(name: str, pictures: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / name
    assert run(out, pictures)[1] == 30
    assert run(out, pictures)[1] == 0

    (pictures / "folder-1" / "31.png").write_bytes(png((31 * 8, 0, 0)))  # new
    (pictures / "folder-0" / "02.png").write_bytes(png((4 * 8, 0, 0)))  # changed
    (pictures / "folder-0" / "04.png").unlink()
    (pictures / "folder-0" / "bad.jpg").write_bytes(png((9 * 8, 0, 0)))  # mended
    assert run(out, pictures)[1] == 3
    rows = rows_of(out)
    assert len(rows) == 31
    assert str(pictures / "folder-0" / "04.png") not in rows
    assert rows.pop(str(pictures / "folder-0" / "02.png")) == pytest.approx([4 * 8 / 255, 0, 0, 0.8])
    assert rows.pop(str(pictures / "folder-0" / "bad.jpg")) == pytest.approx([9 * 8 / 255, 0, 0, 0.8])
    check_red(rows)


def test_a_new_image_touches_one_partition(
    pictures: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "ROWS", 8)
    out = tmp_path / "vectors"
    run(out, pictures)
    before = {part: part.stat().st_mtime_ns for part in out.glob("part-*")}
    assert len(before) >= 4
    (pictures / "31.png").write_bytes(png((31 * 8, 0, 0)))
    assert run(out, pictures)[1] == 1
    changed = [part for part in out.glob("part-*") if before.get(part) != part.stat().st_mtime_ns]
    # The group of 31.png may be fuller than a partition, and then a second one is touched.
    assert 1 <= len(changed) <= 2
    check_red(rows_of(out))


@pytest.mark.parametrize(("few", "many"), [(3, 30), (30, 3)])
def test_a_folder_that_grows_or_shrinks_is_dealt_anew_and_nothing_computed_twice(
    few: int, many: int, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "ROWS", 8)
    folder, out = tmp_path / "photos", tmp_path / "vectors"
    folder.mkdir()
    for i in range(few):
        (folder / f"{i:02}.png").write_bytes(png((i * 8, 0, 0)))
    run(out, folder)
    for i in range(30):
        path = folder / f"{i:02}.png"
        path.write_bytes(png((i * 8, 0, 0))) if i < many else path.unlink()
    assert run(out, folder)[1] == max(0, many - few)
    rows = rows_of(out)
    assert len(rows) == many
    check_red(rows)


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from prg.embed import partitions
from prg.embed.local import Local
from prg.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
partitions.ROWS = 8
real = Local.embed
Local.batch = 4
count = 0

def slow(self, prepared):
    global count
    count += len(prepared)
    if count > 20:
        os.kill(os.getpid(), int(sys.argv.pop()))
        count = 0
    return real(self, prepared)

Local.embed = slow
sys.exit(main(sys.argv[1:-1]))
"""


def stopped(signum: signal.Signals, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`prg embed`, which gets the signal while it computes."""
    command = [sys.executable, "-c", KILLED, "embed", *arguments, str(int(signum))]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", OUTS)
def test_after_a_kill_no_row_is_lost_or_doubled(
    name: str, pictures: Path, tmp_path: Path, entry: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / name
    done = stopped(signal.SIGKILL, str(pictures), "--entry", str(entry), "--out", str(out))
    assert done.returncode == -signal.SIGKILL
    monkeypatch.setattr(partitions, "ROWS", 8)
    with pytest.raises((DataError, FileNotFoundError)):  # nobody takes it for complete
        read_file(out)
    (pictures / "31.png").write_bytes(png((31 * 8, 0, 0)))
    _, computed = run(out, pictures)
    assert 11 <= computed < 31
    rows = rows_of(out)
    assert len(rows) == 32
    check_red(rows)


def test_an_interruption_is_one_line(pictures: Path, tmp_path: Path, entry: Path) -> None:
    done = stopped(signal.SIGINT, str(pictures), "--entry", str(entry), "--out", str(tmp_path / "v"))
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("prg: ")


def test_shards_together_are_the_whole(
    pictures: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "ROWS", 8)
    write_tar(tmp_path / "more.tar", {"40.png": 40, "41.png": 41})
    out = tmp_path / "vectors"
    sources = (pictures, tmp_path / "more.tar")
    done = [run(out, *sources, number=i, count=3) for i in (2, 0, 1)]
    assert [d.complete for d, _ in done] == [False, False, True]
    assert sum(computed for _, computed in done) == 32
    assert len(rows_of(out)) == 33
    assert run(out, *sources, number=1, count=3)[0].complete  # a retry alone
    assert run(out, *sources)[1] == 0

    # Replaced between two shards: the first is of what was there before.
    run(out, *sources, number=0, count=2)
    (pictures / "folder-0" / "02.png").write_bytes(png((9 * 8, 0, 0)))
    assert not run(out, *sources, number=1, count=2)[0].complete
    assert run(out, *sources, number=0, count=2)[0].complete
    assert rows_of(out)[str(pictures / "folder-0" / "02.png")] == pytest.approx([9 * 8 / 255, 0, 0, 0.8])


def test_shards_that_begin_together_don_t_disturb_each_other(
    pictures: Path, tmp_path: Path, entry: Path
) -> None:
    jobs = [Job([str(pictures)], str(tmp_path / "v"), number=i, count=8) for i in range(8)]
    embedders = [Local(entry) for _ in jobs]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(embed, jobs, embedders))
    assert any(one.complete for one in done)
    assert len(rows_of(tmp_path / "v")) == 31


def write_tar(path: Path, members: dict[str, int | bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = png((content * 8, 0, 0)) if isinstance(content, int) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, reds: list[int]) -> None:
    cells = pa.array(
        [{"bytes": png((red * 8, 0, 0)), "path": None} for red in reds],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": cells}), path)


def test_tars_and_parquet_hold_images(tmp_path: Path, run: Run) -> None:
    folder, out = tmp_path / "shards", tmp_path / "vectors"
    folder.mkdir()
    write_tar(
        folder / "a.tar", {"x/01.png": 1, "x/01.txt": b"its text", "x/._01.png": b"a Mac's", "02.png": 2}
    )
    write_parquet(folder / "b.parquet", [3, 4, 5])
    assert run(out, folder)[1] == 5
    found = {name: round(float(v[0] * 255 / 8)) for name, v in rows_of(out).items() if v is not None}
    a, b = folder / "a.tar", folder / "b.parquet"
    assert found == {f"{a}#x/01.png": 1, f"{a}#02.png": 2, f"{b}#0": 3, f"{b}#1": 4, f"{b}#2": 5}

    write_parquet(folder / "b.parquet", [6, 3, 4, 5])  # every row is another's now
    (folder / "a.tar").unlink()
    assert run(out, folder)[1] == 4
    assert len(rows_of(out)) == 4


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("cut", ["at a member's end", "in a header", "in data", "a header damaged"])
def test_a_broken_tar_is_named_and_what_is_there_stays(
    suffix: str, cut: str, tmp_path: Path, run: Run
) -> None:
    tar, out = tmp_path / f"a{suffix}", tmp_path / "vectors"
    plain = tmp_path / "plain"
    write_tar(plain, {f"{i:02}.png": i for i in range(20)})
    whole = plain.read_bytes()
    packed = gzip.compress(whole) if suffix == ".tar.gz" else whole
    tar.write_bytes(packed)
    run(out, tar)
    end = 1024 * 6  # of a member: a header and an image of less than 512 bytes are 1,024
    if cut == "a header damaged":
        broken = whole[:end] + b"x" * 512 + whole[end + 512 :]
        tar.write_bytes(gzip.compress(broken) if suffix == ".tar.gz" else broken)
    else:
        length = {"at a member's end": end, "in a header": end + 100, "in data": end + 600}[cut]
        tar.write_bytes(packed[: length if suffix == ".tar" else len(packed) // 2])
    with pytest.raises(DataError, match="a.tar"):
        run(out, tar)
    assert not (out / "_SUCCESS").exists()
    tar.write_bytes(packed)
    assert run(out, tar)[1] == 0
    assert len(rows_of(out)) == 20


def test_links_in_a_tar_and_strange_names_are_rows(tmp_path: Path, run: Run) -> None:
    tar = tmp_path / "a.tar"
    write_tar(tar, {"\udcff.png": 1, "../up.png": 2})
    with tarfile.open(tar, "a") as more:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "../up.png"
        more.addfile(link)
    for name in OUTS:
        run(tmp_path / name, tar)
        rows = rows_of(tmp_path / name)
        assert {k.partition("#")[2]: v is None for k, v in rows.items()} == {
            "\\xff.png": False,
            "../up.png": False,
            "link.png": True,
        }


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_an_archive_without_images_removes_nothing(name: str, tmp_path: Path, run: Run) -> None:
    write = {"a.tar": lambda reds: write_tar(tmp_path / name, {f"{r}.png": r for r in reds})}
    write["a.parquet"] = lambda reds: write_parquet(tmp_path / name, reds)
    write[name]([1, 2])
    run(tmp_path / "vectors", tmp_path / name)
    write[name]([])
    with pytest.raises(DataError, match=name):
        run(tmp_path / "vectors", tmp_path / name)
    write[name]([1, 2])
    assert run(tmp_path / "vectors", tmp_path / name)[1] == 0


def test_a_folder_of_images_and_archives_is_a_question(pictures: Path, tmp_path: Path, run: Run) -> None:
    write_tar(pictures / "a.tar", {"1.png": 1})
    with pytest.raises(DataError, match=r"a\.tar"):
        run(tmp_path / "vectors", pictures)
    run(tmp_path / "vectors", f"{pictures}/**/*.png", pictures / "a.tar")


def test_the_output_may_lie_in_the_source(tmp_path: Path, run: Run) -> None:
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s" / "a.tar", {"1.png": 1})
    for out in ("vectors", "v.parquet"):
        run(tmp_path / "s" / out, tmp_path / "s" / "a.tar")
        assert run(tmp_path / "s" / out, tmp_path / "s" / "a.tar")[1] == 0
    (tmp_path / "s" / "v.parquet").unlink()
    run(tmp_path / "s" / "vectors", tmp_path / "s" / "a.tar", tmp_path / "s")


def test_strange_files_are_rows_and_stop_nothing(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    with (folder / "huge.png").open("wb") as sparse:
        sparse.truncate(40 << 30)
    (folder / "a\u2028\nb.png").write_bytes(png())
    for name in OUTS:
        done, _ = run(tmp_path / name, folder)
        assert (done.summary.images, done.summary.failed) == (3, 2)
        assert run(tmp_path / name, folder)[1] == 0


def test_two_files_of_one_id_are_refused(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"\xff.png", rb"\xff.png"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(png())
    with pytest.raises(DataError, match="xff"):
        run(tmp_path / "v", folder)


def test_what_lies_beside_a_npy_is_not_replaced(pictures: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "v.jsonl").write_text("somebody's captions")
    with pytest.raises(DataError, match=r"v\.jsonl"):
        run(tmp_path / "v.npy", pictures)
    assert (tmp_path / "v.jsonl").read_text() == "somebody's captions"


@pytest.mark.parametrize("left", [100, 0])
def test_a_damaged_partition_is_made_again(
    left: int, pictures: Path, tmp_path: Path, entry: Path, run: Run
) -> None:
    out = tmp_path / "vectors"
    run(out, pictures)
    stopped(signal.SIGKILL, str(pictures), "--entry", str(entry), "--out", str(tmp_path / "v.npy"))
    parts = [*out.glob("part-*"), *(tmp_path / "v.npy.parts").glob("part-*")]
    for part in parts:
        part.write_bytes(part.read_bytes()[:left])
    assert len(parts) >= 2
    assert run(out, pictures)[1] == 30
    assert run(tmp_path / "v.npy", pictures)[1] == 30
    assert len(rows_of(out)) == len(rows_of(tmp_path / "v.npy")) == 31


@pytest.mark.parametrize("name", OUTS)
def test_vectors_of_two_kinds_are_not_mixed(name: str, pictures: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / name
    run(out, pictures)
    before = rows_of(out)
    for other in ({"options": {"t_end": 0.5}}, {"options": {"feature": "hidden"}}, {"dtype": "float16"}):
        with pytest.raises(DataError, match="another output"):
            run(out, pictures, **other)
    with pytest.raises(DataError, match="pictures"):  # else all but folder-0 would vanish
        run(out, pictures / "folder-0")
    assert rows_of(out).keys() == before.keys()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "31.png").write_bytes(png((31 * 8, 0, 0)))
    assert run(out, pictures, tmp_path / "more")[1] == 1


def test_a_source_without_images_removes_nothing(pictures: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "vectors"
    run(out, pictures)
    pictures.rename(tmp_path / "elsewhere")
    pictures.mkdir()  # as a disk that is not mounted
    with pytest.raises(DataError, match="pictures"):
        run(out, pictures)
    assert len(rows_of(out)) == 31


def test_two_runs_into_one_output_exclude_each_other(
    pictures: Path, tmp_path: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = Local.embed, []
    jobs = [Job([str(pictures)], str(tmp_path / "v"), count=count) for count in (1, 2)]

    def second(self: Local, prepared: list[np.ndarray]) -> list[np.ndarray | str]:
        monkeypatch.setattr(Local, "embed", real)
        for job in jobs:
            with closing(Local(entry)) as other, pytest.raises(DataError, match="another run"):
                embed(job, other)
            refused.append(job)
        return real(self, prepared)

    monkeypatch.setattr(Local, "embed", second)
    with closing(Local(entry)) as first:
        embed(jobs[0], first)
    assert refused == jobs
    assert len(rows_of(tmp_path / "v")) == 31


def test_half_precision(pictures: Path, tmp_path: Path, run: Run) -> None:
    for name in OUTS:
        out = tmp_path / name
        run(out, pictures, dtype="float16")
        assert run(out, pictures, dtype="float16")[1] == 0
        _, rows = read_file(out)
        assert rows.vectors.dtype == np.float16
        check_red(rows_of(out), atol=1e-3)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    write_tiny_entry(tmp_path / "served")
    with served(Settings(model_repository=tmp_path / "served")) as address:
        yield f"http://{address}"


def test_a_service_gives_the_same(pictures: Path, tmp_path: Path, url: str, entry: Path) -> None:
    options = ["--feature", "state", "--normalize", "--t-end", "0.25"]
    for where, name in ((["--entry", str(entry)], "a.npy"), (["--url", url], "b.npy")):
        assert main(["embed", str(pictures), *where, *options, "--out", str(tmp_path / name)]) == 0
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert np.allclose(a, b, equal_nan=True, atol=1e-6)
    lines = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in "ab"
    ]
    assert lines[0] == lines[1]
    with closing(Remote(url, None, {})) as service, closing(Local(entry)) as here:
        assert service.identity == here.identity


def test_weights_replaced_meanwhile_are_not_mixed(pictures: Path, tmp_path: Path, url: str) -> None:
    with closing(Remote(url, None, {})) as service:
        service.identity["fingerprint"] = "0" * 12
        with pytest.raises(DataError, match="replaced"):
            embed(Job([str(pictures)], str(tmp_path / "v")), service)
    assert not (tmp_path / "v" / "_SUCCESS").exists()


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ""])
def test_strange_names_and_dangling_links_are_rows(tmp_path: Path, url: str, suffix: str) -> None:
    folder, out = tmp_path / "photos", tmp_path / f"vectors{suffix}"
    folder.mkdir()
    Path(os.fsdecode(bytes(folder) + b"/\xff.png")).write_bytes(png())
    (folder / "gone.png").symlink_to("nowhere")
    with closing(Remote(url, None, {})) as service:
        embed(Job([str(folder)], str(out)), service)
    rows = {Path(name).name: vector for name, vector in rows_of(out).items()}
    assert rows["gone.png"] is None
    assert rows["\\xff.png"] == pytest.approx([1, 0, 0, 0.8])


def test_a_folder_that_is_a_link_is_an_error(pictures: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "elsewhere").mkdir()
    (pictures / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="more: a link to"):
        run(tmp_path / "v", pictures)


def test_the_client_sends_a_file_of_any_name(tmp_path: Path, url: str) -> None:
    strange = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))
    strange.write_bytes(png())
    with Client(url) as client:
        assert client.embed([strange]).vectors[0] == pytest.approx([1, 0, 0, 0.8])


def test_a_person_sees_what_failed_and_what_was_skipped(
    pictures: Path, tmp_path: Path, entry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(pictures), "--entry", str(entry), "--out", str(tmp_path / "v")]) == 0
    shown = capsys.readouterr().out
    for word in ("31 images", "30", "bad.jpg", ".txt"):
        assert word in shown
    assert "._00" not in shown


def test_a_key_that_is_missing_is_named(pictures: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\nscopes = ["infer"]\n')
    settings = Settings(model_repository=write_tiny_entry(tmp_path / "served").parent, api_keys_file=keys)
    with served(settings) as address, pytest.raises(DataError, match="PRG_KEY"):
        Remote(f"http://{address}", None, {})


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["/none", "--out", "a", "--entry", "ENTRY"], "/none"),
        (["EMPTY", "--out", "a", "--entry", "ENTRY"], "empty"),
        (["EMPTY", "--out", "a.csv", "--entry", "ENTRY"], "a.csv"),
        (["EMPTY", "--out", "a.npy", "--entry", "ENTRY", "--shard", "0/2"], "--shard"),
        (["EMPTY", "--out", "a", "--entry", "/none"], "config.pbtxt"),
        (["EMPTY", "--out", "a", "--entry", "ENTRY", "--t-end", "2"], "--t-end"),
        (["EMPTY", "--out", "a", "--entry", "ENTRY", "--model", "x"], "--url"),
        (["nosuch://x/", "--out", "a", "--entry", "ENTRY"], "nosuch"),
        (["EMPTY", "--out", "FULL", "--entry", "ENTRY"], "--out"),
    ],
)
def test_errors_are_explained(
    tmp_path: Path,
    entry: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").write_bytes(png())
    names = {"ENTRY": str(entry), "EMPTY": str(tmp_path / "empty"), "FULL": str(tmp_path / "full")}
    if "FULL" in command:  # of somebody else's files
        (tmp_path / "empty" / "a.png").write_bytes(png())
    assert main(["embed", *(names.get(word, word) for word in command)]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


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
