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
from tests.tiny import png, write_tiny_entry

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
    """Can't go on."""

    def prepare(self, content: bytes) -> np.ndarray:
        raise RuntimeError("a bug")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty images, one of them none, in groups of about eight."""
    monkeypatch.setattr(partitions, "ROWS", 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.png").write_bytes(png((i * 6, 0, 0)) if i else b"no image")
    return folder


def test_a_worker_that_is_killed_costs_no_row(photos: Path, tmp_path: Path) -> None:
    entry, marker, out = write_tiny_entry(tmp_path / "models"), tmp_path / "killed", str(tmp_path / "vectors")
    job = Job([str(photos)], out)
    check(job)
    make = partial(Killed, entry, marker)
    done = embed(job, Local(entry), OnRay(out, make))
    assert marker.exists()
    assert (done.complete, done.summary.images, done.summary.failed) == (True, 40, 1)
    embed(Job([str(photos)], str(tmp_path / "here.npy")), Local(entry))
    there, here = ((rows.ids, rows.vectors) for _, rows in map(read_file, (Path(out), tmp_path / "here.npy")))
    assert sorted(there[0]) == sorted(here[0])
    order = [there[0].index(name) for name in here[0]]
    assert np.allclose(there[1][order], here[1], atol=1e-6, equal_nan=True)
    assert embed(job, Local(entry), OnRay(out, make)).summary.computed == 0


def test_a_failure_in_a_worker_is_the_job_s(photos: Path, tmp_path: Path) -> None:
    entry, out = write_tiny_entry(tmp_path / "models"), str(tmp_path / "vectors")
    with pytest.raises(RuntimeError, match="a bug"):
        embed(Job([str(photos)], out), Local(entry), OnRay(out, partial(Broken, entry)))
    assert not (tmp_path / "vectors" / "_SUCCESS").exists()
