"""Cores of a container."""

from pathlib import Path

import pytest

from service import cores as module
from service.cores import cores


def test_a_quota_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    found = [cores()]
    for text in ("max 100000", "250000 100000", "50000 100000", "1600000 100000"):
        module.QUOTA.write_text(text + "\n")
        found.append(cores())
    assert found == [8, 8, 3, 1, 8]
