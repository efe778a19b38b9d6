"""benchmarks/pages.py: a benchmark replaces its own region of a page, and nothing else."""

from pathlib import Path

import pytest

from benchmarks.pages import write_region

PAGE = """before
<!-- make trust writes what follows -->

old

<!-- to here -->
<!-- make bench writes what follows -->
<!-- to here -->
after
"""


def test_a_region_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_region(page, "make trust", r"new \1")
    write_region(page, "make trust", r"new \2")
    assert page.read_text() == PAGE.replace("old", r"new \2")


def test_a_page_without_the_region_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="no region"):
        write_region(page, "make soak", "new")
    assert page.read_text() == PAGE
