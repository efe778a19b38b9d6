"""Checkpoint to entry: the scripted extractor, proved equal to the eager model before anything is kept."""

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from entry.config import (
    Entry,
    EntryError,
    Features,
    HiddenFeature,
    ImageSpec,
    Prg,
    StateFeature,
    Tolerance,
    Version,
    read_entry,
    write_entry,
)
from entry.files import sha256, write_atomically
from entry.runner import Runner
from prg.classifier import Classifier
from prg.encoder import STATE_DIM, Encoder
from prg.errors import ExportError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {
    "fp32": Tolerance(cosine=0.9999, relative=5e-3),
    "bf16": Tolerance(cosine=0.999, relative=5e-2),
    "fp16": Tolerance(cosine=0.999, relative=2e-2),
}
SAME_BATCH = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
OTHER_BATCH = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
LEVELS = (1.0, 0.9, 0.8, 0.55, 0.3, 0.0)


class Normalise(nn.Module):
    """uint8 [B, 3, S, S] -> the network's own units."""

    mean: Tensor
    std: Tensor

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(image.mean)[:, None, None] * 255)
        self.register_buffer("std", torch.tensor(image.std)[:, None, None] * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std


class FeatureExtractor(nn.Module):
    """IMAGE uint8 [B, 3, S, S], T_END [B, 1] -> STATE, HIDDEN."""

    def __init__(self, encoder: Encoder, image: ImageSpec) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalise = Normalise(image)

    def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor]:
        state, hidden = self.encoder(self.normalise(IMAGE), T_END.flatten().clamp(0.0, 1.0))
        return state, hidden


class ClassExtractor(nn.Module):
    """IMAGE uint8 [B, 3, S, S], T_END [B, 1] -> STATE, HIDDEN, LOGITS."""

    def __init__(self, classifier: Classifier, image: ImageSpec) -> None:
        super().__init__()
        self.classifier = classifier
        self.normalise = Normalise(image)

    def forward(self, IMAGE: Tensor, T_END: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, hidden, logits = self.classifier(self.normalise(IMAGE), T_END.flatten().clamp(0.0, 1.0))
        return state, hidden, logits


@dataclass(frozen=True)
class Export:
    """What goes into an entry beside the weights."""

    image: ImageSpec
    t_end: float
    feature: Literal["state", "hidden"]
    training: dict[str, Any]
    labels: tuple[str, ...] | None = None
    classify_t_end: tuple[float, ...] | None = None
    precision: Precision = "fp32"
    compact: bool = False
    """Weights rounded to bfloat16 and the file compressed: about half the bytes. It still computes in
    `precision`, because the rounded weights are stored as its own numbers."""


def export(model: Encoder | Classifier, facts: Export, directory: Path) -> str:
    """Write `model` as the next version of the entry in `directory`; returns the version.

    Raises EntryError where the entry there differs in what versions share, ExportError where the artefact
    read back is not equal to the eager model or names a device.
    """
    model = prepare(model, facts)
    extractor = _extractor(model, facts)
    wanted = _describe(model, facts)
    existing = _existing(directory, wanted)
    version = str(1 + max((int(v) for v in existing.versions), default=0)) if existing else "1"
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_made(directory.parent)) as temporary:
        staged = Path(temporary) / directory.name
        path = staged / version / "model.pt"
        path.parent.mkdir(parents=True)
        _save(extractor, path, facts.compact)
        described = Version(sha256=sha256(path), training=facts.training, accuracy=())
        write_entry(staged, Entry(directory.name, replace_versions(wanted, {version: described})))
        prove_equal(extractor, staged, facts.precision)
        if existing is None:
            write_card(staged, read_entry(staged))
            os.rename(staged, directory)
            return version
        entry = Entry(directory.name, replace_versions(wanted, existing.versions | {version: described}))
        os.rename(path.parent, directory / version)
        write_entry(directory, entry)
    write_card(directory, entry)
    return version


def prepare(model: Encoder | Classifier, facts: Export) -> Encoder | Classifier:
    """The model as it will compute: evaluation mode, weights rounded if compact, network in its precision."""
    model = model.eval().requires_grad_(False).cpu()
    if facts.compact:
        for p in model.parameters():
            p.data = p.data.bfloat16().to(p.dtype)
    encoder = model.encoder if isinstance(model, Classifier) else model
    encoder.net.to(DTYPES[facts.precision])
    return model


def replace_versions(prg: Prg, versions: dict[str, Version]) -> Prg:
    """The same parameter with other versions."""
    return prg.model_copy(update={"versions": versions})


