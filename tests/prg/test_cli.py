"""The command itself: quick to start, whatever its commands need."""

import subprocess
import sys
from pathlib import Path

import pytest

from prg.console import is_main_process

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


@pytest.mark.parametrize(
    ("rank", "size", "main"), [("0", "2", True), ("1", "2", False), ("1", None, True), ("1", "1", True)]
)
def test_a_rank_without_other_processes_writes_its_files(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str | None, main: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert is_main_process() is main
