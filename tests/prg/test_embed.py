"""`prg embed`: what is computed, what is kept, and what is written."""

import gzip
import hashlib
import io
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
from tests.tiny import png, red_pictures, tiny_digest, write_tiny_entry


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return write_tiny_entry(tmp_path / "models")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty pictures in two folders, whose red says which they are; and odd files among them."""
    folder = tmp_path / "pictures"
    for odd in (0, 1):
        red_pictures(folder / f"folder-{odd}", *range(odd, 30, 2))
    (folder / "folder-0" / "bad.jpg").write_bytes(b"no image")
    (folder / "folder-0" / "._00.png").write_bytes(b"what a Mac leaves")
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.fixture
def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "ROWS", 8)


Run = Callable[..., tuple[Done, int]]


@pytest.fixture
def run(entry: Path) -> Run:
    """run(out, *sources, ...) -> what was done, and how many images the model computed."""

    def one(
        out: Path, *sources: object, options: dict[str, Any] | None = None, **job: Any
    ) -> tuple[Done, int]:
        asked = Job([str(source) for source in sources], str(out), **job)
        check(asked)
        done = embed(asked, Local(entry, **(options or {})))
        return done, done.summary.computed

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
    out, half = tmp_path / name, {"dtype": "float16"}
    assert run(out, pictures, **half)[1] == 30
    assert run(out, pictures, **half)[1] == 0

    red_pictures(pictures / "folder-1", 31)
    (pictures / "folder-0" / "02.png").write_bytes(png((4 * 8, 0, 0)))
    (pictures / "folder-0" / "04.png").unlink()
    (pictures / "folder-0" / "bad.jpg").write_bytes(png((9 * 8, 0, 0)))  # mended
    assert run(out, pictures, **half)[1] == 3
    assert read_file(out)[1].vectors.dtype == np.float16
    rows = rows_of(out)
    assert len(rows) == 31
    assert str(pictures / "folder-0" / "04.png") not in rows
    for changed, red in (("02.png", 4), ("bad.jpg", 9)):
        vector = rows.pop(str(pictures / "folder-0" / changed))
        assert vector == pytest.approx([red * 8 / 255, 0, 0, 0.8], abs=1e-3)
    check_red(rows, atol=1e-3)


def test_a_new_image_touches_one_partition_and_a_folder_that_grows_or_shrinks_is_dealt_anew(
    tmp_path: Path, run: Run, small_partitions: None
) -> None:
    out = tmp_path / "vectors"
    run(out, red_pictures(tmp_path / "photos", 1, 2, 3))
    assert run(out, red_pictures(tmp_path / "photos", *range(30)))[1] == 27
    before = {part: part.stat().st_mtime_ns for part in out.glob("part-*")}
    assert len(before) >= 4
    assert run(out, red_pictures(tmp_path / "photos", 30))[1] == 1
    changed = [part for part in out.glob("part-*") if before.get(part) != part.stat().st_mtime_ns]
    # The group of 30.png may be fuller than a partition, and then a second one is touched.
    assert 1 <= len(changed) <= 2
    check_red(rows_of(out))
    for i in range(3, 31):
        (tmp_path / "photos" / f"{i:02}.png").unlink()
    assert run(out, tmp_path / "photos")[1] == 0
    assert len(rows_of(out)) == 3


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


def stopped(signum: signal.Signals, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`prg embed`, which gets the signal while it computes."""
    command = [sys.executable, "-c", KILLED, "embed", *map(str, arguments), str(int(signum))]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", OUTS)
def test_after_a_kill_no_row_is_lost_or_doubled(
    name: str, pictures: Path, tmp_path: Path, entry: Path, run: Run, small_partitions: None
) -> None:
    out = tmp_path / name
    done = stopped(signal.SIGKILL, pictures, "--entry", entry, "--out", out)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises((DataError, FileNotFoundError)):  # nobody takes it for complete
        read_file(out)
    red_pictures(pictures, 31)
    _, computed = run(out, pictures)
    assert 11 <= computed < 31
    rows = rows_of(out)
    assert len(rows) == 32
    check_red(rows)


def test_an_interruption_is_one_line(pictures: Path, tmp_path: Path, entry: Path) -> None:
    done = stopped(signal.SIGINT, pictures, "--entry", entry, "--out", tmp_path / "v")
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("prg: ")


