"""Noise predictors of Hugging Face diffusers: a UNet2DModel trained as a DDPM, as a network of the `vp` path."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prg.checkpoint import CheckpointError
from prg.importers.imported import Imported, read_tensors
from prg.recipe import load_recipe
from prg.unet import UNetConfig

TIMES = 1000
SCHEDULE: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": TIMES,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}
"""The schedule that the `vp` path is in continuous time; keys that a config leaves out are taken to be so."""
STATED = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
"""Keys that a config of a DDPM's schedule never leaves out."""
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""Samplers of networks that were trained on such a schedule."""
NETWORK: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "num_class_embeds": None,
}
"""What the network must be, and is where its config does not say; the rest of the config is its shape."""
SHAPE: dict[str, Any] = {
    "sample_size": None,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
"""diffusers' defaults, for configs that leave keys out."""
IGNORED = ("dropout", "num_train_timesteps")
"""Keys of the network's config that its answers do not depend on."""


def _number(x: Any, least: int = 1) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _list(x: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and bool(x) and all(map(good, x))


TYPES: dict[str, Callable[[Any], bool]] = {
    "sample_size": _number,
    "block_out_channels": lambda x: _list(x, _number),
    "down_block_types": lambda x: _list(x, lambda name: isinstance(name, str)),
    "up_block_types": lambda x: _list(x, lambda name: isinstance(name, str)),
    "layers_per_block": _number,
    "attention_head_dim": lambda x: x is None or _number(x),
    "norm_num_groups": _number,
    "norm_eps": lambda x: isinstance(x, float) and x > 0,
    "freq_shift": lambda x: _number(x, 0),
}
"""What a value of the shape must be to be one."""
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention as older versions of diffusers named it; many published files still do."""


def import_diffusers(folder: Path, recipe: str, overrides: Iterable[str] = ()) -> Imported:
    """Read a folder that diffusers saved, of a network or of a whole DDPM pipeline.

    The recipe says how to reverse and fine-tune it; what the folder decides (network, size, normalisation,
    path) replaces the recipe's own. Raises CheckpointError for what is no DDPM that we can reverse.
    """
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _read_json(home / "config.json")
    unet = network_config(config, home / "config.json")
    places = (folder, folder / "scheduler", folder.parent / "scheduler")
    schedules = [p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()]
    if not schedules:
        raise CheckpointError(
            f"{folder}: no scheduler_config.json, which says what the network was trained on; save it beside"
        )
    _demand_schedule(_read_json(schedules[0]), schedules[0])
    source, tensors = _read_weights(home)
    given = {
        "network": asdict(unet),
        "image": {"size": unet.image_size, "resize": unet.image_size, "mean": [0.5] * 3, "std": [0.5] * 3},
        "encoder": {"path": "vp"},
    }
    origin = {"from": "diffusers", "version": config.get("_diffusers_version")}
    flipped = config.get("flip_sin_to_cos", SHAPE["flip_sin_to_cos"])
    return Imported(
        load_recipe(recipe, overrides, given), source, origin, convert(tensors, unet, flipped, source)
    )


def network_config(config: dict[str, Any], where: Path) -> UNetConfig:
    """Our network of the shape that diffusers' config describes. Raises CheckpointError."""
    _demand(config, NETWORK, where)
    unknown = [k for k in config if k not in NETWORK and k not in SHAPE and k not in IGNORED and k[0] != "_"]
    if unknown:
        raise CheckpointError(f"{where}: unknown keys {', '.join(unknown)}; they may change what it computes")
    shape = SHAPE | config
    for key, good in TYPES.items():
        if not good(shape[key]):
            raise CheckpointError(f"{where}: {key} is {shape[key]!r}, which is none that a network can have")
    widths, down, up = (shape[k] for k in ("block_out_channels", "down_block_types", "up_block_types"))
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    mirrored = [k.replace("Down", "Up") for k in reversed(down)]
    if not set(down) <= set(kinds) or up != mirrored or len(down) != len(widths):
        raise CheckpointError(
            f"{where}: blocks {', '.join(down)} and {', '.join(up)}; accepted are {' and '.join(kinds)}, "
            "one for each of block_out_channels, and the same upwards in reverse"
        )
    if any(w % widths[0] for w in widths):
        raise CheckpointError(
            f"{where}: block_out_channels {widths}; accepted are multiples of the first of them"
        )
    if shape["downsample_padding"] not in (0, 1):
        raise CheckpointError(
            f"{where}: downsample_padding is {shape['downsample_padding']!r}; accepted are 0 and 1"
        )
    try:
        return UNetConfig(
            image_size=shape["sample_size"],
            channels=widths[0],
            multipliers=tuple(w // widths[0] for w in widths),
            blocks=shape["layers_per_block"],
            attention=tuple(2**i for i, kind in enumerate(down) if kind == kinds[1]),
            heads=1,
            groups=shape["norm_num_groups"],
            head_channels=shape["attention_head_dim"] or 0,
            scale_shift=False,
            eps=shape["norm_eps"],
            pad_after=shape["downsample_padding"] == 0,
            times=TIMES,
            freq_shift=shape["freq_shift"],
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def convert(
    tensors: dict[str, Tensor], config: UNetConfig, cos_first: bool, where: Path
) -> dict[str, Tensor]:
    """Weights of a UNet2DModel under our names. Raises CheckpointError for a missing or an unknown name."""
    left = {_renamed(k): v for k, v in tensors.items()}
    found: dict[str, Tensor] = {}

    def take(theirs: str) -> Tensor:
        if theirs not in left:
            raise CheckpointError(f"{where}: no tensor {theirs}, which its config.json asks for")
        return left.pop(theirs)

    def layer(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            found[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")

    def attention(theirs: str, ours: str) -> None:
        layer(f"{theirs}.group_norm", f"{ours}.norm")
        layer(f"{theirs}.to_out.0", f"{ours}.proj_out")
        layers = {kind: [take(f"{theirs}.to_{k}.{kind}") for k in "qkv"] for kind in ("weight", "bias")}
        channels = len(layers["bias"][0])
        heads = channels // config.head_channels if config.head_channels else config.heads
        for kind, three in layers.items():  # heads before q, k, v: [heads, 3, channels / heads, …]
            split = [w.reshape(heads, channels // heads, -1) for w in three]
            found[f"{ours}.qkv.{kind}"] = torch.stack(split, dim=1).reshape(3 * channels, -1)
        found[f"{ours}.qkv.bias"] = found[f"{ours}.qkv.bias"].flatten()
        for name in ("qkv", "proj_out"):  # linear layers there, convolutions over positions here
            weight = found[f"{ours}.{name}.weight"]
            found[f"{ours}.{name}.weight"] = weight.reshape(len(weight), channels, 1)

    def resnet(theirs: str, ours: str) -> None:
        for a, b in RESNET.items():
            layer(f"{theirs}.{a}", f"{ours}.{b}")
        if f"{theirs}.conv_shortcut.weight" in left:
            layer(f"{theirs}.conv_shortcut", f"{ours}.skip_connection")

    rename = {"layer": layer, "resnet": resnet, "attention": attention}
    for kind, theirs, ours in _places(config):
        rename[kind](theirs, ours)
    if left:
        raise CheckpointError(f"{where}: tensors that its config.json has no place for: {', '.join(left)}")
    if not cos_first:  # sines first there: the linear layer after the embedding is turned instead
        weight = found["time_embed.0.weight"]
        found["time_embed.0.weight"] = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
    return {k: v.float() for k, v in found.items()}


def _places(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """(kind, their name, our name) of every part of the network."""
    levels = len(config.multipliers)
    yield from (
        ("layer", "time_embedding.linear_1", "time_embed.0"),
        ("layer", "time_embedding.linear_2", "time_embed.2"),
        ("layer", "conv_in", "input_blocks.0.0"),
        ("resnet", "mid_block.resnets.0", "middle_block.0"),
        ("attention", "mid_block.attentions.0", "middle_block.1"),
        ("resnet", "mid_block.resnets.1", "middle_block.2"),
        ("layer", "conv_norm_out", "out.0"),
        ("layer", "conv_out", "out.2"),
    )
    number = 1
    for i in range(levels):
        for j in range(config.blocks):
            yield "resnet", f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            if 2**i in config.attention:
                yield "attention", f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if i < levels - 1:
            yield "layer", f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for up, i in enumerate(reversed(range(levels))):
        for j in range(config.blocks + 1):
            yield "resnet", f"up_blocks.{up}.resnets.{j}", f"output_blocks.{number}.0"
            attended = 2**i in config.attention
            if attended:
                yield "attention", f"up_blocks.{up}.attentions.{j}", f"output_blocks.{number}.1"
            if i > 0 and j == config.blocks:
                yield (
                    "layer",
                    f"up_blocks.{up}.upsamplers.0.conv",
                    f"output_blocks.{number}.{1 + attended}.conv",
                )
            number += 1


def _renamed(name: str) -> str:
    """A tensor's name as diffusers gives it now."""
    if ".attentions." not in name:
        return name
    *path, layer, kind = name.split(".")
    return ".".join([*path, OLD_NAMES.get(layer, layer), kind])


def _demand_schedule(found: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError for the schedule of anything but a DDPM that predicts noise."""
    kind, absent = found.get("_class_name"), [key for key in STATED if key not in found]
    if kind not in SCHEDULERS or absent:
        lack = f" without {', '.join(absent)}" if absent else ""
        raise CheckpointError(
            f"{where}: a schedule of {kind}{lack}; accepted is a DDPM's, with {', '.join(STATED)}, of "
            f"{', '.join(SCHEDULERS)}"
        )
    _demand(found, SCHEDULE, where)


def _demand(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError that says what was found where it is not what is accepted; absent is the default."""
    wrong = [f"{k} is {found[k]!r}, accepted is {v!r}" for k, v in wanted.items() if found.get(k, v) != v]
    if wrong:
        raise CheckpointError(f"{where}: {'; '.join(wrong)}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the folder that diffusers' save_pretrained wrote")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a table of keys is needed, this is {found!r}")
    return found


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    name = "diffusion_pytorch_model"
    safe, pickled = folder / f"{name}.safetensors", folder / f"{name}.bin"
    if safe.is_file():
        try:
            return safe, load_file(safe)
        except SafetensorError as error:
            raise CheckpointError(f"{safe}: not a readable safetensors file ({error})") from None
    if not pickled.is_file():
        raise CheckpointError(f"{folder}: no weights; {safe.name} or {pickled.name} is needed")
    tensors = read_tensors(pickled)
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise CheckpointError(f"{pickled}: not a table of tensors by name")
    return pickled, tensors
