"""The half hour on a GPU, as far as a processor can tell: stopped by its clock, continued, joined from its parts."""

import io
import json
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from entry.runner import Runner
from examples import half_hour
from prg.checkpoint import read_facts
from prg.recipe import load_recipe
from prg.training.figures import loss_curve
from prg.training.finetune import build_classifier
from prg.training.loop import Trainer
from tests.prg.workshop import CLASSES, SETTINGS


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A call with 48 images to train on and 12 to be judged by; probes and parts are small."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 20), ("test", 4)):
        rows: dict[str, list[object]] = {"image": [], "label": []}
        for label, colour in enumerate(CLASSES.values()):
            for _ in range(each):
                noisy = (np.array(colour) + rng.integers(-40, 40, (16, 16, 3))).clip(0, 255)
                buffer = io.BytesIO()
                Image.fromarray(noisy.astype(np.uint8)).save(buffer, "PNG")
                rows["image"].append({"bytes": buffer.getvalue(), "path": None})
                rows["label"].append(label)
        (tmp_path / "colours").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "colours" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(half_hour, "PROBE_S", 0.1)
    monkeypatch.setattr(half_hour, "PART_BYTES", 100_000)
    flags = [part for item in SETTINGS for part in ("--set", item)]
    where = [
        "--data",
        str(tmp_path / "colours"),
        "--run",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "out"),
    ]
    return [*where, "--recipe", "images-32", "--name", "colours", *flags]


def joined(tmp_path: Path, name: str) -> Path:
    """What the parts hold, joined by the commands that the program's own text says."""
    folder = tmp_path / name
    folder.mkdir()
    [command] = [line for line in (half_hour.__doc__ or "").splitlines() if line.startswith("cat ")]
    for part in (tmp_path / "out").iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    subprocess.run(["bash", "-ec", command], cwd=folder, check=True, capture_output=True)
    return folder / "result"


def test_stopped_by_its_clock_and_continued_it_ends_with_entries_in_parts(
    call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert half_hour.main([*call, "--sitting", "0.001"]) == 75  # before any training
    assert "NOT DONE: make the same call again" in capsys.readouterr().out
    assert json.loads((joined(tmp_path, "first") / "report.json").read_text())["stages"] == {}

    advance = Trainer.advance

    def struck(trainer: Trainer) -> float:
        loss = advance(trainer)
        if trainer.step == 5 and trainer.job.config.epochs < 1000:  # not the probe's
            signal.raise_signal(signal.SIGALRM)  # as the clock does
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", struck)
        assert half_hour.main(call) == 75
    run = tmp_path / "run"
    # the step under way when the system delivers the signal, which it may do a moment later
    assert 5 <= read_facts(run / "pretrain" / "checkpoint.safetensors")["step"] < 12
    settled = json.loads((run / "half-hour.json").read_text())
    assert settled["epochs"] == {"pretrain": 2.0}  # the recipe's: they fit
    early = joined(tmp_path, "second")
    assert Runner(early / "colours-pretrained").entry.prg.labels is None
    assert not (early / "colours").exists()

    assert half_hour.main(call) == 0
    assert capsys.readouterr().out.endswith("DONE\n")
    assert json.loads((run / "half-hour.json").read_text()) == settled | {
        "epochs": {"pretrain": 2.0, "finetune": 6.0}
    }
    assert len(list((tmp_path / "out").glob("result.tar.[0-9][0-9]"))) > 1
    result = joined(tmp_path, "third")
    runner = Runner(result / "colours")
    answers = runner.run(np.zeros((2, 3, 16, 16), np.uint8), np.full(2, 0.8, np.float32))
    assert answers.logits is not None
    assert answers.logits.shape == (2, 3)
    [accuracy] = runner.entry.prg.versions["1"].accuracy
    assert accuracy.data == "colours/test"
    report = json.loads((result / "report.json").read_text())
    assert report["accuracy"] == accuracy.model_dump()
    assert report["devices"]["within_tolerance"]
    assert {name: s["step"] for name, s in report["stages"].items()} == {"pretrain": 12, "finetune": 36}
    assert (result / "finetune" / "metrics.jsonl").read_text() == (
        run / "finetune" / "metrics.jsonl"
    ).read_text()


def test_what_does_not_fit_is_lowered_and_a_second_call_keeps_it(call: list[str], tmp_path: Path) -> None:
    hours = ["--minutes", "0.01", "--set", "pretrain.epochs=1000000"]
    assert half_hour.main([*call, *hours]) == 0
    run = tmp_path / "run"
    checkpoint = (run / "finetune" / "checkpoint.safetensors").read_bytes()
    assert json.loads((run / "half-hour.json").read_text())["epochs"] == {"pretrain": 1.0, "finetune": 1.0}
    assert half_hour.main([*call, *hours]) == 0
    assert (run / "finetune" / "checkpoint.safetensors").read_bytes() == checkpoint


def test_an_error_is_explained(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call[1] = str(tmp_path / "nothing")
    assert half_hour.main(call) == 1
    assert f"{tmp_path / 'nothing'}: no such folder" in capsys.readouterr().err


def test_where_matplotlib_is_missing_there_is_no_curve_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2.0}\n')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        loss_curve(tmp_path)
    assert "curves.png: not drawn, matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()
    loss_curve(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_the_recipe_makes_an_entry_that_can_be_carried() -> None:
    """Its weights, rounded and compressed as an entry's are, stay under 15 MB."""
    recipe = load_recipe("cifar10-gpu")
    rounded = [
        p.detach().bfloat16().float().numpy().tobytes() for p in build_classifier(recipe, 10).parameters()
    ]
    assert len(zlib.compress(b"".join(rounded))) < 14.5e6
    assert max(recipe.finetune.t_end) <= 0.9
    assert recipe.encoder.steps <= 2
