"""A run's checkpoint as an entry: which model, and what the entry says of its training."""

import subprocess
from pathlib import Path
from typing import Any

from entry.files import sha256
from prg.checkpoint import Facts, Stage
from prg.export import Export, Precision, export
from prg.trained import load_trained
from prg.training.run import Run


def publish(
    run: Run,
    stage: Stage,
    directory: Path,
    precision: Precision,
    compact: bool,
    keep: int | None = None,
    pt2: bool = False,
) -> str:
    """Export the run's model of that stage to the entry in `directory`; returns the version written.

    Raises CheckpointError where the stage has no checkpoint, and whatever `export` raises.
    """
    path = run.checkpoint(stage)
    extractor, facts = load_trained(path)
    described = Export(
        # As it was trained, whatever recipe.json says by now.
        image=facts.recipe.image.spec,
        t_end=facts.recipe.serve.t_end,
        feature=run.recipe.serve.feature,
        held_out=facts.held_out,
        calibration=facts.calibration,
        training=training_facts(run.recipe.about, facts) | {"checkpoint": sha256(path)},
        labels=facts.classes or None,
        classify_t_end=facts.recipe.finetune.t_end if stage == "finetune" else None,
        precision=precision,
        compact=compact,
        keep=keep,
        pt2=pt2,
    )
    return export(extractor, described, directory)


def training_facts(about: str, facts: Facts) -> dict[str, Any]:
    """What a reader of the entry wants to know of its making, as plain JSON."""
    made: dict[str, Any] = {
        "recipe": about,
        "seed": facts.recipe.seed,
        "commit": commit(),
        "split": facts.recipe.data.train,
        "history": [*facts.history, facts.summary()],
        "network": facts.recipe.model_dump(mode="json")["network"],
        "trained_on": facts.trained_on,
    }
    if facts.trained is not None:
        hours = round(facts.trained.seconds / 3600, 3)
        made |= {"images": facts.trained.images, "hours": hours, "device": facts.trained.device}
    if facts.fitted_on is not None:
        made["fitted_on"] = facts.fitted_on.model_dump(mode="json")
    if facts.stage == "finetune":
        made["head_input"] = facts.recipe.finetune.head_input
    if facts.imported is not None:
        made["imported"] = facts.imported.model_dump(mode="json")
    if facts.cross_validated is not None:
        made["cross_validated"] = facts.cross_validated.model_dump(mode="json")
    return made


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
