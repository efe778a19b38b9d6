"""An entry's config.pbtxt and its "prg" parameter: read, checked, written.

Triton and the embedded engine read the very same file, both through Triton's ModelConfig message.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import filterfalse
from pathlib import Path
from typing import Annotated, Any, Literal

from google.protobuf import text_format
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelQueuePolicy

from entry.errors import EntryError as EntryError
from entry.files import is_hidden, sha256, write_atomically

FORMAT = 2
MAX_BATCH_SIZE = 64
PLATFORM = "pytorch_libtorch"
QUEUE_TIMEOUT_US = 60_000_000
QUEUE_SIZE = 256
WARM_UP_BATCHES = (1, 8, 32, 64)
"""The second call of each new batch shape is slow under TorchScript; these are made before the first user."""
WARM_UP_CALLS = 3
INSTANCES = 2
"""Copies of the module that Triton runs. With one, a queue policy makes some calls wait for 500 ms: the batcher
prefetches no longer, and a request that comes between an answer and the next wait is seen by a timer alone."""
REMEDY = "write the entry again with `prg export`"

Level = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pooling = Literal["mean", "std"]
FeatureName = Literal["embedding", "hidden", "state"]
QUANTILES = 101
"""Of KNOWN over held-out images: its 0th to 100th percentile."""


class OldFormatError(EntryError):
    """An entry that an earlier version wrote."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that may be absent is left out, not null."""
        fields = type(self).model_fields
        return {k: v for k, v in serialize(self).items() if v is not None or fields[k].is_required()}


class ImageSpec(_Facts):
    """How an image becomes the network's input; mean and std are those it was pretrained with."""

    size: Count
    resize: Count
    preprocessing: Literal["v2"]
    mean: tuple[float, float, float]
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    @model_validator(mode="after")
    def _crop_fits(self) -> "ImageSpec":
        if self.resize < self.size:
            raise ValueError(f"resize = {self.resize} is below size = {self.size}, which is cropped from it")
        return self


class StateFeature(_Facts):
    """The ODE state at t_end."""

    dim: Count


class HiddenFeature(_Facts):
    """Activations at t_end, pooled over space: of each layer its means, then its standard deviations.

    Layers by their names in the official layout, in running order.
    """

    dim: Count
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    pooling: Annotated[tuple[Pooling, ...], Field(min_length=1)]


class EmbeddingFeature(_Facts):
    """A projection of `hidden` for which plain cosine means something; a prefix of it is an embedding too."""

    dim: Count


class Features(_Facts):
    """The features that /embed can answer with."""

    state: StateFeature
    hidden: HiddenFeature
    embedding: EmbeddingFeature | None = None


class Tolerance(_Facts):
    """How far another engine or device may be off: least cosine, largest relative difference."""

    cosine: float
    relative: float


class Accuracy(_Facts):
    """What `prg evaluate` measured of the exported module itself; shares in [0, 1]."""

    data: str
    images: Count
    top1: Share
    top5: Share


class Calibration(_Facts):
    """What held-out images of the training showed: how sure to be, and how typical images are."""

    temperature: Annotated[float, Field(gt=0)]
    """Probabilities are softmax(logits / temperature)."""
    known_quantiles: Annotated[tuple[float, ...], Field(min_length=QUANTILES, max_length=QUANTILES)]
    images: Count


class Fingerprints(_Facts):
    """The first 12 hex digits of a version's content digests."""

    encoder: str
    """Equal where embeddings may be compared."""
    model: str
    """Equal where classes are the same too."""


