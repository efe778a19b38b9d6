"""A recipe: everything that defines one experiment, typed and checked before any work begins."""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from prg.classifier import HeadConfig
from prg.encoder import EncoderConfig
from prg.unet import PRESETS, UNet, UNetConfig

Augmentation = Literal["flip", "crop", "resized_crop", "randaugment", "erase"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RecipeError(ValueError):
    """A recipe that can't be used; the message names the file, the key and the fix."""


def _check(section: object, **needed: tuple[bool, str]) -> None:
    """Raise ValueError for the first key that is not (as needed, what is needed)."""
    for name, (fine, what) in needed.items():
        if not fine:
            raise ValueError(f"{name} = {getattr(section, name)}: {what} is needed")


@dataclass(frozen=True)
class Data:
    """Where the images come from and how they are split."""

    source: str = ""
    """A dataset name on the Hugging Face hub, a folder of parquet files, or a folder of images (one sub-folder
    a class, or images alone for pretraining)."""
    train: str = "train"
    test: str = ""
    """The split that is read once, by `prg evaluate`. Empty: test, else validation, else the images held back."""
    validation: float = 0.1
    """Share of the training split that is held back from training, to choose by."""
    labels: tuple[str, ...] = ()
    """Class names as served, in the order of the data's class ids. Empty: the data's own names."""
    skip_unreadable: bool = False
    """Leave out files that are no usable images, instead of refusing the whole."""
    enlarge: bool = False
    """Take images that are smaller than the network's size, and enlarge them."""

    def __post_init__(self) -> None:
        _check(
            self,
            validation=(0 < self.validation < 1, "a share above 0 and below 1"),
            labels=(
                all(self.labels) and len(set(self.labels)) == len(self.labels),
                "a name of its own a class",
            ),
        )


@dataclass(frozen=True)
class Image:
    """How an image becomes the network's input."""

    size: int = 32
    resize: int = 32
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check(
            self,
            mean=(all(map(math.isfinite, self.mean)), "a finite number a channel"),
            std=(all(0 < s < math.inf for s in self.std), "a number above 0 a channel"),
        )


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """What both kinds of training need."""

    epochs: float
    batch: int = 128
    optimiser: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonal momentum for convolution kernels, AdamW for the rest."""
    lr: float = 1e-3
    lr_min: float = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: float = 0.05
    """Share of all steps over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones used afterwards; 0: no average."""
    augment: tuple[Augmentation, ...] = ("flip",)
    """In this order, each image by its own draw."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: whichever a short probe finds faster on this machine."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at first, then faster steps on some GPUs; no gain on processors."""

    def __post_init__(self) -> None:
        _check(
            self,
            epochs=(0 < self.epochs < math.inf, "a number above 0"),
            batch=(self.batch > 0, "one image or more"),
            lr=(0 < self.lr < math.inf, "a number above 0"),
            lr_min=(0 <= self.lr_min <= self.lr, f"a number from 0 to lr = {self.lr}"),
            warmup=(0 <= self.warmup < 1, "a share from 0 to below 1"),
            betas=(all(0 <= b < 1 for b in self.betas), "a pair of numbers from 0 to below 1"),
            weight_decay=(0 <= self.weight_decay < math.inf, "0 or more"),
            clip=(0 <= self.clip < math.inf, "0 (not clipped) or more"),
            ema=(0 <= self.ema < 1, "a decay from 0 (no average) to below 1"),
        )


@dataclass(frozen=True, kw_only=True)
class Pretrain(Optimisation):
    """Flow matching on images without labels."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Optimisation):
    """Encoder and head together, through the reverse ODE, by label-smoothed cross-entropy; or the head alone."""

    t_end: tuple[float, ...] = (0.8,)
    """Levels the head is trained at, one drawn per image; the first is the default when serving."""
    head_input: Literal["state", "hidden", "both"] = "both"
    head: Literal["mlp", "linear"] = "mlp"
    label_smoothing: float = 0.1
    beta: float = 0.0
    """Weight of the flow-matching loss, added so that the encoder stays a flow (the paper's objective)."""
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution; 0: none."""
    cutmix: float = 0.0
    """The same of cutmix; where both are set, each image gets one of them."""
    freeze: bool = False
    """Keep the encoder and fit the head alone: features are computed once (and those of mirrored images, if
    `augment` has flip), then the head is fitted to all of them at once. Made for few labels: minutes."""
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """With `freeze`: weights of the squared norm of the head's matrices; the validation images choose one."""
    save_memory: bool = True
    """Checkpoint every network evaluation: the same gradient, less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.t_end or not all(0 <= t < 1 for t in self.t_end):
            raise ValueError(
                f"t_end = {self.t_end}: levels in [0, 1) are needed, 1 would be no reverse solve"
            )
        weights = ("beta", "mixup", "cutmix")
        _check(self, **{k: (0 <= getattr(self, k) < math.inf, "0 (none) or more") for k in weights})
        _check(self, label_smoothing=(0 <= self.label_smoothing < 1, "a share from 0 to below 1"))
        for name in weights:
            if self.freeze and getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)} goes with a trained encoder; freeze needs 0"
                )
        if self.freeze and (not self.penalties or not all(0 <= p < math.inf for p in self.penalties)):
            raise ValueError(f"penalties = {self.penalties}: at least one is needed, none below 0")


@dataclass(frozen=True)
class Serve:
    """What /embed answers with when it is not asked for anything else."""

    t_end: float = 0.8
    feature: Literal["state", "hidden"] = "hidden"

    def __post_init__(self) -> None:
        _check(self, t_end=(0 <= self.t_end <= 1, "a level from 0 (noise) to 1 (the image)"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment."""

    about: str
    seed: int = 0
    network: str | UNetConfig
    """A preset's name, or a table of the network's shape."""
    pretrain: Pretrain
    finetune: Finetune
    data: Data = field(default_factory=Data)
    image: Image = field(default_factory=Image)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    serve: Serve = field(default_factory=Serve)

    def __post_init__(self) -> None:
        _check(self, seed=(0 <= self.seed < 2**62, "0 or more, below 2**62,"))
        if isinstance(self.network, str) and self.network not in PRESETS:
            raise ValueError(f"network = {self.network!r}: choose one of {', '.join(PRESETS)}")
        if self.unet.image_size != self.image.size:
            name = repr(self.network) if isinstance(self.network, str) else "of this shape"
            raise ValueError(
                f"image.size = {self.image.size}, but network {name} takes {self.unet.image_size}"
            )
        if self.image.resize < self.image.size:
            raise ValueError(f"image.resize = {self.image.resize} is below image.size = {self.image.size}")
        with torch.device("meta"):  # shapes alone, to know the names of its blocks
            net = UNet(self.unet)
        net.block_numbers(self.encoder.layers)

    @property
    def unet(self) -> UNetConfig:
        """The network's shape."""
        return PRESETS[self.network] if isinstance(self.network, str) else self.network

    def head(self, classes: int) -> HeadConfig:
        """The head's shape, for so many classes."""
        return HeadConfig(classes, self.finetune.head_input, self.finetune.head)


SECTIONS: dict[str, Any] = {
    "data": Data,
    "image": Image,
    "encoder": EncoderConfig,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "serve": Serve,
}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        f.name.removesuffix(".toml")
        for f in resources.files("prg.recipes").iterdir()
        if f.name.endswith(".toml")
    )


