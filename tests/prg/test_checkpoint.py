"""Checkpoints: whole or absent, and refused with the path and the fix."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from workshop import largest_file

from prg.checkpoint import (
    FORMAT,
    Checkpoint,
    Facts,
    Imported,
    load_checkpoint,
    load_strictly,
    read_facts,
    save_checkpoint,
)
from prg.errors import CheckpointError
from prg.recipe import load_recipe

FACTS = Facts(
    stage="pretrain",
    recipe=load_recipe("images-32"),
    imported=Imported(origin="somebody", file="ä.pt", sha256="0" * 64, version="7"),
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a" / "c.safetensors"
    tensors = {
        "model.w": torch.randn(3, 4).t(),
        "average.w": torch.zeros(()),
        "model.b": torch.ones(2).bfloat16(),
    }
    save_checkpoint(path, Checkpoint(tensors, FACTS))
    found = load_checkpoint(path)
    assert found.facts == FACTS
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in tensors.items())
    assert found.part("model").keys() == {"w", "b"}


def test_a_disk_that_is_full_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, Checkpoint({"w": torch.ones(1)}, FACTS))
    with largest_file(4096), pytest.raises((CheckpointError, OSError)):
        save_checkpoint(path, Checkpoint({"w": torch.zeros(10_000)}, FACTS))
    assert load_checkpoint(path).tensors["w"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_not_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"

    def refused() -> None:
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_checkpoint(path)

    refused()
    path.write_bytes(b"nonsense")
    refused()
    save_file({"w": torch.ones(1)}, path)
    refused()
    save_checkpoint(path, Checkpoint({}, FACTS))
    path.write_bytes(path.read_bytes()[:-4])
    refused()


@pytest.mark.parametrize("version", ["1", FORMAT])
def test_facts_of_another_version_are_refused(tmp_path: Path, version: str) -> None:
    """A key that is missing must not become its default, nor an old format be guessed at."""
    path, table = tmp_path / "c.safetensors", FACTS.model_dump(mode="json")
    recipe = {k: v for k, v in table["recipe"].items() if k != "serve"}
    older = [{k: v for k, v in table.items() if k != "held_out"}, table | {"recipe": recipe}]
    for facts in older if version == FORMAT else [table]:
        save_file({"w": torch.ones(1)}, path, {"format": version, "prg": json.dumps(facts)})
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_facts(path)
    save_file({"w": torch.ones(1)}, path, {"format": FORMAT, "prg": json.dumps(table)})
    assert read_facts(path) == FACTS


def test_facts_from_before_columns_had_names_are_read(tmp_path: Path) -> None:
    path, table = tmp_path / "c.safetensors", FACTS.model_dump(mode="json")
    for key in ("image_column", "label_column"):
        del table["recipe"]["data"][key]
    save_file({"w": torch.ones(1)}, path, {"format": FORMAT, "prg": json.dumps(table)})
    assert read_facts(path) == FACTS


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"weight": torch.ones(2, 2)}, "bias"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, r"bias: \(3,\).*\(2,\)"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2), "other": torch.ones(1)}, "other"),
    ],
)
def test_loading_is_strict(tensors: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_strictly(torch.nn.Linear(2, 2), tensors, Path("c.safetensors"))
