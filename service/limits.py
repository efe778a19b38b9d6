"""What a request may cost: bytes of its body, its deadline, and nothing more once the caller has hung up."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    BODY_TOO_LARGE,
    CONTENT_ENCODING_NOT_ACCEPTED,
    DEADLINE_EXCEEDED,
    WRONG_HEADER,
    Problem,
    unavailable,
)
from service.schemas import Priority

T = TypeVar("T")
HELD_BODIES = 8
"""Bodies of the largest size that may be in memory together; many more small ones fit in as many bytes."""


class HungUp(Exception):
    """The caller is gone; nobody reads an answer."""


class BodyLimit:
    """ASGI layer that counts body bytes as they arrive, before anything parses them; a compressed body is a 415.

    A body over `max_bytes` is a 413, by its Content-Length before a byte is read. Bodies that are read at
    the same time may hold `HELD_BODIES` times that. Each may grow while it is smaller than what is left of it, else
    it is a 503: so a few large ones that come slowly leave room for many small ones.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        own = 0

        encoding = dict(scope["headers"]).get(b"content-encoding", b"identity").decode("latin-1")

        async def counted() -> Message:
            nonlocal own
            if encoding.strip().lower() not in ("", "identity"):
                detail = f"Content-Encoding is {encoding[:40]!r}; send the body as it is, uncompressed"
                raise Problem(CONTENT_ENCODING_NOT_ACCEPTED, detail, headers={"Connection": "close"})
            if announced > self.max_bytes:
                raise self._too_large()
            message = await receive()
            size = len(message.get("body", b""))
            own += size
            self.held += size
            if own > self.max_bytes:
                raise self._too_large()
            if own > HELD_BODIES * self.max_bytes - self.held:
                raise unavailable("too many request bodies are being read at once; come back soon", 1)
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.held -= own
            if expected := scope.get("state", {}).get("expected"):
                expected.leave()

    def _too_large(self) -> Problem:
        detail = f"a request may have {self.max_bytes:,} bytes; send fewer images in each"
        # The connection is closed because the rest of the body is not read.
        return Problem(BODY_TOO_LARGE, detail, headers={"Connection": "close"})


class HeadAsGet:
    """ASGI layer that answers HEAD as GET, for balancers and monitors; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope
        try:
            await self.app(inner, receive, send)
        finally:
            scope["route"] = inner.get("route")


@asynccontextmanager
async def deadline(request: Request, timeout_s: float) -> AsyncIterator[float]:
    """The loop's time by which the answer is due; what runs longer inside is cancelled and is a 504.

    `Request-Timeout` shortens it.
    """
    asked = request.headers.get("request-timeout")
    if asked is not None:
        timeout_s = min(timeout_s, _seconds(asked))
    due = asyncio.get_running_loop().time() + timeout_s
    try:
        async with asyncio.timeout_at(due):
            yield due
    except TimeoutError:
        detail = f"not done within {timeout_s:g} s; send fewer images, or come back when there is less load"
        # The connection is closed because a body may still be coming in.
        raise Problem(DEADLINE_EXCEEDED, detail, headers={"Connection": "close"}) from None


def priority(request: Request) -> Priority:
    """Which queue: the `Priority` header.

    Browsers and proxies send a header of that name too (`u=1, i`, RFC 9218), which is not about our queues.
    """
    asked = request.headers.get("priority", "interactive").strip().lower()
    if re.match(r"(u=\d|i\b)", asked) and asked != "interactive":
        return "interactive"
    if asked not in ("interactive", "bulk"):
        raise Problem(WRONG_HEADER, f"Priority is {asked[:40]!r}, must be interactive or bulk")
    return cast(Priority, asked)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, which is cancelled when the caller hangs up. The body must have been read. Raises HungUp."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Problem(WRONG_HEADER, f"Request-Timeout is {text[:40]!r}, must be seconds above 0")
    return seconds
