"""The documents say what is there."""

import ast
import re
from pathlib import Path

import pytest

from prg.recipe import shipped_recipes
from service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
MODULES = sorted(p for d in ("entry", "prg", "service", "benchmarks") for p in (ROOT / d).rglob("*.py"))


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_stands_in_the_tree_under_its_own_words(path: Path) -> None:
    name = path.parent.name + "/" if path.name == "__init__.py" else path.name
    assert re.search(rf"^ *{re.escape(name)} +{re.escape(first_line(path))}$", README, re.MULTILINE)


def test_the_tree_names_no_module_that_is_gone() -> None:
    tree = README.split("## The tree")[1]
    assert set(re.findall(r"[a-z_0-9]+\.py", tree)) <= {p.name for p in MODULES}


def test_settings_and_recipes_that_are_named_exist() -> None:
    named = set(re.findall(r"PRG_[A-Z_]+", README))
    assert named <= {f"PRG_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"--recipe ([a-z0-9-]+)", README)) <= set(shipped_recipes())
