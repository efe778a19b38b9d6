"""Few labels: a head on a frozen encoder, begun from a checkpoint or an entry."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import answer, evaluated, exported, image_folder, new_run

from entry.config import read_entry
from prg.checkpoint import load_checkpoint, read_facts
from prg.commands.train import FREEZE
from prg.errors import CheckpointError, DataError
from prg.evaluation import evaluate
from prg.logistic import stratified_folds
from prg.reopen import NET
from prg.trained import load_trained
from prg.training.finetune import finetune
from prg.training.pretrain import pretrain
from prg.training.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Run:
    """A run that is pretrained, with a frozen fine-tuning."""
    run = new_run(tmp_path_factory.mktemp("run") / "mine", photos, *FREEZE)
    pretrain(run)
    answer("finetune", run.folder, "--freeze")
    return run


def test_the_encoder_is_the_pretrained_one_and_the_head_is_linear(run: Run) -> None:
    model, facts = load_trained(run.finetuned)
    before = load_checkpoint(run.pretrained).part("average")
    assert all(torch.equal(before[k], v) for k, v in model.encoder.net.state_dict().items())
    assert [type(m).__name__ for m in model.head.classifier] == ["LayerNorm", "Linear"]
    assert (facts.held_out, facts.trained.images) == (0, 120)  # type: ignore[union-attr]


def test_the_penalty_is_the_one_of_least_cross_validated_loss_and_on_the_card(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (run.folder / "finetune" / "metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["loss"])
    chosen = read_facts(run.finetuned).cross_validated
    assert (chosen.penalty, chosen.top1) == (best["penalty"], best["top1"])  # type: ignore[union-attr]
    assert tuple(row["penalty"] for row in rows) == run.recipe.finetune.penalties
    entry = exported(run.folder, tmp_path / "mine")
    assert f"penalty {best['penalty']:g}" in (entry / "MODEL_CARD.md").read_text()
    assert evaluate(entry, evaluated(entry, photos)[1], "photos").accuracy.top1 > 0.9


@pytest.mark.parametrize("begin", ["checkpoint", "finetune", "pretrain"])
def test_what_it_can_begin_from(run: Run, photos: Path, tmp_path: Path, begin: str) -> None:
    init = run.finetuned
    if begin != "checkpoint":
        init = exported(run.folder, tmp_path / "entry", begin)  # type: ignore[arg-type]
    other = new_run(tmp_path / "other", photos, *FREEZE, "encoder.steps=1")
    finetune(other, init)
    a, b = (load_checkpoint(path).part(f"average.{NET}") for path in (run.finetuned, other.finetuned))
    assert a
    assert all(torch.equal(a[k], b[k]) for k in a)
    published = exported(other.folder, tmp_path / "published")
    history = read_entry(published).prg.versions["1"].training["history"]
    assert any(line.startswith("entry: entry version 1 (") for line in history) == (begin != "checkpoint")
    assert history[0].startswith("pretrain:")


def test_an_entry_that_does_not_fit_says_why(run: Run, photos: Path, tmp_path: Path) -> None:
    entry = exported(run.folder, tmp_path / "entry")
    for changes, named in (
        ("network=small32 image.size=32 image.resize=32", r"image\.size is 16 .*32"),
        ("image.mean=[0.5,0.5,0.5]", r"image\.mean"),
        ("encoder.path=gvp", r"encoder\.path .*'icfm'.*'gvp'"),
        ("network={image_size=16,channels=16,multipliers=[1,2],groups=4}", "network=tiny16"),
    ):
        with pytest.raises(CheckpointError, match=named):
            finetune(new_run(tmp_path / "other", photos, *FREEZE, *changes.split()), entry)
    assert not (tmp_path / "other" / "recipe.json").exists()


def test_folds_are_stratified_and_hold_each_row_out_once() -> None:
    labels = np.repeat([0, 1, 2], [10, 7, 23])
    folds = np.array(list(stratified_folds(labels, 5, seed=3)))
    assert (folds.sum(0) == 1).all()
    for label in range(3):
        held = folds[:, labels == label].sum(1)
        assert held.max() - held.min() <= 1


def test_a_class_of_one_image_is_named(run: Run, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", each=4, splits=("train",))
    for i in range(3):
        (photos / "train" / "red" / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"\bred\b"):
        finetune(new_run(tmp_path / "run", photos, *FREEZE), run.pretrained)
