"""Checkpoint to entry: the scripted extractor, proved equal to the eager model before anything is kept."""

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from entry.config import (
    Calibration,
    EmbeddingFeature,
    Entry,
    EntryError,
    FeatureName,
    Features,
    HiddenFeature,
    ImageSpec,
    Prg,
    StateFeature,
    Tolerance,
    Version,
    read_entry,
    version_folders,
    write_entry,
)
from entry.files import sha256, write_atomically
from entry.runner import WEIGHTS, Runner
from prg.console import note
from prg.encoder import STATE_DIM
from prg.errors import ExportError
from prg.extractor import Extractor

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {
    "fp32": Tolerance(cosine=0.9999, relative=5e-3),
    "bf16": Tolerance(cosine=0.999, relative=5e-2),
    "fp16": Tolerance(cosine=0.999, relative=2e-2),
}
SAME_BATCH = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
OTHER_BATCH = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
NOTES = "## Notes"
"""Heading of the part of a model card that people write."""
BY_CLASS = "by_class"
"""Key of a version's `training` for what `prg evaluate --write` found of single classes, by the name of the data."""
LEVELS = (1.0, 0.9, 0.8, 0.55, 0.3, 0.0)


@dataclass(frozen=True)
class Export:
    """What goes into an entry beside the weights."""

    image: ImageSpec
    t_end: float
    feature: FeatureName
    training: dict[str, Any]
    held_out: float | None
    labels: tuple[str, ...] | None = None
    classify_t_end: tuple[float, ...] | None = None
    calibration: Calibration | None = None
    precision: Precision = "fp32"
    compact: bool = False
    """Weights rounded to bfloat16 and the file compressed: about half the bytes. It still computes in
    `precision`, because the rounded weights are stored as its own numbers."""
    keep: int | None = None
    """How many versions stay in the entry, the newest; None: all."""
    pt2: bool = False
    """Whether to write model.pt2 too, for PyTorch without TorchScript."""


def export(extractor: Extractor, facts: Export, directory: Path) -> str:
    """Write the model as the next version of the entry in `directory`; returns the version.

    Versions that are listed there but gone are dropped. Raises EntryError where the entry there differs in what
    versions share, ExportError where the artefact read back is not equal to the eager model or names a device.
    """
    prepare(extractor, facts)
    wanted = _describe(extractor, facts)
    there = _existing(directory, wanted)
    listed = there.prg.versions if there else {}
    # A number that no version had, not even one that is gone.
    version = str(1 + max(map(int, listed.keys() | version_folders(directory)), default=0))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_made(directory.parent)) as temporary:
        staged = Path(temporary) / directory.name
        path = staged / version / "model.pt"
        path.parent.mkdir(parents=True)
        _save(extractor, path, facts.compact)
        if facts.pt2:
            _save_pt2(extractor, wanted.image.size, path)
        encoder, model = digests(extractor, wanted, facts.calibration)
        described = Version(
            sha256=sha256(path),
            encoder=encoder,
            model=model,
            training=facts.training,
            held_out=facts.held_out,
            calibration=facts.calibration,
            accuracy=(),
        )
        write_entry(staged, Entry(directory.name, replace_versions(wanted, {version: described})))
        prove_equal(extractor, staged, facts.precision)
        if there is None:
            write_card(staged, read_entry(staged))
            os.rename(staged, directory)
            return version
        os.rename(path.parent, directory / version)
    versions = {v: listed[v] for v in there.usable_versions} | {version: described}
    kept = sorted(versions, key=int)[-(facts.keep or len(versions)) :]
    entry = Entry(directory.name, replace_versions(wanted, {v: versions[v] for v in kept}))
    write_entry(directory, entry)
    write_card(directory, entry)
    for old in versions.keys() - set(kept):
        shutil.rmtree(directory / old)
    return version


def prepare(extractor: Extractor, facts: Export) -> None:
    """Make the model what it will be: evaluation mode, weights rounded if compact, network in its precision."""
    extractor.eval().requires_grad_(False).cpu()
    if facts.compact:
        for p in extractor.parameters():
            p.data = p.data.bfloat16().to(p.dtype)
    extractor.encoder.net.to(DTYPES[facts.precision])
    strange = [name for name, values in extractor.state_dict().items() if not bool(values.isfinite().all())]
    if strange:
        raise ExportError(f"{strange[0]} holds NaN or infinite numbers, so no answer could be trusted")


def digests(extractor: Extractor, prg: Prg, calibration: Calibration | None) -> tuple[str, str]:
    """Of everything that decides the features; and of that, the head, its labels and its calibration.

    Of contents, never of a file: the same model gives the same two whenever it is exported.
    """
    decides = ("path", "solver", "steps", "image", "features", "precision")
    facts = prg.model_dump(mode="json", include=set(decides)) | {
        "network": asdict(extractor.encoder.net.config)
    }
    encoder = _digest(facts, {"encoder": extractor.encoder, "projection": extractor.projection})
    head = {
        "encoder": encoder,
        "labels": prg.labels,
        "calibration": calibration.model_dump(mode="json") if calibration else None,
        "columns": extractor.head.columns if extractor.head else None,
    }
    return encoder, _digest(head, {"head": extractor.head})


def _digest(facts: dict[str, Any], modules: dict[str, nn.Module | None]) -> str:
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part, module in modules.items():
        for name, values in sorted(module.state_dict().items()) if module else ():
            found.update(f"{part}.{name} {values.dtype} {list(values.shape)}".encode())
            found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def replace_versions(prg: Prg, versions: dict[str, Version]) -> Prg:
    """The same parameter with other versions."""
    return prg.model_copy(update={"versions": versions})


