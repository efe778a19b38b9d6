"""prg-serve with its embedded engine and the default settings."""

import os
import sys
from pathlib import Path

import entry.runner
from benchmarks.peers.engine import STAND_IN, Slow


def main() -> int:
    """Serve the entry, and nothing else of its repository."""
    directory = Path(os.environ["PEERS_ENTRY"])
    os.environ |= {
        "PRG_PORT": os.environ["PEERS_PORT"],
        "PRG_MODEL_REPOSITORY": str(directory.parent),
        "PRG_MODELS": directory.name,
    }
    if os.environ["PEERS_ENGINE"] == STAND_IN:
        entry.runner.Runner = Slow  # type: ignore[misc]
    from service.app import main as serve

    return serve([])


if __name__ == "__main__":
    sys.exit(main())