@pytest.mark.parametrize("left", [100, 0])
def test_a_damaged_partition_is_made_again(
    left: int, pictures: Path, tmp_path: Path, entry: Path, run: Run
) -> None:
    outs = tmp_path / "vectors", tmp_path / "v.npy"
    run(outs[0], pictures)
    stopped(signal.SIGKILL, pictures, "--entry", entry, "--out", outs[1])
    parts = [*outs[0].glob("part-*"), *(tmp_path / "v.npy.parts").glob("part-*")]
    assert len(parts) >= 2
    for part in parts:
        part.write_bytes(part.read_bytes()[:left])
    for out in outs:
        assert run(out, pictures)[1] == 30
        assert len(rows_of(out)) == 31


def test_shards_together_are_the_whole(
    pictures: Path, tmp_path: Path, run: Run, small_partitions: None
) -> None:
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
    a, b = folder / "a.tar", folder / "b.parquet"
    write_tar(a, {"x/01.png": 1, "x/01.txt": b"its text", "x/._01.png": b"a Mac's", "02.png": 2})
    write_parquet(b, [3, 4, 5])
    assert run(out, folder)[1] == 5
    found = {name: round(float(v[0] * 255 / 8)) for name, v in rows_of(out).items() if v is not None}
    assert found == {f"{a}#x/01.png": 1, f"{a}#02.png": 2, f"{b}#0": 3, f"{b}#1": 4, f"{b}#2": 5}

    write_parquet(b, [6, 3, 4, 5])  # every row is another's now
    a.unlink()
    assert run(out, folder)[1] == 4
    assert len(rows_of(out)) == 4


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("cut", ["at a member's end", "in a header", "in data", "a header damaged"])
def test_a_broken_tar_is_named_and_what_is_there_stays(
    suffix: str, cut: str, tmp_path: Path, run: Run
) -> None:
    tar, out, plain = tmp_path / f"a{suffix}", tmp_path / "vectors", tmp_path / "plain"
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


@pytest.mark.parametrize("name", OUTS)
def test_strange_files_are_rows_and_stop_nothing(name: str, tmp_path: Path, run: Run) -> None:
    folder, tar = tmp_path / "photos", tmp_path / "a.tar"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    with (folder / "huge.png").open("wb") as sparse:
        sparse.truncate(40 << 30)
    (folder / "gone.png").symlink_to("nowhere")
    for strange in ("a\u2028\nb.png", "\udcff.png"):
        (folder / strange).write_bytes(png())
    write_tar(tar, {"\udcfe.png": 1, "../up.png": 2})
    with tarfile.open(tar, "a") as more:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "../up.png"
        more.addfile(link)
    run(tmp_path / name, folder, tar)
    assert {Path(k.rpartition("#")[2]).name: v is None for k, v in rows_of(tmp_path / name).items()} == {
        **dict.fromkeys(("pipe.png", "huge.png", "gone.png", "link.png"), True),
        **dict.fromkeys(("a\u2028\nb.png", "\\xff.png", "\\xfe.png", "up.png"), False),
    }
    assert run(tmp_path / name, folder, tar)[1] == 0


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "folder"])
def test_a_source_without_images_removes_nothing(name: str, tmp_path: Path, run: Run) -> None:
    source = tmp_path / name

    def write(*reds: int) -> None:
        if name == "a.tar":
            write_tar(source, {f"{red}.png": red for red in reds})
        elif name == "a.parquet":
            write_parquet(source, list(reds))
        else:  # as a disk that is not mounted
            source.rename(tmp_path / f"{len(reds)}") if source.exists() else None
            red_pictures(source, *reds)

    write(1, 2)
    run(tmp_path / "vectors", source)
    write()
    with pytest.raises(DataError, match=name):
        run(tmp_path / "vectors", source)
    write(1, 2)
    assert run(tmp_path / "vectors", source)[1] == 0


