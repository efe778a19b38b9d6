"""Training: the same whatever interrupts it."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workshop import CHECKPOINT, image_folder, new_run, overrides

from prg.checkpoint import load_checkpoint, read_facts
from prg.errors import CheckpointError, ProcessError, TrainingError
from prg.machine import training_precision
from prg.recipe import Pretrain
from prg.training import loop, pretrain, processes
from prg.training.finetune import finetune
from prg.training.loop import batch_at
from prg.training.optimisers import learning_rate
from prg.training.run import open_run

PATIENT = (
    "import prg.training.loop as l, prg.cli, sys; l.SAVE_EVERY_S = 0; sys.exit(prg.cli.main(sys.argv[1:]))"
)
"""The command, saving after every step."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "photos")


STAGES = ("pretrain", "finetune")


def step_of(run: Path) -> int:
    try:
        trained = read_facts(run / "pretrain" / CHECKPOINT).trained
    except CheckpointError:
        return 0
    assert trained is not None
    return trained.step


def interrupted(command: list[str], run: Path, number: signal.Signals) -> int:
    begun = step_of(run)
    process = subprocess.Popen([sys.executable, "-c", PATIENT, *command], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while step_of(run) < begun + 5:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait(30)


def test_a_run_killed_and_resumed_is_the_run_that_was_not(tmp_path: Path, photos: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain.pretrain(new_run(whole, photos, "pretrain.epochs=30"))
    begin = ["--recipe", "images-32", "--data", str(photos), *overrides("pretrain.epochs=30")]
    assert interrupted(["pretrain", str(killed), *begin], killed, signal.SIGKILL) == -signal.SIGKILL
    reached, steps = step_of(killed), step_of(whole)
    assert interrupted(["pretrain", str(killed)], killed, signal.SIGTERM) == 130
    assert reached <= step_of(killed) < steps
    pretrain.pretrain(open_run(killed))
    a, b = (load_checkpoint(run / "pretrain" / CHECKPOINT) for run in (whole, killed))
    assert step_of(whole) == step_of(killed) == steps
    assert a.tensors.keys() == b.tensors.keys()
    assert [k for k in a.tensors if not torch.equal(a.tensors[k], b.tensors[k])] == []
    lines = [json.loads(line) for line in (killed / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    for name in ("curves.png", "samples.png", "trajectory.png"):
        assert (killed / "pretrain" / name).stat().st_size > 1000


def test_other_settings_are_not_mixed_into_a_run(tmp_path: Path, photos: Path) -> None:
    short = "pretrain.epochs=1"
    pretrain.pretrain(new_run(tmp_path, photos, short))
    with pytest.raises(CheckpointError, match=r"pretrain\.lr was 0\.001, is 0\.5"):
        pretrain.pretrain(new_run(tmp_path, photos, short, "pretrain.lr=0.5"))
    assert open_run(tmp_path).recipe.pretrain.lr == 0.001
    other = open_run(tmp_path, "images-64", [f"data.source={photos}"])
    with pytest.raises(CheckpointError, match="network was 'tiny16', is 'small64'"):
        finetune(other)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    real = loop.Trainer.loss

    def spoiled(self: loop.Trainer, step: int) -> torch.Tensor:
        return real(self, step) * (math.nan if step == 4 else 1)

    monkeypatch.setattr(loop.Trainer, "loss", spoiled)
    with pytest.raises(TrainingError, match=r"nan at step 4"):
        pretrain.pretrain(new_run(tmp_path, photos))
    assert step_of(tmp_path) == 4


def test_two_do_not_train_in_one_folder(tmp_path: Path, photos: Path) -> None:
    run = new_run(tmp_path, photos, "pretrain.epochs=1")
    with pytest.raises(CheckpointError, match=f"{run.pretrained}: .*prg pretrain"):
        finetune(run)
    with processes.exclusive(tmp_path / "pretrain"), pytest.raises(ProcessError, match=str(tmp_path)):
        pretrain.pretrain(run)
    pretrain.pretrain(run)


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
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_precision_is_what_the_processor_has_units_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, chosen in (("avx512f avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512f", "fp32")):
        monkeypatch.setattr("prg.machine._cpuinfo", lambda: {"flags": f"avx2 {flags}"})  # noqa: B023
        found = [training_precision(asked, torch.device("cpu")) for asked in ("auto", "bf16", "fp32")]
        assert found == [chosen, "bf16", "fp32"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_a_compiled_network_trains_as_the_plain_one(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, made, runs = [], [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(pretrain, "BACKEND", backend)
    for compiled in ("false", "true"):
        short = [f"{stage}.{key}" for stage in STAGES for key in ("epochs=1", f"compile={compiled}")]
        runs.append(new_run(tmp_path / compiled, photos, *short))
        for train in (pretrain.pretrain, finetune):
            train(runs[-1])
            made.append(len(graphs))
    # the velocity; then the velocity and the activations: nothing is compiled anew for validation and figures
    assert made == [0, 0, 1, 3]
    for stage in STAGES:
        a, b = (load_checkpoint(run.folder / stage / CHECKPOINT) for run in runs)
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.allclose(a.tensors[k], b.tensors[k], atol=1e-4) for k in a.tensors)
