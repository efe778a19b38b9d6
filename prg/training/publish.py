"""A run's checkpoint as an entry: which model, and what the entry says of its training."""

import subprocess
from pathlib import Path
from typing import Any

from entry.config import sha256
from prg.checkpoint import load_checkpoint, load_strictly
from prg.classifier import Classifier
from prg.encoder import Encoder
from prg.export import Export, Precision, export
from prg.training.finetune import load_finetuned
from prg.training.held_back import behind
from prg.training.run import Run, Stage
from prg.unet import UNet


def publish(run: Run, stage: Stage, directory: Path, precision: Precision, compact: bool) -> str:
    """Export the run's model of that stage to the entry in `directory`; returns the version written.

    Raises CheckpointError where the stage has no checkpoint, and whatever `export` raises.
    """
    recipe = run.recipe
    checkpoint = run.finetuned if stage == "finetune" else run.pretrained
    classes: tuple[str, ...] | None = None
    levels: tuple[float, ...] | None = None
    model: Encoder | Classifier
    if stage == "finetune":
        model, facts = load_finetuned(run)
        classes, levels = tuple(facts["classes"]), recipe.finetune.t_end
    else:
        saved = load_checkpoint(run.pretrained, "pretrain")
        run.check(saved.facts, run.pretrained, "network", "image", "encoder")
        net = UNet(recipe.unet)
        load_strictly(net, saved.part("average"), run.pretrained)
        model, facts = Encoder(net, recipe.encoder), saved.facts
    described = Export(
        image=run.image_spec,
        t_end=recipe.serve.t_end,
        feature=recipe.serve.feature,
        training=training_facts(recipe.about, facts) | {"checkpoint": sha256(checkpoint)},
        labels=classes,
        classify_t_end=levels,
        precision=precision,
        compact=compact,
    )
    return export(model, described, directory)


def training_facts(about: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the entry wants to know of its making."""
    stages = {facts["kind"]: facts}
    if "pretraining" in facts:
        stages = {"pretrain": facts["pretraining"], **stages}
    told: dict[str, Any] = {"recipe": about, "commit": commit(), "device": facts["device"]}
    if facts.get("init", {}).get("kind") == "entry":
        told["begun from"] = {k: facts["init"][k] for k in ("entry", "version", "sha256")}
    for kind, stage in stages.items():
        settings = stage["settings"]
        if "imported" in settings:
            told[kind] = {"imported": settings["imported"]}
            continue
        told[kind] = {
            "images": settings["images"],
            **_how_far(kind, stage),
            "hours": round(stage["seconds"] / 3600, 3),
            "precision": stage["precision"],
        }
    return told | {"seen": behind(facts)}


def _how_far(kind: str, stage: dict[str, Any]) -> dict[str, Any]:
    settings = stage["settings"][kind]
    if settings.get("freeze"):
        return {"encoder": "frozen", "head": settings["head"], "penalty": stage["penalty"]}
    return {"epochs": settings["epochs"], "steps": stage["step"]}


def commit() -> str | None:
    """The commit of the code, where it lies in a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
