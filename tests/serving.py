"""The service on a real port, in a thread of the test's own process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from service.app import create_app
from service.server import Server
from service.settings import Settings


@contextmanager
def served(settings: Settings, patience_s: float = 30, app: FastAPI | None = None) -> Iterator[str]:
    """host:port of the service, once it has started; it ends with the context."""
    server = Server(app or create_app(settings), settings.model_copy(update={"port": 0}))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + patience_s
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
