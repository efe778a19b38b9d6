"""The documents say what is there."""

import re
import runpy
from pathlib import Path

import pytest

from prg.recipes import shipped_recipes
from service.settings import OTHER_VARIABLES, Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_map_is_of_these_modules() -> None:
    """`make docs` writes it."""
    render = runpy.run_path(str(ROOT / "docs" / "make_map.py"))["render"]
    assert (ROOT / "docs" / "map.md").read_text("utf-8") == render()


SETTINGS = {f"PRG_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_settings_and_recipes_that_are_named_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    named = set(re.findall(r"PRG_[A-Z_]+", text)) - OTHER_VARIABLES
    assert named <= SETTINGS
    assert named == SETTINGS or path.name != "deploying.md"  # which has them all
    assert set(re.findall(r"--recipe ([a-z0-9-]+)(?![a-z0-9.-])", text)) <= set(shipped_recipes())


def test_links_of_the_front_door_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_tests_that_the_security_page_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "docs" / "security.md").read_text("utf-8"))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []
