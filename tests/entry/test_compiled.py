"""Modules compiled for this processor, by the real compiler where there is one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entry import compile as by_process
from entry import compiled
from entry.runner import Runner
from tests.tiny import write_tiny_entry

ROOT = Path(__file__).parents[2]
MOST = 2
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_batch_is_split_into_what_is_compiled_and_one_rest(rows: int, most: int) -> None:
    sizes = compiled.batch_sizes(most)
    parts = compiled.split(rows, sizes)
    assert sum(parts) == rows
    assert all(part in sizes for part in parts[:-1])
    assert compiled.split(rows, ()) == [rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with version 1 of a tiny entry of two versions, made as the service makes it."""
    work = tmp_path_factory.mktemp("compiled")
    directory = write_tiny_entry(work / "models", versions=("1", "2"))
    command = [sys.executable, "-m", "entry.compile", directory, "1", work / "cache", "--most", str(MOST)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(made, tmp_path / "work"))


@needs_compiler
@pytest.mark.slow
class TestCompiled:
    def test_answers_are_equal_at_every_batch_size(self, work: Path) -> None:
        plain, runner = (Runner(work / "models/tiny", "1") for _ in range(2))
        assert runner.use_compiled(work / "cache", MOST)
        assert list(runner.compiled) == [2, 1]
        assert [p.name for p in (work / "cache").iterdir()] == ["tiny-1"]
        for rows in (1, 2, 3, 5):
            images = np.random.default_rng(rows).integers(0, 256, (rows, 3, 32, 32), np.uint8)
            levels = np.linspace(0, 1, rows, dtype=np.float32)
            expected = plain.run(images, levels)
            for name, found in runner.run(images, levels).items():
                assert np.allclose(found, expected[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("spoil", ["damaged", "half written", "no facts", "torn facts", "other torch"])
    def test_what_can_not_be_trusted_is_removed(self, work: Path, spoil: str) -> None:
        directory = work / "cache" / "tiny-1"
        module, facts = directory / "1.so", directory / compiled.FACTS
        content = module.read_bytes()
        if spoil == "damaged":
            module.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        elif spoil == "half written":
            module.write_bytes(content[: len(content) // 2])
        elif spoil == "no facts":
            facts.unlink()
        elif spoil == "torn facts":
            facts.write_bytes(facts.read_bytes()[:40])
        else:
            facts.write_text(facts.read_text().replace('"torch": "', '"torch": "1'))
        runner = Runner(work / "models/tiny", "1")
        assert not runner.use_compiled(work / "cache", MOST)
        assert not runner.compiled
        assert not directory.exists()

    def test_another_model_under_the_same_name_is_removed(self, work: Path) -> None:
        directory = Path(shutil.move(work / "cache/tiny-1", work / "cache/tiny-2"))
        runner = Runner(work / "models/tiny", "2")
        assert not runner.use_compiled(work / "cache", MOST)
        assert not directory.exists()

    def test_one_with_other_answers_is_removed(self, work: Path) -> None:
        runner = Runner(work / "models/tiny", "2")
        directory = Path(shutil.move(work / "cache/tiny-1", work / "cache/tiny-2"))
        facts = json.loads((directory / compiled.FACTS).read_text())
        facts["facts"]["weights"] = runner.entry.prg.versions["2"].sha256
        (directory / compiled.FACTS).write_text(json.dumps(facts))
        assert compiled.is_good(directory, facts["facts"])
        assert not runner.use_compiled(work / "cache", MOST)
        assert not directory.exists()


@needs_compiler
def test_a_compilation_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    directory, cache = write_tiny_entry(tmp_path / "models"), tmp_path / "cache"
    command = [sys.executable, "-m", "entry.compile", directory, "1", cache]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(cache.glob(".*/inductor/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert os.listdir(cache) == []
    assert by_process.Runner(directory).use_compiled(cache, MOST) is False
