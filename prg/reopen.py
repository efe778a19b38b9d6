"""An entry's encoder and head as eager modules again, to fit an embedding to them anew; also of format 1."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from entry.config import (
    Entry,
    EntryError,
    OldFormatError,
    Version,
    check_weights,
    parse_prg,
    read_config,
    read_entry,
)
from prg.classifier import Head, HeadConfig, HeadKind
from prg.encoder import Encoder, EncoderConfig
from prg.unet import PRESETS, UNet, UNetConfig, fitting_presets

NET = "encoder.solver.velocity.net"


@dataclass(frozen=True)
class Reopened:
    """One version of an entry."""

    entry: Entry
    version: Version
    module: Any
    """As TorchScript has it."""
    encoder: Encoder
    head: Head | None = None
    head_input: tuple[str, ...] = ()
    """What the head reads."""


def reopen(directory: Path) -> Reopened:
    """An entry's highest version. Where it is of format 1, HIDDEN is what a recipe has by default today.

    Raises EntryError.
    """
    try:
        entry, old = read_entry(directory), False
    except OldFormatError:
        entry, old = _upgraded(directory), True
    prg, version = entry.prg, entry.prg.versions[entry.default_version]
    path = check_weights(directory, entry, entry.default_version)
    module = torch.jit.load(str(path), map_location="cpu")
    tensors = {k.removeprefix("classifier."): v for k, v in module.state_dict().items()}
    weights = part(tensors, NET)
    net = UNet(_network(version.training.get("network"), weights, directory))
    net.load_state_dict(weights)
    hidden = prg.features.hidden
    layers = _with_default(net, hidden.layers) if old else hidden.layers
    pooling = EncoderConfig.pooling if old else hidden.pooling
    config = TypeAdapter(EncoderConfig).validate_python(
        {"path": prg.path, "solver": prg.solver, "steps": prg.steps, "layers": layers, "pooling": pooling}
    )
    encoder = Encoder(net, config, save_memory=False)
    if prg.labels is None:
        return Reopened(entry, version, module, encoder)
    reads = tuple(version.training.get("head_input", ()))
    if old:
        means = tuple(f"{layer}.mean" for layer in hidden.layers)
        reads = {"state": ("state",), "hidden": means, "both": ("state", *means)}[module.classifier.input]
    if not reads:
        raise EntryError(f"{directory}: does not say what its head reads; export it from its run")
    kind: HeadKind = "mlp" if "head.classifier.3.weight" in tensors else "linear"
    head = Head(encoder, HeadConfig(len(prg.labels), reads, kind))
    head.load_state_dict(part(tensors, "head"))
    return Reopened(entry, version, module, encoder, head, reads)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a name, in float32 where they are floats."""
    start = prefix + "."
    return {
        k.removeprefix(start): v.float() if v.is_floating_point() else v
        for k, v in tensors.items()
        if k.startswith(start)
    }


def _with_default(net: UNet, layers: tuple[str, ...]) -> tuple[str, ...]:
    names = net.block_names()
    numbers = {*net.block_numbers(EncoderConfig.layers), *net.block_numbers(layers)}
    return tuple(names[number] for number in sorted(numbers))


def _network(described: Any, weights: dict[str, Tensor], directory: Path) -> UNetConfig:
    """The network's shape: as the entry describes it, or else the preset that its weights fit."""
    if isinstance(described, str) and described in PRESETS:
        return PRESETS[described]
    if isinstance(described, dict):
        return TypeAdapter(UNetConfig).validate_python(described)
    fitting = fitting_presets(weights)
    if not fitting:
        raise EntryError(
            f"{directory}: its network is none of {', '.join(PRESETS)}, and the entry does not describe it; "
            "export it from its run"
        )
    return PRESETS[fitting[0]]


def _upgraded(directory: Path) -> Entry:
    """An entry of format 1 as one of format 2, but for its digests of content."""
    table = json.loads(read_config(directory).parameters["prg"].string_value)
    table["format"] = 2
    table["image"]["preprocessing"] = "v2"
    table["features"]["hidden"]["pooling"] = ["mean"]
    for version in table["versions"].values():
        version |= {"encoder": "0" * 64, "model": "0" * 64, "held_out": version["training"].get("held_out")}
    return Entry(directory.name, parse_prg(json.dumps(table), str(directory / "config.pbtxt")))
