"""Real servers for these tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.real_triton.server import TritonServer, find_server
from tests.tiny import write_tiny_entry

Serve = Callable[..., TritonServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server on a repository (by default one tiny entry)."""
    if find_server() is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    servers: list[TritonServer] = []

    def run(repository: Path | None = None, start: bool = True) -> TritonServer:
        if repository is None:
            repository = tmp_path / "models"
            if not repository.exists():
                write_tiny_entry(repository)
        work = tmp_path / f"server-{len(servers)}"
        work.mkdir()
        servers.append(TritonServer(repository, work))
        return servers[-1].start() if start else servers[-1]

    yield run
    for server in servers:
        server.kill()
