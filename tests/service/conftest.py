"""A running application on a tiny entry, without a network."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.tiny import write_tiny_entry

Start = Callable[..., TestClient]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the service with these settings; by default on one tiny entry."""
    with ExitStack() as stack:

        def run(**settings: object) -> TestClient:
            if "model_repository" not in settings:
                settings["model_repository"] = tmp_path / "models"
                write_tiny_entry(tmp_path / "models")
            return stack.enter_context(TestClient(create_app(Settings(**settings))))  # type: ignore[arg-type]

        yield run


@pytest.fixture
def client(start: Start) -> TestClient:
    """The service on one tiny entry."""
    return start()
