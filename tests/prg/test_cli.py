"""The command itself: quick to start, whatever its commands need."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_help_loads_nothing_heavy() -> None:
    """Importing the command and building its parser load neither torch nor what only one command needs."""
    program = (
        "import sys, prg.cli; prg.cli.parser(); "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'pyarrow', 'service')"
        " or m.startswith(('prg.studies', 'prg.training', 'prg.recipe.', 'prg.images'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
