"""Training: the same whatever interrupts it."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workshop import image_folder, overrides

from prg.checkpoint import load_checkpoint, read_facts
from prg.cli import main
from prg.errors import CheckpointError
from prg.machine import training_precision
from prg.recipe import Pretrain
from prg.training import loop, pretrain, processes
from prg.training.loop import batch_at
from prg.training.optimisers import learning_rate

PATIENT = (
    "import prg.training.loop as l, prg.cli, sys; l.SAVE_EVERY_S = 0; sys.exit(prg.cli.main(sys.argv[1:]))"
)
"""The command, saving after every step."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "photos")


def pretraining(run: Path, photos: Path, *more: str) -> list[str]:
    return ["pretrain", str(run), "--recipe", "images-32", "--data", str(photos), *overrides(*more)]


def step_of(run: Path) -> int:
    try:
        trained = read_facts(run / "pretrain" / "checkpoint.safetensors").trained
    except CheckpointError:
        return 0
    assert trained is not None
    return trained.step


def interrupted(command: list[str], run: Path, number: signal.Signals) -> int:
    """Start the command, send the signal once it is under way; its exit status."""
    begun = step_of(run)
    process = subprocess.Popen([sys.executable, "-c", PATIENT, *command], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while step_of(run) < begun + 5:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait(30)


def test_a_run_killed_and_resumed_is_the_run_that_was_not(tmp_path: Path, photos: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    epochs = "pretrain.epochs=30"
    assert main(pretraining(whole, photos, epochs)) == 0
    assert interrupted(pretraining(killed, photos, epochs), killed, signal.SIGKILL) == -signal.SIGKILL
    reached, steps = step_of(killed), step_of(whole)
    assert interrupted(["pretrain", str(killed)], killed, signal.SIGTERM) == 130
    assert reached <= step_of(killed) < steps
    assert main(["pretrain", str(killed)]) == 0
    a, b = (load_checkpoint(r / "pretrain" / "checkpoint.safetensors") for r in (whole, killed))
    assert step_of(whole) == step_of(killed) == steps
    assert a.tensors.keys() == b.tensors.keys()
    assert [k for k in a.tensors if not torch.equal(a.tensors[k], b.tensors[k])] == []
    lines = [json.loads(line) for line in (killed / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    for name in ("curves.png", "samples.png", "trajectory.png"):
        assert (killed / "pretrain" / name).stat().st_size > 1000


def test_other_settings_are_not_mixed_into_a_run(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(pretraining(tmp_path, photos, "pretrain.epochs=1")) == 0
    assert main(pretraining(tmp_path, photos, "pretrain.epochs=1", "pretrain.lr=0.5")) == 1
    assert "pretrain.lr was 0.001, is 0.5" in capsys.readouterr().err
    assert json.loads((tmp_path / "recipe.json").read_text())["pretrain"]["lr"] == 0.001
    assert (
        main(
            [
                "finetune",
                str(tmp_path),
                "--recipe",
                "images-64",
                "--data",
                str(photos),
                "--set",
                "data.enlarge=true",
            ]
        )
        == 1
    )
    assert "network was 'tiny16', is 'small64'" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    real = loop.Trainer.loss

    def spoiled(self: loop.Trainer, step: int) -> torch.Tensor:
        return real(self, step) * (math.nan if step == 4 else 1)

    monkeypatch.setattr(loop.Trainer, "loss", spoiled)
    assert main(pretraining(tmp_path, photos)) == 1
    assert "the loss is nan at step 4" in capsys.readouterr().err
    assert step_of(tmp_path) == 4


def test_two_do_not_train_in_one_folder(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with processes.exclusive(tmp_path / "pretrain"):
        assert main(pretraining(tmp_path, photos)) == 1
        assert "another process is training here" in capsys.readouterr().err
    assert main(pretraining(tmp_path, photos, "pretrain.epochs=1")) == 0


def test_batches_of_an_epoch_are_a_permutation() -> None:
    for epoch in range(2):
        seen = np.concatenate([batch_at(24, 8, 5, 3 * epoch + i) for i in range(3)])
        assert sorted(seen) == list(range(24))
    assert not np.array_equal(batch_at(24, 8, 5, 0), batch_at(24, 8, 5, 3))
    assert sorted(batch_at(5, 8, 5, 2)) == list(range(5))


def test_learning_rate_rises_and_falls() -> None:
    config = Pretrain(epochs=1, lr=1.0, lr_min=0.1, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [("avx2 avx512f avx512_bf16", "bf16"), ("avx2 amx_bf16", "bf16"), ("avx2 avx512f", "fp32"), ("", "fp32")],
)
def test_precision_is_what_the_processor_has_units_for(
    monkeypatch: pytest.MonkeyPatch, flags: str, chosen: str
) -> None:
    monkeypatch.setattr("prg.machine._cpuinfo", lambda: {"flags": flags})
    cpu = torch.device("cpu")
    assert training_precision("auto", cpu) == chosen
    assert training_precision("bf16", cpu) == "bf16"
    assert training_precision("fp32", cpu) == "fp32"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_a_compiled_network_trains_as_the_plain_one(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(pretrain, "BACKEND", backend)
    plain, quick = tmp_path / "plain", tmp_path / "quick"
    short = ("pretrain.epochs=1", "finetune.epochs=1")
    made = []
    for run, more in ((plain, ()), (quick, ("pretrain.compile=true", "finetune.compile=true"))):
        assert main(pretraining(run, photos, *short, *more)) == 0
        made.append(len(graphs))
        assert main(["finetune", str(run)]) == 0
        made.append(len(graphs))
    # the velocity; then the velocity and the activations: nothing is compiled anew for validation and figures
    assert made == [0, 0, 1, 3]
    for kind in ("pretrain", "finetune"):
        a, b = (load_checkpoint(run / kind / "checkpoint.safetensors") for run in (plain, quick))
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.allclose(a.tensors[k], b.tensors[k], atol=1e-4) for k in a.tensors)


def test_a_missing_checkpoint_names_path_and_fix(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = pretraining(tmp_path, photos)
    assert main(["finetune", *command[1:]]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "pretrain" / "checkpoint.safetensors") in error
    assert "prg pretrain" in error
