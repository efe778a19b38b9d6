"""A whole experiment by one command."""

import json
from pathlib import Path
from typing import Any

import pytest
from workshop import answer, image_folder, new_run, overrides

from entry.config import read_entry
from prg.commands.train import FREEZE
from prg.errors import CheckpointError, DataError
from prg.reproduce import reproduce


def test_all_stages_then_nothing_anew(tmp_path: Path) -> None:
    photos, folder = image_folder(tmp_path / "photos"), tmp_path / "run"

    def anew() -> tuple[set[str], dict[str, Any]]:
        """(the stages that were not done already, the figures)."""
        *stages, figures = reproduce(new_run(folder, photos))
        assert [line.split(":")[0] for line in stages] == ["pretrain", "finetune", "export", "evaluate"]
        return {line.split(":")[0] for line in stages if "already" not in line}, json.loads(figures)

    done, first = anew()
    assert done == {"pretrain", "finetune", "export", "evaluate"}
    entry = read_entry(folder / "entry")
    assert [a.model_dump() for a in entry.prg.versions["1"].accuracy] == [first]
    assert first["data"] == "photos/test"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert anew() == (set(), first)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    extra = photos / "test" / "red" / "0.png"
    extra.with_name("z.png").write_bytes(extra.read_bytes())
    done, grown = anew()
    assert done == {"evaluate"}
    assert grown["images"] == first["images"] + 1
    red, blue = (photos / "test" / name / "1.png" for name in ("red", "blue"))
    red.write_bytes(blue.read_bytes())  # as many, but not the same
    done, altered = anew()
    assert done == {"evaluate"}
    assert altered["top1"] < grown["top1"] == 1
    (folder / "finetune" / "curves.png").unlink()  # as a kill after the last step would leave it
    assert anew() == (set(), altered)
    assert (folder / "finetune" / "curves.png").exists()
    with pytest.raises(CheckpointError, match="seed was 0, is 3"):
        next(reproduce(new_run(folder, photos, "seed=3")))


def test_a_frozen_head_needs_a_split_to_be_evaluated_on(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", image_folder(tmp_path / "photos", splits=("train",)), *FREEZE)
    with pytest.raises(DataError, match="--freeze"):
        next(reproduce(run))
    assert not (tmp_path / "run" / "pretrain").exists()


def test_the_dry_run_tells_all_stages_and_begins_none(tmp_path: Path) -> None:
    photos, run = image_folder(tmp_path / "photos"), tmp_path / "run"
    printed = answer("reproduce", "images-32", run, "--data", photos, *overrides(), "--dry-run")
    rows = {w[0]: w[1:] for line in printed.splitlines() if (w := line.split())}
    assert rows["pretrain"][:2] == ["10", "0"]  # 42 images in batches of 8, twice
    assert rows["finetune"][:2] == ["30", "0"]
    assert rows["evaluate"][0] == "1"
    assert all(float(x) > 0 for name in ("pretrain", "finetune", "evaluate") for x in rows[name][2:])
    assert "TFLOP/s" in printed
    assert not run.exists()
