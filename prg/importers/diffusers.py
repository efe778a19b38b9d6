"""Noise predictors of Hugging Face diffusers: a UNet2DModel trained as a DDPM, as a network of the `vp` path."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prg.console import note
from prg.errors import CheckpointError
from prg.importers.imported import Imported, read_tensors
from prg.recipe import load_recipe
from prg.unet import UNetConfig

TIMES = 1000
WEIGHTS = "diffusion_pytorch_model"
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""Of the plain weights, the preferred ones first; a variant has its name in between."""
Positive = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


Table = TypeVar("Table", bound=_Table)


class Schedule(_Table):
    """The schedule that the `vp` path is in continuous time; keys that a DDPM never leaves out have no default."""

    class_name: Literal[
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ] = Field(alias="_class_name")
    """Samplers of networks that were trained on such a schedule."""
    beta_schedule: Literal["linear"]
    beta_start: Annotated[float, Field(ge=1e-4, le=1e-4)]
    beta_end: Annotated[float, Field(ge=0.02, le=0.02)]
    num_train_timesteps: Literal[1000]
    prediction_type: Literal["epsilon"] = "epsilon"
    trained_betas: None = None
    rescale_betas_zero_snr: Literal[False] = False
    use_flow_sigmas: Literal[False] = False


class Network(_Table):
    """What a UNet2DModel must be, and its shape; where its configuration leaves out a key, diffusers' default."""

    model_config = ConfigDict(extra="forbid")

    class_name: Literal["UNet2DModel"] = Field(alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: None = None
    act_fn: Literal["silu"] = "silu"
    resnet_time_scale_shift: Literal["default"] = "default"
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    mid_block_scale_factor: Literal[1] = 1
    add_attention: Literal[True] = True
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    attn_norm_num_groups: None = None
    class_embed_type: None = None
    num_class_embeds: None = None
    dropout: Any = None
    num_train_timesteps: Any = None
    """These two do not change its answers."""
    sample_size: Positive
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (224, 448, 672, 896)
    down_block_types: tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...] = (
        "DownBlock2D",
        *("AttnDownBlock2D",) * 3,
    )
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    layers_per_block: Positive = 2
    attention_head_dim: Positive | None = 8
    norm_num_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    downsample_padding: Literal[0, 1] = 1
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0)] = 0

    @field_validator("sample_size", mode="before")
    @classmethod
    def _one_side(cls, value: object) -> object:
        """A pair (height, width) says the same where both are equal."""
        if not isinstance(value, list) or len(value) != 2:
            return value
        if value[0] != value[1]:
            raise ValueError("images are square here")
        return value[0]


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
    config, version = _read(home / "config.json", Network)
    unet = network_config(config, home / "config.json")
    places = (folder, folder / "scheduler", folder.parent / "scheduler")
    schedules = [p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()]
    if not schedules:
        raise CheckpointError(
            f"{folder}: no scheduler_config.json, which says what the network was trained on; save it beside"
        )
    _read(schedules[0], Schedule)
    source, tensors = _read_weights(home)
    given = {
        "network": asdict(unet),
        "image": {"size": unet.image_size, "resize": unet.image_size, "mean": [0.5] * 3, "std": [0.5] * 3},
        "encoder": {"path": "vp"},
    }
    net = convert(tensors, unet, config.flip_sin_to_cos, source)
    return Imported(load_recipe(recipe, overrides, given), source, "diffusers", version, net)


def network_config(config: Network, where: Path) -> UNetConfig:
    """Our network of the shape that diffusers' configuration describes. Raises CheckpointError."""
    widths, down = config.block_out_channels, config.down_block_types
    mirrored = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    if config.up_block_types != mirrored or len(down) != len(widths):
        raise CheckpointError(
            f"{where}: blocks {', '.join(down)} and {', '.join(config.up_block_types)}; accepted is one for each of "
            "block_out_channels, and the same upwards in reverse"
        )
    if any(w % widths[0] for w in widths):
        raise CheckpointError(
            f"{where}: block_out_channels {widths}; accepted are multiples of the first of them"
        )
    try:
        return UNetConfig(
            image_size=config.sample_size,
            channels=widths[0],
            multipliers=tuple(w // widths[0] for w in widths),
            blocks=config.layers_per_block,
            attention=tuple(2**i for i, kind in enumerate(down) if kind == "AttnDownBlock2D"),
            heads=1,
            groups=config.norm_num_groups,
            head_channels=config.attention_head_dim or 0,
            scale_shift=False,
            eps=config.norm_eps,
            pad_after=config.downsample_padding == 0,
            times=TIMES,
            freq_shift=config.freq_shift,
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


def _read(path: Path, kind: type[Table]) -> tuple[Table, str]:
    """(a configuration that diffusers' save_pretrained wrote, diffusers' version). Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the folder that diffusers' save_pretrained wrote")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a table of keys is needed, this is {found!r}")
    # diffusers' own notes begin with _; the rest may change what is computed.
    table = {k: v for k, v in found.items() if not k.startswith("_") or k == "_class_name"}
    try:
        return kind.model_validate_json(json.dumps(table)), str(found.get("_diffusers_version", ""))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise CheckpointError(f"{path}: no DDPM that can be reversed here ({'; '.join(wrong)})") from None


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """(the file, or the index of its shards, and the tensors): the plain ones, else the one variant, such as fp16."""
    plain = [folder / f"{WEIGHTS}{ending}" for ending in ENDINGS]
    there = sorted(p for p in folder.glob(f"{WEIGHTS}*") if p.suffix in (".safetensors", ".bin", ".json"))
    shards = [p for p in there if "-of-" in p.name]
    variants = [p for p in there if p not in shards]
    variants = [p for p in variants if ".safetensors" in p.name] or variants
    found = [p for p in plain if p in there][:1] or variants
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise CheckpointError(f"{folder}: weights of several variants: {names}; leave the one to import")
    if not found:
        lone = f", which lists the shards that are there, such as {shards[0].name}" if shards else ""
        needed = plain[1].name if shards else f"{plain[0].name} or {plain[2].name}"
        raise CheckpointError(f"{folder}: no weights; {needed} is needed{lone}")
    path = found[0]
    if path not in plain:
        note(f"{path}: a variant of the weights, as exact as it was saved")
    return path, _read_shards(path) if path.suffix == ".json" else _read_file(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted({Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index}: no index of weights, whose weight_map has each tensor's file"
        ) from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index}: lists {', '.join(missing)}, which is not there; all its files are needed"
        )
    return {k: tensor for name in names for k, tensor in _read_file(index.parent / name).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    tensors = read_tensors(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise CheckpointError(f"{path}: not a table of tensors by name")
    return tensors