def load_recipe(
    name: str, overrides: Iterable[str] = (), given: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Recipe:
    """A shipped recipe by name, or a TOML (or a run's JSON) file by path.

    A recipe with `extends = "NAME"` holds only what differs from that one.
    overrides: `section.key=value`, the value in TOML's notation, or a bare word for a string.
    given: keys by section that replace the file's own, such as those that an imported network decides.
    Raises RecipeError for a file that is missing or does not parse, an unknown key, a wrong type or value.
    """
    table = _table(name)
    for section, keys in given.items():
        before = table.get(section)
        table[section] = {**(before if isinstance(before, dict) else {}), **keys}
    for item in overrides:
        _override(table, item)
    return parse_recipe(table, name)


def _table(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's table, over that of the recipe it extends."""
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        if name not in shipped_recipes():
            raise RecipeError(
                f"no recipe {name!r}: give a .toml file or one of {', '.join(shipped_recipes())}"
            )
        text = resources.files("prg.recipes").joinpath(f"{name}.toml").read_bytes()
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
    both = {k: _over(base[k], v) for k, v in table.items() if isinstance(v, dict) and k in base}
    return {**base, **table, **both}


def parse_recipe(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from its table; `where` names it in errors. Raises RecipeError."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # here: the training core does without it

    for kind in (Recipe, *SECTIONS.values(), UNetConfig):
        kind.__pydantic_config__ = ConfigDict(extra="forbid")
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(str(k) for k in e["loc"]) or "the recipe"
            known = f" (known keys: {', '.join(_known(e['loc']))})" if "unexpected" in e["type"] else ""
            lines.append(f"{key}: {e['msg'].removeprefix('Value error, ')}{known}")
        raise RecipeError(f"{where}: " + "; ".join(lines)) from None


def recipe_table(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe, defaults included, as plain JSON types; `parse_recipe` reads it back."""
    table: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return table


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings; keys that recipes got since it was written have their defaults."""
    out = dict(settings)
    for section, kind in SECTIONS.items():
        if section in out:
            defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            out[section] = json.loads(json.dumps(defaults)) | out[section]
    return out


def _known(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    kinds = {**SECTIONS, "network": UNetConfig}
    kind = kinds.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return list(kind.__dataclass_fields__)


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
