"""Checkpoints: whole or absent, and refused with the path and the fix."""

import json
import re
from pathlib import Path
from typing import Any

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
    tensors = {"model.w": torch.randn(3, 4).t(), "average.w": torch.zeros(())}
    tensors["model.b"] = torch.ones(2).bfloat16()
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


def test_facts_of_another_version_are_refused(tmp_path: Path) -> None:
    """A key that is missing must not become its default, nor an old format be guessed at."""
    path, table = tmp_path / "c.safetensors", FACTS.model_dump(mode="json")
    recipe, data = table["recipe"], table["recipe"]["data"]

    def write(facts: dict[str, Any], version: str = FORMAT) -> None:
        save_file({"w": torch.ones(1)}, path, {"format": version, "prg": json.dumps(facts)})

    def without(table: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {k: v for k, v in table.items() if k not in keys}

    for facts, version in (
        (table, "1"),
        (without(table, "held_out"), FORMAT),
        (table | {"recipe": without(recipe, "serve")}, FORMAT),
    ):
        write(facts, version)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_facts(path)
    # As from before columns had names.
    write(table | {"recipe": recipe | {"data": without(data, "image_column", "label_column")}})
    assert read_facts(path) == FACTS


def test_loading_is_strict() -> None:
    weight, bias = torch.ones(2, 2), torch.ones(2)
    for tensors, named in (
        ({"weight": weight}, "bias"),
        ({"weight": weight, "bias": torch.ones(3)}, r"bias: \(3,\).*\(2,\)"),
        ({"weight": weight, "bias": bias, "other": bias}, "other"),
    ):
        with pytest.raises(CheckpointError, match=named):
            load_strictly(torch.nn.Linear(2, 2), tensors, Path("c.safetensors"))
