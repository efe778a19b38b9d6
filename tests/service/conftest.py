"""A running application on a tiny entry, over each engine, without a network of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.real_triton.server import TritonServer, find_server
from tests.tiny import png, write_tiny_entry

Start = Callable[..., TestClient]
IMAGE = [("files", ("a.png", png()))]
"""A form with one image."""


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real tritonserver on one tiny entry."""
    if find_server() is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    work = tmp_path_factory.mktemp("triton")
    write_tiny_entry(work / "models")
    server = TritonServer(work / "models", work).start()
    yield server
    server.stop()


@pytest.fixture(params=["embedded", "triton"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Start the service with these settings; by default on one tiny entry."""
    with ExitStack() as stack:

        def run(**settings: object) -> TestClient:
            if request.param == "triton":
                settings |= {"engine": "triton", "triton_url": (server(settings).url,)}
            elif "model_repository" not in settings:
                settings["model_repository"] = tmp_path / "models"
                write_tiny_entry(tmp_path / "models")
            return stack.enter_context(TestClient(create_app(Settings(**settings))))  # type: ignore[arg-type]

        def server(settings: dict[str, object]) -> TritonServer:
            shared: TritonServer = request.getfixturevalue("triton")
            if "model_repository" not in settings:
                # A server that died fails the test that it died in, and no later one.
                assert shared.process is not None
                if shared.process.poll() is not None:
                    shared.kill()
                    shared.start()
                return shared
            repository = settings["model_repository"]
            assert isinstance(repository, Path)
            own = TritonServer(repository, tmp_path).start()
            stack.callback(own.stop)
            return own

        yield run


@pytest.fixture
def client(start: Start) -> TestClient:
    """The service on one tiny entry."""
    return start()


def engine_of(client: TestClient) -> Any:
    return client.app.state.gateway.engine  # type: ignore[attr-defined]


def rescan(client: TestClient) -> None:
    """What SIGHUP does with the repository."""
    assert client.portal is not None
    client.portal.call(engine_of(client).rescan)


def eventually(check: Any, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "did not come true"
        time.sleep(0.02)