def test_what_is_ambiguous_is_refused(pictures: Path, tmp_path: Path, run: Run) -> None:
    mixed, linked, doubled = (red_pictures(tmp_path / name, 1) for name in ("mixed", "linked", "doubled"))
    write_tar(mixed / "a.tar", {"1.png": 1})
    (linked / "more").symlink_to(mixed)
    for name in ("\udcff.png", r"\xff.png"):  # of one id
        (doubled / name).write_bytes(png())
    for folder, named in ((mixed, r"a\.tar"), (linked, "more: a link to"), (doubled, "xff")):
        with pytest.raises(DataError, match=named):
            run(tmp_path / "v", folder)
    run(tmp_path / "v", f"{mixed}/**/*.png", mixed / "a.tar")
    (tmp_path / "w.jsonl").write_text("somebody's captions")
    with pytest.raises(DataError, match=r"w\.jsonl"):
        run(tmp_path / "w.npy", pictures)
    assert (tmp_path / "w.jsonl").read_text() == "somebody's captions"


def test_the_output_may_lie_in_the_source(tmp_path: Path, run: Run) -> None:
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s" / "a.tar", {"1.png": 1})
    for out in ("vectors", "v.parquet"):
        run(tmp_path / "s" / out, tmp_path / "s" / "a.tar")
        assert run(tmp_path / "s" / out, tmp_path / "s" / "a.tar")[1] == 0
    (tmp_path / "s" / "v.parquet").unlink()
    run(tmp_path / "s" / "vectors", tmp_path / "s" / "a.tar", tmp_path / "s")


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
    assert run(out, pictures, red_pictures(tmp_path / "more", 31))[1] == 1


def test_another_head_on_the_same_encoder_goes_on(entry: Path) -> None:
    def identity(**changed: str) -> dict[str, object]:
        found = read_entry(entry)
        found.prg.versions["1"] = found.prg.versions["1"].model_copy(update=changed)
        write_entry(entry, found)
        with closing(Local(entry)) as embedder:
            return embedder.identity

    before = identity()
    assert identity(model="0" * 64) == before
    assert identity(encoder="0" * 64) != before


@pytest.fixture
def url(entry: Path) -> Iterator[str]:
    with served(Settings(model_repository=entry.parent)) as address:
        yield f"http://{address}"


def test_a_service_gives_the_same(
    pictures: Path, tmp_path: Path, url: str, entry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "\udcff.png").write_bytes(png())
    options = ["--feature", "state", "--normalize", "--t-end", "0.25"]
    for where, name in ((["--entry", str(entry)], "a.npy"), (["--url", url], "b.npy")):
        assert main(["embed", str(pictures), *where, *options, "--out", str(tmp_path / name)]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("32 images", "31", "bad.jpg", ".txt"))
        assert "._00" not in shown
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert np.allclose(a, b, equal_nan=True, atol=1e-6)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    with closing(Remote(url, None, {})) as service, closing(Local(entry)) as here:
        assert service.identity == here.identity
    with Client(url) as client:
        assert client.embed([pictures / "\udcff.png"]).vectors[0] == pytest.approx([1, 0, 0, 0.8])


def test_weights_replaced_meanwhile_are_not_mixed(pictures: Path, tmp_path: Path, url: str) -> None:
    with closing(Remote(url, None, {})) as service:
        service.identity["fingerprint"] = "0" * 12
        with pytest.raises(DataError, match="replaced"):
            embed(Job([str(pictures)], str(tmp_path / "v")), service)
    assert not (tmp_path / "v" / "_SUCCESS").exists()


def test_a_key_that_is_missing_is_named(tmp_path: Path, entry: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\nscopes = ["infer"]\n')
    settings = Settings(model_repository=entry.parent, api_keys_file=keys)
    with served(settings) as address, pytest.raises(DataError, match="PRG_KEY"):
        Remote(f"http://{address}", None, {})


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("/none --out a --entry models/tiny", "/none"),
        ("empty --out a --entry models/tiny", "empty"),
        ("empty --out a.csv --entry models/tiny", "a.csv"),
        ("empty --out a.npy --entry models/tiny --shard 0/2", "--shard"),
        ("empty --out a --entry /none", "config.pbtxt"),
        ("empty --out a --entry models/tiny --t-end 2", "--t-end"),
        ("empty --out a --entry models/tiny --model x", "--url"),
        ("nosuch://x/ --out a --entry models/tiny", "nosuch"),
        ("full --out pictures --entry models/tiny", "--out"),  # somebody else's files
    ],
)
def test_errors_are_explained(
    command: str,
    named: str,
    tmp_path: Path,
    pictures: Path,
    entry: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    red_pictures(tmp_path / "empty")
    red_pictures(tmp_path / "full", 1)
    assert main(["embed", *command.split()]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
