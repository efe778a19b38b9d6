"""The HTTP server: uvicorn with our connections."""

import asyncio
import gc
import resource
import socket
import sys
import threading
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.connections import IDLE_S, Connection, Connections
from service.gateway import Gateway
from service.settings import Settings, SettingsError
from service.telemetry import log

OTHER_FILES = 256
"""Files that are open beside connections, at most: those of the models, of Triton's channels, of fetched URLs."""


ACCEPTS = 32
"""Under so many descriptors each socket is listened on: in a turn of the event loop libuv accepts one connection from
each, and a turn may take milliseconds."""

YOUNG_OBJECTS = 50_000
"""So many new objects make the garbage collector look for cycles. By Python's 700 it looks through the requests in work
all the time: an eighth of the service's limit, and half under twice the load."""


async def bind(settings: Settings) -> list[socket.socket]:
    """The sockets of PRG_HOST and PRG_PORT, each under `ACCEPTS` descriptors. Raises SettingsError.

    Nothing listens on them yet. So a port in use is an error before the models are loaded, which takes a while, and
    no caller waits at a port that does not answer.
    """
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(asyncio.Protocol, settings.host, settings.port, start_serving=False)
    except OSError as error:
        raise SettingsError(f"PRG_HOST={settings.host} PRG_PORT={settings.port}: {error}") from None
    sockets = [of.dup() for of in server.sockets for _ in range(ACCEPTS)]
    server.close()
    return sockets


class Server(uvicorn.Server):
    """uvicorn that says it is not ready before it stops listening; a second signal does not wait."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        connections: Connections = app.state.connections
        connections.most = max(1, _allow_files(connections.most + OTHER_FILES) - OTHER_FILES)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=partial(Connection, connections),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(IDLE_S),
            timeout_graceful_shutdown=int(settings.request_timeout_s) + 5,
        )
        super().__init__(config)
        self._state = app.state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
            # uvloop keeps to itself that a socket can't be listened on.
            for bound in sockets or ():
                bound.listen(self.config.backlog)
        except OSError:
            log.error("can't listen", port=self.config.port, reason="another process listens there by now")
            await self.lifespan.shutdown()
            sys.exit(1)
        # What has been loaded stays, so it is not looked at again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        gateway: Gateway | None = self._state.gateway if self.started else None
        if gateway and gateway.settings.drain_s and not gateway.readiness.stopping:
            gateway.readiness.stopping = True
            threading.Timer(gateway.settings.drain_s, super().handle_exit, (sig, None)).start()
        else:
            super().handle_exit(sig, frame)


def _allow_files(wanted: int) -> int:
    """Ask for so many open files. Returns how many of them this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Unlimited is a negative number.
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
