"""metrics.jsonl: a line for each of a training's figures, one JSON object."""

import json
import math
from pathlib import Path


def append(path: Path, row: dict[str, float]) -> None:
    """Add a line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def drop_after(path: Path, step: int) -> None:
    """Drop the lines from after a checkpoint, as a kill leaves them."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step(line) <= step]
    if kept != lines:
        path.write_text("".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    """The step of one line; infinite for a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
