"""Every example of the documents runs, or is at least made of words that exist."""

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.app import create_app
from service.settings import Settings, load_settings
from tests.blocks import ROOT, Block, Desk, blocks, check
from tests.prg.workshop import image_folder, overrides
from tests.serving import served

PAGES = [ROOT / "README.md", ROOT / "docker" / "keys" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
FILES = ("photo.jpg", "cat.jpg", "dog.jpg", "cat.png")
"""Pictures that the documents speak of."""


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """host:port of the service with the shipped model."""
    settings = Settings(
        model_repository=ROOT / "model_repository", default_model="prg-everyday", request_timeout_s=600
    )
    with served(settings, patience_s=300) as address:
        yield address


def serve(variables: dict[str, str]) -> None:
    """prg-serve with these variables, in the working folder: it starts, and answers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        settings = load_settings()
        with TestClient(create_app(settings)) as client:
            default = client.get("/health/live") and client.app.state.gateway.default_model()  # type: ignore[attr-defined]
            assert client.app.state.gateway.engine.models()[default].ready  # type: ignore[attr-defined]


@pytest.fixture
def desk(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    rng = np.random.default_rng(0)
    for name in FILES:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    image_folder(tmp_path / "photos")
    shutil.copytree(ROOT / "model_repository", tmp_path / "model_repository")
    for name in ("examples", "prg"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    image = base64.b64encode((tmp_path / "cat.png").read_bytes()).decode()
    return Desk(tmp_path, service, image, tuple(overrides()), serve)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: apt-get install curl")
@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.reason is None}))
def test_the_examples_run(desk: Desk, page: str) -> None:
    for block in BLOCKS:
        if block.page == page and block.reason is None:
            desk.run(block)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_words_of_an_example_exist(block: Block) -> None:
    check(block)


def test_options_in_running_text_exist() -> None:
    from prg.cli import parser

    text = "".join(re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL) for page in PAGES)
    asked = {
        w for span in re.findall(r"`([^`]+)`", text) for w in re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", span)
    }
    actions = parser()._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
    known = {word for sub in actions for word in sub._option_string_actions}
    for script in (*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', script.read_text("utf-8")))
    known |= {"--new-key", "--scopes", "--wait", "--rm", "--no-deps", "--trace-config"}
    known |= {"--nnodes", "--node-rank", "--master-addr", "--master-port"}  # of torchrun
    assert asked <= known
    assert "--dry-run" in asked
