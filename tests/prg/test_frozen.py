"""Few labels: a head on a frozen encoder, begun from a checkpoint or an entry."""

import json
import shutil
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
from prg.training.run import Run, open_run


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
    chosen = read_facts(run.finetuned).cross_validated
    assert chosen is not None
    best = min(rows, key=lambda row: row["loss"])
    assert tuple(row["penalty"] for row in rows) == run.recipe.finetune.penalties
    assert (chosen.penalty, chosen.top1) == (best["penalty"], best["top1"])
    entry = exported(run.folder, tmp_path / "mine")
    assert f"penalty {chosen.penalty:g}" in (entry / "MODEL_CARD.md").read_text()
    assert evaluate(entry, evaluated(entry, photos)[1], "photos").accuracy.top1 > 0.9


def test_again_or_with_a_renamed_image_changes_nothing_and_other_settings_are_refused(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(photos, tmp_path / "photos")
    first = min((other / "train" / "red").iterdir())
    first.rename(first.with_name("zzz.png"))
    folder = shutil.copytree(run.folder, tmp_path / "run")
    finetune(open_run(folder))
    finetune(open_run(folder, None, [f"data.source={other}"]))
    with pytest.raises(CheckpointError, match=r"finetune\.freeze"):
        finetune(open_run(folder, None, ["finetune.freeze=false"]))
    assert open_run(folder).finetuned.read_bytes() == run.finetuned.read_bytes()


@pytest.mark.parametrize("begin", ["checkpoint", "finetune", "pretrain"])
def test_what_it_can_begin_from(run: Run, photos: Path, tmp_path: Path, begin: str) -> None:
    """A fine-tuning, or an entry of either stage."""
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
    wider = "network={image_size=16, channels=16, multipliers=[1, 2], groups=4}"
    for changes, named in (
        (("network=small32", "image.size=32", "image.resize=32"), r"image\.size is 16 .*32"),
        (("image.mean=[0.5, 0.5, 0.5]",), r"image\.mean"),
        (("encoder.path=gvp",), r"encoder\.path .*'icfm'.*'gvp'"),
        ((wider,), "network=tiny16"),
    ):
        with pytest.raises(CheckpointError, match=named):
            finetune(new_run(tmp_path / "other", photos, *FREEZE, *changes), entry)
    assert not (tmp_path / "other" / "recipe.json").exists()


def test_what_the_head_reads_and_its_levels_are_the_recipes(run: Run, photos: Path, tmp_path: Path) -> None:
    head_input = "finetune.head_input=['state', 'middle_block.mean']"
    changes = (*FREEZE, head_input, "finetune.t_end=[0.8, 0.5]", "finetune.penalties=[0.01]")
    other = new_run(tmp_path, photos, *changes)
    finetune(other, run.pretrained)
    model, facts = load_trained(other.finetuned)
    assert model.head.columns == [(0, 768), (768 + 80, 768 + 96)]
    assert facts.recipe.finetune.t_end == (0.8, 0.5)


def test_folds_are_stratified_and_hold_each_row_out_once() -> None:
    labels = np.repeat([0, 1, 2], [10, 7, 23])
    folds = list(stratified_folds(labels, 5, seed=3))
    assert (np.sum(folds, axis=0) == 1).all()
    for label, count in enumerate((10, 7, 23)):
        held = [int((labels[fold] == label).sum()) for fold in folds]
        assert max(held) - min(held) <= 1, (label, count, held)


def test_a_class_of_one_image_is_named(run: Run, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", each=4, splits=("train",))
    for i in range(3):
        (photos / "train" / "red" / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"\bred\b"):
        finetune(new_run(tmp_path / "run", photos, *FREEZE), run.pretrained)
