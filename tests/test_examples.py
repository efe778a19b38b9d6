"""Every example of the documents runs, or is at least made of words that exist."""

import base64
import contextlib
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
from tests.blocks import ROOT, Block, Desk, blocks, check, compare
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
    """A folder with all that the documents speak of."""
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
    asked = {w for span in re.findall(r"`([^`]+)`", text) for w in re.findall(r"(?<!\S)--[a-z][a-z-]+", span)}
    actions = parser()._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
    known = {word for sub in actions for word in sub._option_string_actions}
    for script in (*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text("utf-8")))
    known |= {"--new-key", "--scopes", "--wait", "--rm", "--no-deps"}
    known |= {"--nnodes", "--node-rank", "--master-addr", "--master-port"}  # of torchrun
    assert asked <= known
    assert "--dry-run" in asked


def page_of(tmp_path: Path, text: str) -> Block:
    path = tmp_path / "page.md"
    path.write_text(text)
    [block] = blocks(path)
    return block


@pytest.mark.parametrize(
    "text",
    [
        "prg embed photos/ --out a.npy --entri x",
        "prg pretrain runs/a --recipe images-32 --epochs 3",
        "make everything",
        "PRG_MAX_PIXEL=3 prg-serve",
        "docker compose logs gatewy",
        "COMPOSE_PROFILES=tpu docker compose up",
        "pip install faiss-gpu",
        "pip install './prg_service-0.1.0-py3-none-any.whl[everything]'",
        "for x in; do",
    ],
)
def test_a_word_that_does_not_exist_is_found(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError):
        check(page_of(tmp_path, f"<!-- not run: a test -->\n```sh\n{text}\n```\n"))


@pytest.mark.parametrize(
    ("written", "answered", "same"),
    [
        *(('{"a": 1}', '{"a": 1, "b": 2}', False), ('{"a": 1, "b": 2}', '{"a": 1}', False)),
        *(('{"a": [1, 2]}', '{"a": [1, 2, 3]}', False), ('{"a": [1, 2,…]}', '{"a": [1]}', False)),
        *(('{"a": "x"}', '{"a": 1}', False), ('{"status": 422}', '{"status": 413}', False)),
        *(
            ("embedded: a.npy", "embedded: b.npy", False),
            ("embedded: a.npy", "embedded: a.npy; 2 not", False),
        ),
        *(('{"a": 1.5, …}', '{"a": 2, "b": 2}', True), ("12 of 30 files in …", "3 of 4 files in /a/b", True)),
        ('{"a": [1,…], "b": "…"}', '{"a": [1, 2, 3], "b": {"c": 1}}', True),
    ],
)
def test_another_answer_is_found(written: str, answered: str, same: bool) -> None:
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        compare(written, answered, "here")


@pytest.mark.parametrize(
    "command",
    [
        "curl -F files=@cat.jpg localhost:8000/embed?t_end=7",
        "curl -F files=@missing.jpg localhost:8000/embed",
        "prg embed nothing/ --entry model_repository/prg-cifar10 --out a.npy",
        "PRG_DEFAULT_MODEL=other prg-serve",
        "cat missing.txt | cat",
    ],
)
def test_an_example_that_fails_is_found(desk: Desk, tmp_path: Path, command: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        desk.run(page_of(tmp_path, f"```sh\n{command}\n```\n"))


def test_marks_say_why() -> None:
    assert {b.reason for b in BLOCKS if b.reason} <= {
        *("needs Docker", "needs a GPU", "needs several GPUs", "needs nginx", "needs a cluster"),
        *("takes hours", "four at once"),
        *("installs packages", "a sketch", "needs files that others trained", "run by a test of its own"),
        "tests/test_hand_over.py runs it, where the package is installed",
        "tests/test_hand_over.py runs it, where a server is installed",
    }