def prove_equal(extractor: nn.Module, directory: Path, precision: Precision) -> None:
    """Hold the artefact, read back as a server reads it, against the eager model. Raises ExportError.

    Images alone, in a batch, and in a batch whose levels differ; the graph is searched for devices. model.pt2 too,
    where there is one.
    """
    runner = Runner(directory)
    check_no_device(torch.jit.load(str(directory / runner.version / "model.pt")))
    size = runner.entry.prg.image.size
    images = np.random.default_rng(0).integers(0, 256, (len(LEVELS), 3, size, size), np.uint8)
    levels = np.array(LEVELS, np.float32)
    with torch.inference_mode():
        eager = extractor(torch.from_numpy(images), torch.from_numpy(levels)[:, None])
    expected = {k: t.float().numpy() for k, t in zip(runner.entry.outputs(), eager, strict=True)}
    for module in filter(None, (runner.module, runner.load_exported())):
        runner.module = module
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
    """MODEL_CARD.md from what the entry says of itself; a part that begins with "## Notes" stays as people wrote it."""
    prg = entry.prg
    hidden = prg.features.hidden
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
        f"- state: {prg.features.state.dim} numbers; hidden: {hidden.dim} numbers, the {' and '.join(hidden.pooling)} "
        f"over space of {', '.join(hidden.layers)}",
    ]
    if prg.features.embedding:
        lines.append(
            f"- embedding: {prg.features.embedding.dim} numbers, a projection of hidden; compare by cosine"
        )
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
        by_class = version.training.get(BY_CLASS, {})
        for figures in version.accuracy:
            if rows := by_class.get(figures.data):
                lines += _classes(figures.data, rows, len(prg.labels or ()))
        facts = {k: v for k, v in version.training.items() if k not in ("trained_on", BY_CLASS)}
        lines += ["", "Training:", "", *(f"- {k}: {_written(v)}" for k, v in facts.items())]
    card = directory / "MODEL_CARD.md"
    _, found, notes = card.read_text("utf-8").partition(f"\n{NOTES}\n") if card.exists() else ("", "", "")
    text = "\n".join(lines) + "\n" + (f"\n{NOTES}\n{notes}" if found else "")
    write_atomically(card, text.encode())


def _classes(data: str, rows: list[tuple[str, int, float | None]], classes: int) -> list[str]:
    some = f", the worst and the best of {classes}" if len(rows) < classes else ""
    lines = ["", f"Classes of {data}{some}:", "", "| class | images | top-1 |", "|---|---|---|"]
    return lines + [f"| {name} | {n} | {'' if top1 is None else f'{top1:.4f}'} |" for name, n, top1 in rows]


def _written(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(_written, value))
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _describe(extractor: Extractor, facts: Export) -> Prg:
    """The parameter, its versions still to come."""
    encoder, projection = extractor.encoder, extractor.projection
    config = encoder.config
    nothing = Version(
        sha256="0" * 64, encoder="0" * 64, model="0" * 64, training={}, held_out=None, accuracy=()
    )
    return Prg(
        format=2,
        path=config.path,
        solver=config.solver,
        steps=config.steps,
        nfe=config.nfe,
        image=facts.image,
        t_end=facts.t_end,
        # Without a projection there is no embedding to answer with.
        feature="hidden" if facts.feature == "embedding" and projection is None else facts.feature,
        features=Features(
            state=StateFeature(dim=STATE_DIM),
            hidden=HiddenFeature(dim=encoder.hidden_dim, layers=encoder.layers, pooling=config.pooling),
            embedding=EmbeddingFeature(dim=len(projection.scale)) if projection else None,
        ),
        labels=facts.labels,
        classify_t_end=facts.classify_t_end,
        precision=facts.precision,
        tolerance=TOLERANCES[facts.precision],
        versions={"1": nothing},
    )


def _existing(directory: Path, wanted: Prg) -> Entry | None:
    """What is in `directory` already, if that is an entry that this can be a version of."""
    if not (directory / "config.pbtxt").exists():
        if directory.exists() and any(directory.iterdir()):
            raise EntryError(f"{directory}: is there, but is no entry (no config.pbtxt); name another folder")
        return None
    there = read_entry(directory)
    ours, theirs = (p.model_dump(exclude={"versions"}) for p in (wanted, there.prg))
    keys = dict.fromkeys((*ours, *theirs))
    changed = [
        f"{k} ({theirs.get(k)!r} there, {ours.get(k)!r} here)" for k in keys if ours.get(k) != theirs.get(k)
    ]
    if changed:
        raise EntryError(
            f"{directory}: versions of one entry share everything but their weights, and these differ: "
            f"{'; '.join(changed)}. Export under a new name"
        )
    if gone := sorted(there.prg.versions.keys() & there.failed_versions.keys(), key=int):
        note(f"{directory}: version {', '.join(gone)} is gone, and listed no longer")
    return there


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
                if item.filename.endswith(".debug_pkl"):
                    continue  # line numbers for tracebacks
                undated = zipfile.ZipInfo(item.filename)  # the same weights give the same bytes
                target.writestr(undated, source.read(item), zipfile.ZIP_DEFLATED, 9)
        plain.unlink()


def _save_pt2(extractor: nn.Module, size: int, scripted: Path) -> None:
    """As a program of torch.export, for any batch size, beside the model.pt of the same model."""
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.full((2, 1), 0.5)
    with torch.no_grad():
        program = torch.export.export(extractor, example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, scripted.with_suffix(".pt2"), extra_files={WEIGHTS: sha256(scripted)})


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
