"""Two processes train what one does, and end together."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

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
            with log.open("w") as out:
                running.append(
                    subprocess.Popen(
                        program, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=meeting(rank, port)
                    )
                )
        statuses = [process.wait(until - time.monotonic()) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


def until_failure(log: Path) -> None:
    """Wait until the launcher has noticed that a process failed."""
    until = time.monotonic() + PATIENCE_S
    while "failed" not in log.read_text():
        assert time.monotonic() < until
        time.sleep(0.2)


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


def test_what_stops_the_first_is_told_by_both(tmp_path: Path, photos: Path) -> None:
    other = shutil.copytree(photos, tmp_path / "photos")
    (other / "train" / "red" / "0.png").write_bytes(b"no picture")
    settings = ["--recipe", "images-32", "--data", str(other), *overrides()]
    for status, said in in_two(tmp_path, ["pretrain", str(tmp_path / "run"), *settings]):
        assert status == 1, said
        assert "0.png: " in said


def test_a_whole_experiment_by_the_launcher(tmp_path: Path, photos: Path) -> None:
    settings = ["--data", str(photos), *overrides("finetune.beta=0.1", "finetune.epochs=2")]
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert main(["pretrain", str(alone), "--recipe", "images-32", *settings]) == 0
    assert main(["finetune", str(alone)]) == 0
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "prg.cli", "reproduce", "images-32", str(two), *settings],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=meeting(None, 0),
        )
    try:
        status = process.wait(PATIENCE_S)
    finally:
        process.send_signal(signal.SIGTERM)  # which it hands on, and waits; processes that it left would stay
        process.wait()
    said = log.read_text()
    assert status == 0, said
    for name in ("pretrain", "finetune", "export", "evaluate"):
        assert said.count(f"{name}: done\n") == 1, said
    for kind in ("pretrain", "finetune"):
        assert distance(final(two, kind), final(alone, kind)) < 1e-3
    assert final(two, "finetune").facts.trained.device.endswith(", 2 processes")


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_where_one_fails_all_end(tmp_path: Path, photos: Path, how: str) -> None:
    """Within a minute: the launcher ends the others, and a collective notices who is gone."""
    happening = "if rank == 1: " + (
        "os.kill(os.getpid(), signal.SIGKILL)" if how == "killed" else "raise SystemExit('a number too much')"
    )
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(happening))
    command = [
        "pretrain",
        str(tmp_path / "run"),
        "--recipe",
        "images-32",
        "--data",
        str(photos),
        *overrides(),
    ]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(program), *command],
            stderr=subprocess.STDOUT,
            stdout=out,
            env=meeting(None, 0),
            start_new_session=True,
        )
    try:
        until_failure(tmp_path / "log")
        assert process.wait(60) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "trained: " not in (tmp_path / "log").read_text()
    assert not subprocess.run(["pgrep", "-f", str(program)], capture_output=True).stdout


@pytest.mark.parametrize("what", ["a file that is no image", "a batch of 7"])
def test_what_is_refused_is_refused_in_both(tmp_path: Path, what: str) -> None:
    photos = image_folder(tmp_path / "photos", each=20, splits=("train",))
    if "file" in what:
        (photos / "train" / "red" / "bad.png").write_text("no image")
        words, more = "bad.png", []
    else:
        words, more = "pretrain.batch = 7", ["pretrain.batch=7"]
    command = ["pretrain", str(tmp_path / "run"), "--recipe", "images-32", "--data", str(photos)]
    (status, said), (other, heard) = in_two(tmp_path, [*command, *overrides(*more)])
    assert (status, other) == (1, 1), said + heard
    assert words in said
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
