"""A recipe: everything that defines one experiment, typed and checked before any work begins."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal
from unicodedata import normalize

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from entry.config import FeatureName, ImageSpec
from prg.classifier import HeadConfig, HeadKind, columns
from prg.encoder import Encoder, EncoderConfig
from prg.errors import RecipeError
from prg.recipes import read_shipped, shipped_recipes
from prg.unet import PRESETS, UNet, UNetConfig

Augmentation = Literal["flip", "crop", "resized_crop", "randaugment", "erase"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A share or a decay, from 0 to below 1."""
Level = Annotated[float, Field(ge=0, le=1)]
"""From 0 (noise) to 1 (the image)."""


class Section(BaseModel):
    """A frozen table of keys; an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    """Where the images come from and how they are split."""

    source: str = ""
    """A dataset name on the Hugging Face hub, a folder of parquet files, or a folder of images (one sub-folder
    a class, or images alone for pretraining)."""
    train: str = "train"
    test: str = ""
    """The split that is read once, by `prg evaluate`. Empty: test, else validation, else the images held out."""
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the training split that is held out from training, to choose by."""
    image_column: str = ""
    label_column: str = ""
    """Of parquet, which columns are read. Empty: as the files say."""
    labels: tuple[str, ...] = ()
    """Class names as served, in the order of the data's class ids. Empty: the data's own names."""
    skip_unreadable: bool = False
    """Leave out files that are no usable images, instead of refusing the whole."""
    enlarge: bool = False
    """Take images that are smaller than the network's size, and enlarge them."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Data":
        # As they are compared.
        if not all(self.labels) or len({normalize("NFC", name) for name in self.labels}) != len(self.labels):
            raise ValueError(f"labels = {self.labels}: a name of its own for each class is needed")
        return self


class Image(Section):
    """How an image becomes the network's input; mean and std are ImageNet's unless given."""

    size: Annotated[int, Field(ge=1)] = 32
    resize: Annotated[int, Field(ge=1)] = 32
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _crop_fits(self) -> "Image":
        if self.resize < self.size:
            raise ValueError(f"resize = {self.resize} is below size = {self.size}")
        return self

    @property
    def spec(self) -> ImageSpec:
        """The same facts, as they go into an entry."""
        return ImageSpec(size=self.size, resize=self.resize, preprocessing="v2", mean=self.mean, std=self.std)


class Optimisation(Section):
    """What both kinds of training need."""

    epochs: Positive
    batch: Annotated[int, Field(ge=1)] = 128
    optimiser: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonal momentum for convolution kernels, AdamW for the rest."""
    lr: Positive = 1e-3
    lr_min: NotNegative = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: BelowOne = 0.05
    """Share of all steps over which the learning rate rises from 0."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: NotNegative = 0.01
    clip: NotNegative = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    ema: BelowOne = 0.999
    """Decay of the averaged weights, which are the ones used afterwards; 0: no average."""
    augment: tuple[Augmentation, ...] = ("flip",)
    """In this order, each image by its own draw."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device has units for it, else fp32."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at first, then faster steps on some GPUs; no gain on processors."""

    @model_validator(mode="after")
    def _rate_falls(self) -> "Optimisation":
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min = {self.lr_min}: a number from 0 to lr = {self.lr} is needed")
        return self


class Pretrain(Optimisation):
    """Flow matching on images without labels."""


class Finetune(Optimisation):
    """Encoder and head together, through the reverse ODE, by label-smoothed cross-entropy; or the head alone."""

    t_end: Annotated[tuple[BelowOne, ...], Field(min_length=1)] = (0.8,)
    """Levels the head is trained at, one drawn per image; the first is the default when serving. (1 would be no
    reverse solve.)"""
    head_input: Annotated[tuple[str, ...], Field(min_length=1)] = ("state", "middle_block.mean")
    """What the head reads: "state", "hidden" (all of it), or parts of it, a layer and a pooling."""
    head: HeadKind = "mlp"
    label_smoothing: BelowOne = 0.1
    beta: NotNegative = 0.0
    """Weight of the flow-matching loss, added so that the encoder stays a flow (the paper's objective)."""
    mixup: NotNegative = 0.0
    """Parameter of mixup's Beta distribution; 0: none."""
    cutmix: NotNegative = 0.0
    """The same of cutmix; where both are set, each image gets one of them."""
    freeze: bool = False
    """Keep the encoder and fit a linear head alone: features are computed once (and those of mirrored images, if
    `augment` has flip), then the head is fitted to all of them at once. Made for few labels: minutes."""
    penalties: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """With `freeze`: weights of the squared norm of the head's matrix; cross-validation chooses one."""
    save_memory: bool = True
    """Checkpoint every network evaluation: the same gradient, less memory, a third more time."""

    @field_validator("head_input", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _frozen_is_linear(self) -> "Finetune":
        trained = [key for key in ("beta", "mixup", "cutmix") if getattr(self, key)]
        if self.freeze and trained:
            raise ValueError(f"{trained[0]} = {getattr(self, trained[0])}: with freeze it must be 0")
        if self.freeze and self.head != "linear":
            raise ValueError(f"head = {self.head!r}: with freeze it must be 'linear'")
        return self


class Serve(Section):
    """What /embed answers with when it is not asked for anything else."""

    t_end: Level = 0.8
    feature: FeatureName = "embedding"


class Recipe(Section):
    """One experiment."""

    about: str
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    network: str | UNetConfig
    """A preset's name, or a table of the network's shape."""
    pretrain: Pretrain
    finetune: Finetune
    data: Data = Data()
    image: Image = Image()
    encoder: EncoderConfig = EncoderConfig()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if isinstance(self.network, str) and self.network not in PRESETS:
            raise ValueError(f"network = {self.network!r}: choose one of {', '.join(PRESETS)}")
        if self.unet.image_size != self.image.size:
            raise ValueError(
                f"image.size = {self.image.size}, but network = {self.network!r} takes {self.unet.image_size}"
            )
        with torch.device("meta"):  # shapes alone, to know the names of its blocks
            encoder = Encoder(UNet(self.unet), self.encoder)
        columns(encoder, self.finetune.head_input)
        return self

    @property
    def unet(self) -> UNetConfig:
        """The network's shape."""
        return PRESETS[self.network] if isinstance(self.network, str) else self.network

    def without_source(self) -> "Recipe":
        """The recipe as a checkpoint holds it: a folder may move, and a path is nobody else's business."""
        nowhere = {"source": "", "image_column": "", "label_column": ""}
        return self.model_copy(update={"data": self.data.model_copy(update=nowhere)})

    def head(self, classes: int) -> HeadConfig:
        """The head's shape, for so many classes."""
        return HeadConfig(classes, self.finetune.head_input, self.finetune.head)


def load_recipe(
    name: str, overrides: Iterable[str] = (), given: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Recipe:
    """A shipped recipe by name, or a TOML (or a run's JSON) file by path.

    A recipe with `extends = "NAME"` holds only what differs from that one.
    overrides: `section.key=value`, the value in TOML's notation, or a bare word for a string.
    given: keys by section that replace the file's own, such as those that an imported network decides.
    Raises RecipeError for a file that is missing or does not parse, an unknown key, a wrong type or value.
    """
    table = _over(_table(name), {section: dict(keys) for section, keys in given.items()})
    for item in overrides:
        _override(table, item)
    return parse_recipe(table, name)


def parse_recipe(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from its table; `where` names it in errors. Raises RecipeError."""
    try:
        return Recipe.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(map(_explained, error.errors()))}") from None


def _explained(error: Any) -> str:
    """One of pydantic's errors: the key, its value, what is wrong with it."""
    key = ".".join(str(k) for k in error["loc"]) or "the recipe"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: {message} (known keys: {', '.join(_known_keys(error['loc']))})"
    value = "" if error["type"] in ("value_error", "missing") else f" = {error['input']!r}"
    return f"{key}{value}: {message}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    section: Any = Recipe.model_fields[str(location[0])].annotation if len(location) > 1 else Recipe
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return [field.name for field in fields(UNetConfig if location[0] == "network" else section)]


def _table(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's table, over that of the recipe it extends."""
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        if name not in shipped_recipes():
            raise RecipeError(
                f"no recipe {name!r}: give a .toml file or one of {', '.join(shipped_recipes())}"
            )
        text = read_shipped(name)
    elif not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    else:
        text = path.read_bytes()
    try:
        table: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text.decode())
    except ValueError as error:
        raise RecipeError(f"{name}: not valid {path.suffix[1:] or 'toml'}: {error}") from None
    if not isinstance(table, dict):
        raise RecipeError(f"{name}: a recipe is a table of keys, this is {table!r}")
    base = table.pop("extends", None)
    if base is None:
        return table
    if isinstance(base, str) and Path(base).suffix in (".toml", ".json"):
        base = str(path.parent / base)
    if not isinstance(base, str) or base in (*seen, name):
        raise RecipeError(
            f"{name}: extends = {base!r}: name another recipe, and not one that extends this one"
        )
    return _over(_table(base, (*seen, name)), table)


def _over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `table` in place of its own, section by section."""
    both = {
        k: _over(base[k], v)
        for k, v in table.items()
        if isinstance(v, dict) and isinstance(base.get(k), dict)
    }
    return {**base, **table, **both}


def _override(table: dict[str, Any], item: str) -> None:
    key, found, value = item.partition("=")
    if not found:
        raise RecipeError(f"--set {item}: write it as section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *sections, last = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {item}: {section} is not a section")
    table[last] = parsed
