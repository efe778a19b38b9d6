"""Two processes train what one does, and end together."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import image_folder, overrides

from prg.checkpoint import Checkpoint, load_checkpoint
from prg.cli import main

ROOT = Path(__file__).parents[2]
PATIENCE_S = 900
"""Far more than any of these takes, also on a busy machine; far less than processes wait for each other."""
PROGRAM = """
import os, signal, sys, time, prg.cli, prg.training.loop as loop
real, rank = loop.Trainer.advance, int(os.environ["RANK"])
def advance(self):
    if self.step == 3:
        {}
    return real(self)
loop.Trainer.advance = advance
status = prg.cli.main(sys.argv[1:])
names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
left = [name for name in names if "gloo" in name]
sys.exit(f"threads of the group are left: {{left}}" if left else status)
"""
"""The command, with something happening before the fourth step; an error if threads outlive the group of processes."""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "photos")


def free_port() -> int:
    """A port of this test process's own: none that the system gives to others meanwhile."""
    for port in count(20_000 + os.getpid() % 10_000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError


def meeting(rank: int | None, port: int) -> dict[str, str]:
    """The environment that a launcher gives to each of two processes; none for a launcher itself."""
    own = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    if rank is not None:
        own |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **own}


def in_two(folder: Path, command: list[str], happening: str = "pass") -> list[tuple[int, str]]:
    """Exit status and words of each of two processes; none outlives this."""
    folder.mkdir(exist_ok=True)
    port, running, logs = free_port(), [], [folder / f"{rank}.log" for rank in range(2)]
    program = [sys.executable, "-c", PROGRAM.format(happening), *command]
    until = time.monotonic() + PATIENCE_S
    try:
        for rank, log in enumerate(logs):
            how: dict[str, Any] = {"stderr": subprocess.STDOUT, "cwd": ROOT, "env": meeting(rank, port)}
            with log.open("w") as out:
                running.append(subprocess.Popen(program, stdout=out, **how))
        statuses = [process.wait(until - time.monotonic()) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


@contextmanager
def launched(log: Path, *program: str) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with two processes; none outlives this."""
    ours = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    program = (sys.executable, "-m", "torch.distributed.run", *ours, *program)
    with log.open("w") as out:
        process = subprocess.Popen(program, stdout=out, stderr=subprocess.STDOUT, env=meeting(None, 0))
    try:
        yield process
    finally:
        process.terminate()  # which it hands on, and waits; processes that it left would stay
        process.wait()


def final(run: Path, kind: str) -> Checkpoint:
    return load_checkpoint(run / kind / "checkpoint.safetensors")


def distance(a: Checkpoint, b: Checkpoint) -> float:
    """Of the weights, relative."""
    x, y = (torch.cat([v.flatten() for v in c.part("model").values()]) for c in (a, b))
    return float((x - y).norm() / y.norm())


def test_stopped_and_continued_they_are_the_run_of_one(tmp_path: Path, photos: Path) -> None:
    settings = ["--recipe", "images-32", "--data", str(photos), *overrides("encoder.path=otcfm")]
    alone, two, stopped = tmp_path / "alone", tmp_path / "two", tmp_path / "stopped"
    assert main(["pretrain", str(alone), *settings]) == 0
    (status, said), (other, heard) = in_two(tmp_path, ["pretrain", str(two), *settings])
    assert (status, other) == (0, 0), said + heard
    assert "next: prg finetune" in said
    assert heard == ""
    assert distance(final(two, "pretrain"), final(alone, "pretrain")) < 1e-3
    told = "if rank == 1: os.kill(os.getpid(), signal.SIGTERM)"
    for status, said in in_two(tmp_path, ["pretrain", str(stopped), *settings], told):
        assert status == 130, said
        assert "stopped at step 4 of " in said
    assert final(stopped, "pretrain").facts.trained.step == 4
    assert [status for status, _ in in_two(tmp_path, ["pretrain", str(stopped)])] == [0, 0]
    a, b = final(stopped, "pretrain"), final(two, "pretrain")
    assert [k for k in a.tensors if not torch.equal(a.tensors[k], b.tensors[k])] == []
    frozen = in_two(tmp_path, ["finetune", str(two), "--freeze"])
    assert [status for status, _ in frozen] == [0, 0], frozen
    assert final(two, "finetune").facts.cross_validated is not None


def test_a_whole_experiment_by_the_launcher(tmp_path: Path, photos: Path) -> None:
    settings = ["--data", str(photos), *overrides("finetune.beta=0.1", "finetune.epochs=2")]
    alone, two, log = tmp_path / "alone", tmp_path / "two", tmp_path / "log"
    assert main(["pretrain", str(alone), "--recipe", "images-32", *settings]) == 0
    assert main(["finetune", str(alone)]) == 0
    with launched(log, "-m", "prg.cli", "reproduce", "images-32", str(two), *settings) as process:
        status = process.wait(PATIENCE_S)
    said = log.read_text()
    assert status == 0, said
    for name in ("pretrain", "finetune", "export", "evaluate"):
        assert said.count(f"{name}: done\n") == 1, said
    for kind in ("pretrain", "finetune"):
        assert distance(final(two, kind), final(alone, kind)) < 1e-3
    assert final(two, "finetune").facts.trained.device.endswith(", 2 processes")


@pytest.mark.parametrize(
    "how", ["raise SystemExit('a number too much')", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_where_one_fails_all_end(tmp_path: Path, photos: Path, how: str) -> None:
    """Within a minute: the launcher ends the others, and a collective notices who is gone."""
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(PROGRAM.format(f"if rank == 1: {how}"))
    command = ["pretrain", str(tmp_path / "run"), "--recipe", "images-32", "--data", str(photos)]
    until = time.monotonic() + PATIENCE_S
    with launched(log, str(program), *command, *overrides()) as process:
        while "failed" not in log.read_text():  # so the launcher has noticed
            assert time.monotonic() < until
            time.sleep(0.2)
        assert process.wait(60) != 0
    assert "trained: " not in log.read_text()
    assert not subprocess.run(["pgrep", "-f", str(program)], capture_output=True).stdout


@pytest.mark.parametrize(("words", "more"), [("bad.png", []), ("pretrain.batch = 7", ["pretrain.batch=7"])])
def test_what_is_refused_is_refused_in_both(tmp_path: Path, words: str, more: list[str]) -> None:
    photos = image_folder(tmp_path / "photos", splits=("train",))
    if words == "bad.png":
        (photos / "train" / "red" / "bad.png").write_text("no image")
    command = ["pretrain", str(tmp_path / "run"), "--recipe", "images-32", "--data", str(photos)]
    (status, said), (other, heard) = in_two(tmp_path, [*command, *overrides(*more)])
    assert (status, other) == (1, 1), said + heard
    assert words in said
    assert more or words in heard  # what only the first has seen
    assert "Traceback" not in said + heard
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_what_one_process_does_is_refused_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["evaluate", str(tmp_path)], ["export", str(tmp_path), str(tmp_path / "entry")]):
        assert main(command) == 1
        assert "WORLD_SIZE" in capsys.readouterr().err
    monkeypatch.delenv("RANK", raising=False)
    assert main(["pretrain", str(tmp_path)]) == 1
    assert "RANK" in capsys.readouterr().err