def prove_equal(extractor: nn.Module, directory: Path, precision: Precision) -> None:
    """Hold the artefact, read back as a server reads it, against the eager model. Raises ExportError.

    Images alone, in a batch, and in a batch whose levels differ; the graph is searched for devices.
    """
    runner = Runner(directory)
    check_no_device(torch.jit.load(str(directory / runner.version / "model.pt")))
    size = runner.entry.prg.image.size
    images = np.random.default_rng(0).integers(0, 256, (len(LEVELS), 3, size, size), np.uint8)
    levels = np.array(LEVELS, np.float32)
    with torch.inference_mode():
        eager = extractor(torch.from_numpy(images), torch.from_numpy(levels)[:, None])
    expected = {k: t.float().numpy() for k, t in zip(runner.entry.outputs(), eager, strict=True)}
    together = runner.run(images, levels)
    _compare(together, expected, SAME_BATCH[precision], "in a batch with mixed T_END")
    for i in range(len(LEVELS)):
        alone = runner.run(images[i : i + 1], levels[i : i + 1])
        one = {k: a[i : i + 1] for k, a in expected.items()}
        _compare(alone, one, OTHER_BATCH[precision], f"alone at T_END {LEVELS[i]}")


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|, of the worst image."""
    scale = np.abs(b).max(axis=1)
    return float((np.abs(a - b).max(axis=1) / np.maximum(scale, 1e-12)).max())


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine of two rows of the same number."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def check_no_device(module: torch.jit.ScriptModule) -> None:
    """Raise ExportError if the graph has a device constant: such a module fails on any other device."""
    graph = module.inlined_graph  # held: its nodes die with it
    constants = graph.findAllNodes("prim::Constant")  # type: ignore[attr-defined]
    named = sum(node.output().type().kind() == "DeviceObjType" for node in constants)
    if named:
        raise ExportError(f"the graph names a device ({named} times), so it would not run on another")


def write_card(directory: Path, entry: Entry) -> None:
    """MODEL_CARD.md from what the entry says of itself."""
    prg = entry.prg
    lines = [
        f"# {entry.name}",
        "",
        "An image-feature extractor by Pretrained Reversible Generation (arXiv 2412.01787): a generative flow",
        "model reversed from an image; the state and the network's activations on the way are the features.",
        "",
        f"- input: RGB {prg.image.size} x {prg.image.size}; larger images are resized to {prg.image.resize} "
        "on the shorter side and centre-cropped",
        f"- path `{prg.path}`, solver `{prg.solver}`, {prg.steps} step(s), {prg.nfe} network evaluations",
        f"- default feature `{prg.feature}` at t_end = {prg.t_end} (1 is the image, 0 is noise)",
        f"- state: {prg.features.state.dim} numbers; hidden: {prg.features.hidden.dim} numbers of "
        f"{', '.join(prg.features.hidden.layers)}",
    ]
    if prg.labels:
        lines += [
            f"- classes: {', '.join(prg.labels)}",
            "- it knows these classes and no other: any photo is given one of them, however little it fits",
        ]
    for number, version in prg.versions.items():
        lines += ["", f"## Version {number}", "", "| data | images | top-1 | top-5 |", "|---|---|---|---|"]
        lines += [f"| {a.data} | {a.images} | {a.top1:.4f} | {a.top5:.4f} |" for a in version.accuracy] or [
            "| not evaluated yet | | | |"
        ]
        facts = {k: v for k, v in version.training.items() if k != "trained_on"}
        lines += ["", "Training:", "", *(f"- {k}: {_written(v)}" for k, v in facts.items())]
    write_atomically(directory / "MODEL_CARD.md", ("\n".join(lines) + "\n").encode())


def _written(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(_written, value))
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _extractor(model: Encoder | Classifier, facts: Export) -> nn.Module:
    kind: type[nn.Module] = ClassExtractor if isinstance(model, Classifier) else FeatureExtractor
    return kind(model, facts.image).eval()


def _describe(model: Encoder | Classifier, facts: Export) -> Prg:
    """The parameter, its versions still to come."""
    encoder = model.encoder if isinstance(model, Classifier) else model
    config = encoder.config
    return Prg(
        format=1,
        path=config.path,
        solver=config.solver,
        steps=config.steps,
        nfe=config.nfe,
        image=facts.image,
        t_end=facts.t_end,
        feature=facts.feature,
        features=Features(
            state=StateFeature(dim=STATE_DIM),
            hidden=HiddenFeature(dim=encoder.hidden_dim, layers=config.layers),
        ),
        labels=facts.labels,
        classify_t_end=facts.classify_t_end,
        precision=facts.precision,
        tolerance=TOLERANCES[facts.precision],
        versions={"1": Version(sha256="0" * 64, training={}, accuracy=())},
    )


def _existing(directory: Path, wanted: Prg) -> Prg | None:
    """What is in `directory` already, if that is an entry that this can be a version of."""
    if not (directory / "config.pbtxt").exists():
        if directory.exists() and any(directory.iterdir()):
            raise EntryError(f"{directory}: is there, but is no entry (no config.pbtxt); name another folder")
        return None
    existing = read_entry(directory).prg
    ours, theirs = (p.model_dump(exclude={"versions"}) for p in (wanted, existing))
    changed = [f"{k} ({theirs[k]!r} there, {ours[k]!r} here)" for k in ours if ours[k] != theirs[k]]
    if changed:
        raise EntryError(
            f"{directory}: versions of one entry share everything but their weights, and these differ: "
            f"{'; '.join(changed)}. Export under a new name"
        )
    return existing


def _save(extractor: nn.Module, path: Path, compact: bool) -> None:
    scripted = torch.jit.script(extractor)
    scripted.save(str(path))
    if compact:
        # TorchScript's archive is a zip whose reader inflates as it loads; bfloat16 numbers stored as
        # fp32 have 16 zero bits each, which deflate removes.
        plain = path.with_suffix(".plain")
        shutil.move(path, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for item in source.infolist():
                undated = zipfile.ZipInfo(item.filename)  # the same weights give the same bytes
                target.writestr(undated, source.read(item), zipfile.ZIP_DEFLATED, 9)
        plain.unlink()


def _compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float, where: str) -> None:
    for name, array in expected.items():
        difference = relative_difference(found[name], array)
        if not difference <= bound:
            raise ExportError(
                f"{name} {where} is off by {difference:.1e} relative, at most {bound:.0e} is allowed"
            )


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
