"""`prg embed --engine ray`, on a real cluster of two workers."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

from ray import cloudpickle

from prg.embed import partitions
from prg.embed.cluster import OnRay
from prg.embed.local import Local
from prg.embed.outputs import Job, check, embed, read_file
from tests.tiny import red_pictures, write_tiny_entry

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers don't know this module


class Killed(Local):
    """Its process is killed, once, in the midst of the work."""

    def __init__(self, entry: Path, marker: Path) -> None:
        super().__init__(entry)
        self.marker = marker

    def embed(self, prepared: list[np.ndarray]) -> list[np.ndarray | str]:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed(prepared)


class Broken(Local):
    def prepare(self, content: bytes) -> np.ndarray:
        raise RuntimeError("a bug")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty images, one of them none, in groups of about eight."""
    monkeypatch.setattr(partitions, "ROWS", 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = red_pictures(tmp_path / "photos", *range(30))
    (folder / "00.png").write_bytes(b"no image")
    return folder


def test_a_worker_that_is_killed_costs_no_row(photos: Path, tmp_path: Path) -> None:
    entry, marker, out = write_tiny_entry(tmp_path / "models"), tmp_path / "killed", tmp_path / "vectors"
    job = Job([str(photos)], str(out))
    check(job)
    make = partial(Killed, entry, marker)
    done = embed(job, Local(entry), OnRay(str(out), make))
    assert marker.exists()
    assert (done.complete, done.summary.images, done.summary.failed) == (True, 30, 1)
    _, rows = read_file(out)
    assert sorted(Path(name).stem for name in rows.ids) == [f"{i:02}" for i in range(30)]
    reds = [int(Path(name).stem) * 8 / 255 or np.nan for name in rows.ids]
    assert rows.vectors[:, 0] == pytest.approx(reds, abs=1e-6, nan_ok=True)
    assert embed(job, Local(entry), OnRay(str(out), make)).summary.computed == 0


def test_a_failure_in_a_worker_is_the_job_s(photos: Path, tmp_path: Path) -> None:
    entry, out = write_tiny_entry(tmp_path / "models"), str(tmp_path / "vectors")
    with pytest.raises(RuntimeError, match="a bug"):
        embed(Job([str(photos)], out), Local(entry), OnRay(out, partial(Broken, entry)))
    assert not (tmp_path / "vectors" / "_SUCCESS").exists()