class Version(_Facts):
    """One version: its digests, how it was trained, how good it is."""

    sha256: Digest
    """Of its model.pt."""
    encoder: Digest
    """Of everything that decides the features."""
    model: Digest
    """Of that, and of the head, its labels and its calibration."""
    training: dict[str, Any]
    held_out: Share | None
    """The smallest share that was held out by any training behind it; None where that is not known."""
    calibration: Calibration | None = None
    accuracy: tuple[Accuracy, ...]

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities."""
        return self.calibration.temperature if self.calibration else 1.0

    @property
    def fingerprints(self) -> Fingerprints:
        """Short forms of the content digests."""
        return Fingerprints(encoder=self.encoder[:12], model=self.model[:12])


class Prg(_Facts):
    """The JSON of the "prg" parameter: all that Triton's own configuration has no word for."""

    format: Literal[2]
    path: str
    solver: str
    steps: Count
    nfe: Count
    image: ImageSpec
    t_end: Level
    feature: FeatureName
    features: Features
    classify_t_end: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    precision: Literal["fp32", "bf16", "fp16"]
    tolerance: Tolerance
    versions: Annotated[dict[str, Version], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "Prg":
        if (self.labels is None) != (self.classify_t_end is None):
            raise ValueError("labels and classify_t_end go together: both with a head, neither without")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: the same name is there twice")
        if self.feature == "embedding" and self.features.embedding is None:
            raise ValueError("feature is 'embedding', but features has none; take 'hidden'")
        for version in self.versions:
            if not version.isdecimal() or version != str(int(version)) or int(version) < 1:
                raise ValueError(f"versions: {version!r} is no version, they are numbered from 1")
        return self


@dataclass(frozen=True)
class Entry:
    """One model of a repository, by its name."""

    name: str
    prg: Prg
    max_batch_size: int = MAX_BATCH_SIZE
    """Most rows of one call to Triton."""
    failed_versions: Mapping[str, str] = field(default_factory=dict)
    """Those that can't be used, with the reason."""
    computed_in: Literal["bf16"] | None = None
    """The precision that its user asked for, in place of its own."""

    @property
    def precision(self) -> str:
        """What the network computes in."""
        return self.computed_in or self.prg.precision

    @property
    def has_head(self) -> bool:
        """Whether /classify works on it."""
        return self.prg.labels is not None

    @cached_property
    def default_version(self) -> str:
        """The highest version, usable or not."""
        return max(self.prg.versions, key=int)

    @cached_property
    def usable_versions(self) -> tuple[str, ...]:
        """All but those that failed, ascending."""
        return tuple(sorted(self.prg.versions.keys() - self.failed_versions.keys(), key=int))

    def fingerprints(self, version: str) -> Fingerprints:
        """What the answers of a version are marked with; in another precision than its own they are other answers."""
        own = self.prg.versions[version].fingerprints
        if self.precision == self.prg.precision:
            return own
        mark = f"-{self.precision}"
        return Fingerprints(encoder=own.encoder + mark, model=own.model + mark)

    def outputs(self) -> dict[str, int]:
        """Output names in the module's order, with their lengths."""
        features, labels = self.prg.features, self.prg.labels
        dims = {"STATE": features.state.dim, "HIDDEN": features.hidden.dim}
        if features.embedding:
            dims["EMBEDDING"] = features.embedding.dim
        if labels is not None:
            dims["LOGITS"] = len(labels)
        # An entry without EMBEDDING has none, as the contract of an entry says.
        if labels is not None and features.embedding:
            dims["KNOWN"] = 1
        return dims


def parse_prg(text: str, where: str) -> Prg:
    """The parameter from its JSON; `where` names the file in errors. Raises EntryError."""
    try:
        table = json.loads(text, parse_constant=_no_constant)
        if isinstance(table, dict) and table.get("format") == 1:
            raise OldFormatError(
                f"{where}: written in format 1, and this version reads format {FORMAT}; "
                "make a new entry of it: prg export OLD NEW --data IMAGES"
            )
        return Prg.model_validate_json(text)
    except ValidationError as error:
        lines = [
            f"{'.'.join(['prg', *(str(k) for k in e['loc'])])}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise EntryError(f"{where}: {'; '.join(lines)}; {REMEDY}") from None
    except EntryError:
        raise
    except ValueError as error:
        raise EntryError(f'{where}: the "prg" parameter is not valid JSON ({error}); {REMEDY}') from None


def prg_json(prg: Prg) -> str:
    """The parameter as JSON, with exactly the keys of the format."""
    return prg.model_dump_json()


def entry_from_config(config: ModelConfig, where: str) -> Entry:
    """An entry from Triton's message, which is what its model-config call gives out.

    Checks names, types, dims and keys, which is all that a caller of Triton relies on: how it is computed
    there is Triton's own business. Raises EntryError naming `where` and the field.
    """
    if "prg" not in config.parameters:
        raise EntryError(f'{where}: no parameter "prg", so this is no entry of ours; {REMEDY}')
    prg = parse_prg(config.parameters["prg"].string_value, where)
    entry = Entry(config.name, prg, config.max_batch_size)
    wanted = to_config(entry)
    if entry.max_batch_size < 1:
        raise EntryError(
            f"{where}: max_batch_size is {entry.max_batch_size}, so it takes no batches; {REMEDY}"
        )
    for side in ("input", "output"):
        found = {t.name: t for t in getattr(config, side)}
        expected = {t.name: t for t in getattr(wanted, side)}
        _same(list(found), list(expected), where, f"{side} names")
        for name, tensor in expected.items():
            _same(_type(found[name]), _type(tensor), where, f"{side} {name}: data_type")
            _same(list(found[name].dims), list(tensor.dims), where, f"{side} {name}: dims")
    return entry


def to_config(entry: Entry) -> ModelConfig:
    """Triton's configuration of an entry."""
    config = ModelConfig(name=entry.name, platform=PLATFORM, max_batch_size=entry.max_batch_size)
    size = entry.prg.image.size
    config.input.add(name="IMAGE", data_type="TYPE_UINT8", dims=[3, size, size])
    config.input.add(name="T_END", data_type="TYPE_FP32", dims=[1])
    for name, dim in entry.outputs().items():
        config.output.add(name=name, data_type="TYPE_FP32", dims=[dim])
    config.version_policy.all.SetInParent()
    # Without a kind: on a GPU where there is one.
    config.instance_group.add(count=INSTANCES)
    batching = config.dynamic_batching
    batching.priority_levels, batching.default_priority_level = 2, 1
    policy = batching.default_queue_policy
    policy.timeout_action = ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = QUEUE_TIMEOUT_US
    policy.allow_timeout_override = True
    policy.max_queue_size = QUEUE_SIZE
    for batch in WARM_UP_BATCHES:
        warm = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch, count=WARM_UP_CALLS)
        for tensor in config.input:
            sample = warm.inputs[tensor.name]
            sample.data_type = tensor.data_type
            sample.dims.extend(tensor.dims)
            if tensor.name == "IMAGE":
                sample.random_data = True
            else:
                sample.zero_data = True
    config.parameters["prg"].string_value = prg_json(entry.prg)
    return config


def read_entry(directory: Path) -> Entry:
    """The entry in `directory`, its version folders compared with its parameter. Raises EntryError.

    A version without a module, or a folder that the parameter does not list, is a failed version: the others are
    good all the same.
    """
    path = directory / "config.pbtxt"
    config = read_config(directory)
    entry = entry_from_config(config, str(path))
    _same(entry.name, directory.name, str(path), "name (it must be its folder's)")
    _same(config.platform, PLATFORM, str(path), "platform")
    _same(config.max_batch_size, MAX_BATCH_SIZE, str(path), "max_batch_size")
    folders = version_folders(directory)
    listed = entry.prg.versions.keys()
    failed = {
        version: f"{directory / version / 'model.pt'}: missing, but prg.versions lists it; restore it, or export again"
        for version in listed - folders
    } | {
        version: f"{directory / version}: prg.versions does not list it (was an export interrupted?); remove it"
        for version in folders - listed
    }
    return replace(entry, failed_versions=failed)


def read_config(directory: Path) -> ModelConfig:
    """An entry's config.pbtxt as Triton's message. Raises EntryError."""
    path = directory / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except OSError as error:
        made = "an entry is a folder that `prg export` writes, such as model_repository/prg-cifar10"
        raise EntryError(f"{path}: {error.strerror}; {made}") from None
    except UnicodeDecodeError:
        raise EntryError(f"{path}: not UTF-8 text; {REMEDY}") from None
    except text_format.ParseError as error:
        raise EntryError(f"{path}: not a Triton model configuration ({error}); {REMEDY}") from None


def version_folders(directory: Path) -> set[str]:
    """Numbers of the sub-folders that hold a module."""
    return {path.parent.name for path in directory.glob("*/model.pt") if path.parent.name.isdecimal()}


def write_entry(directory: Path, entry: Entry) -> None:
    """Write config.pbtxt atomically; `read_entry` gives the entry back."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "# Written by `prg export`. Triton and the embedded engine both read this file.\n"
    text += text_format.MessageToString(to_config(entry), as_utf8=True)
    write_atomically(directory / "config.pbtxt", text.encode())


def check_weights(directory: Path, entry: Entry, version: str) -> Path:
    """The path of a version's model.pt, its sha256 checked. Raises EntryError where they differ."""
    path = directory / version / "model.pt"
    try:
        digest = sha256(path)
    except OSError as error:
        raise EntryError(f"{path}: {error.strerror}") from None
    listed = entry.prg.versions[version].sha256
    if digest != listed:
        raise EntryError(
            f"{path}: its sha256 is {digest}, but prg.versions.{version}.sha256 is {listed}; "
            f"the file is damaged or was replaced: restore it, or {REMEDY}"
        )
    return path


def find_entries(repository: Path) -> dict[str, Entry | EntryError]:
    """Every sub-folder with a config.pbtxt, by name, but for hidden ones; one that can't be used hides no other.

    Raises OSError for a repository that can't be listed.
    """
    found: dict[str, Entry | EntryError] = {}
    for name in sorted(filterfalse(is_hidden, os.listdir(repository))):
        path = repository / name / "config.pbtxt"
        try:
            if _exists(path):
                found[name] = read_entry(path.parent)
        except EntryError as error:
            found[name] = error
        except OSError as error:
            found[name] = EntryError(
                f"{error.filename or path}: {error.strerror}; make it readable, or move it away"
            )
        except (ValueError, RecursionError) as error:  # numbers too large for Triton's message, JSON too deep
            found[name] = EntryError(f"{path}: can't be used ({error}); {REMEDY}")
    return found


def _exists(path: Path) -> bool:
    """Whether a file is there. Raises OSError where that can't be known, which later Pythons' Path.exists hides."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _same(found: object, expected: object, where: str, field: str) -> None:
    if found != expected:
        raise EntryError(f"{where}: {field} is {found!r}, must be {expected!r}; {REMEDY}")


def _type(tensor: Any) -> str:
    name: str = (
        type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    )
    return name


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
