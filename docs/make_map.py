"""The map of all modules, docs/map.md, from the first line of each docstring. `make docs` writes it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("entry", "prg", "service", "benchmarks", "examples")
HEAD = """# The map
Every module and what it is, in its own words. Imports only go down: a package uses those of lower floors, and
[import-linter](https://import-linter.readthedocs.io) checks it. The floors are in `pyproject.toml`.
"""


def described(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]


def rows(folder: Path, depth: int = 0) -> Iterator[str]:
    """A line for the folder, then one for each module in it, folders below it in their place."""
    own = folder / "__init__.py"
    yield f"{'  ' * depth}{folder.name}/".ljust(26) + (described(own) if own.exists() else "")
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any(path.glob("*.py")):
            yield from rows(path, depth + 1)
        elif path.suffix == ".py" and path != own:
            yield f"{'  ' * (depth + 1)}{path.name}".ljust(26) + described(path)


def render() -> str:
    """The whole page."""
    parts = ("\n".join(line.rstrip() for line in rows(ROOT / package)) for package in PACKAGES)
    return HEAD + "\n```text\n" + "\n".join(parts) + "\n```\n"


if __name__ == "__main__":
    (ROOT / "docs" / "map.md").write_text(render(), "utf-8")
    sys.exit()
