"""HTTP connections: how many, how long each may take, and the refusal that costs least.

Stands on uvicorn's protocol over httptools. A request that can't be admitted is refused when its head has been read:
before routing, validation and the body, for a small part of what an answer costs.
"""

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.admission import Admission, Flow
from service.auth import Keys
from service.errors import BAD_REQUEST, HEAD_TOO_LARGE, REQUEST_TIMEOUT, Problem, ProblemType, unavailable
from service.headers import secured
from service.telemetry import INFERENCE_ROUTES, Metrics, log, request_id_of

HEAD_BYTES = 64 << 10
HEAD_S = 10.0
"""How long a request's head may take from its first byte, and that byte on a new connection."""
IDLE_S = 75.0
"""How long a connection may wait for its next request: longer than at the usual balancer, which would otherwise send
on a connection that has just been closed."""
UNREAD_S = 30.0
"""How long an answer may wait for its reader."""
DRAINED_BYTES = 1 << 20
"""So much of a refused body is read, so that its sender reads the refusal and the connection goes on."""
SWEEP_S = 1.0
STARTS = 8
"""Requests that are begun in one turn of the event loop. What has been admitted waits here, not as tasks that are all
ready to run: one turn would then take as long as all of them, and for so long nothing is accepted, read or refused."""
ROUTES = frozenset(route.encode() for route in INFERENCE_ROUTES)


class Connections:
    """All connections of a server, and what bounds them."""

    def __init__(
        self, admission: Admission, keys: Keys, metrics: Metrics, most: int, cors_origins: tuple[str, ...]
    ) -> None:
        self.admission = admission
        self.waiting: dict[Connection, float] = {}
        """Those whose caller is to send something, with the loop's time by which it must; the oldest first."""
        self.unread: dict[Connection, float] = {}
        """The same of those whose caller is to read an answer."""
        self._keys = keys
        self._metrics = metrics
        self.most = most
        self._cors = frozenset(origin.encode() for origin in cors_origins)
        self._refused: Counter[tuple[bytes, int]] = Counter()
        """By path and status, since the last sweep: to count each in the metrics would be a third of its cost."""
        self._to_start: deque[Callable[[], None]] = deque()

    def start(self, request: Callable[[], None]) -> None:
        """Begin with a request soon, in the order of their arrival."""
        if not self._to_start:
            asyncio.get_running_loop().call_soon(self._turn)
        self._to_start.append(request)

    def _turn(self) -> None:
        for _ in range(min(STARTS, len(self._to_start))):
            self._to_start.popleft()()
        if self._to_start:
            asyncio.get_running_loop().call_soon(self._turn)

    def make_room(self, count: int) -> None:
        """Of more connections than allowed, close the one whose caller has let us wait longest."""
        if count > self.most and self.waiting:
            next(iter(self.waiting)).transport.abort()

    def judge(self, path: bytes, headers: Mapping[bytes, bytes]) -> tuple[Flow | None, Problem | None]:
        """Of a POST: the flow it is counted in, None where it asks for no model; and why it is refused."""
        if path not in ROUTES:
            return None, None
        key = self._keys.find(headers.get(b"authorization", b"").decode("latin-1"))
        bulk = headers.get(b"priority", b"").strip().lower() == b"bulk"
        flow = Flow("bulk" if bulk else "interactive", key.name if key else "")
        problem = self._keys.spent(key)
        if problem is None and (seconds := self.admission.shut(flow)):
            problem = unavailable(f"the {self.admission.capacity} places for images are taken", seconds)
        if problem:
            self._refused[path, problem.kind.status] += 1
        return flow, problem

    def cors(self, origin: bytes) -> bytes:
        """The lines of a head by which a page of an allowed origin may read a refusal."""
        if not self._cors & {origin, b"*"}:
            return b""
        shown = b"access-control-expose-headers: Retry-After, X-Request-ID\r\n"
        return b"access-control-allow-origin: %s\r\nvary: Origin\r\n%s" % (origin, shown)

    async def watch(self) -> None:
        """Close what takes too long; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in [c for c, until in self.waiting.items() if until < now]:
                connection.too_slow()
            for connection in [c for c, until in self.unread.items() if until < now]:
                connection.transport.abort()
            if self._refused:
                log.warning("refused unread", requests=self._refused.total(), waiting=self.admission.held)
            for (path, status), count in self._refused.items():
                self._metrics.refused(path.decode(), status, count)
            self._refused.clear()


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._all = connections
        self._in_head = False
        self._bytes = 0
        """Of the head, then of a refused body."""
        self._flow: Flow | None = None
        self._refused = False
        self._last = False
        """The refused request is the last one on this connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEAD_S)
        self._all.make_room(len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.waiting.pop(self, None)
        self._all.unread.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._all.unread[self] = self.loop.time() + UNREAD_S
        super().pause_writing()

    def resume_writing(self) -> None:
        self._all.unread.pop(self, None)
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._bytes += len(data)
            if self._bytes > HEAD_BYTES:
                self._end(HEAD_TOO_LARGE, f"at most {HEAD_BYTES:,} bytes are read")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._bytes = True, 0
        if not self._busy():
            self._wait(HEAD_S)

    def on_headers_complete(self) -> None:
        self._in_head, self._bytes = False, 0
        # What is pipelined behind an unanswered request is answered after it, so it goes the whole way.
        if self._busy():
            super().on_headers_complete()
            return
        # A line has a colon, a space and its end too.
        if sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES:
            self._end(HEAD_TOO_LARGE, f"at most {HEAD_BYTES:,} bytes are read")
            return
        self._flow, problem = None, None
        if self.parser.get_method() == b"POST":
            headers = dict(self.headers)
            self._flow, problem = self._all.judge(self.url.partition(b"?")[0], headers)
        if problem:
            self._refuse(problem, headers)
        else:
            super().on_headers_complete()
            # The request's own deadline bounds how long its body may take.
            self._wait(math.inf)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        start = partial(super()._start_asgi_task, cycle, app)
        if self._flow:
            self._all.start(start)
        else:
            start()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)
            return
        self._bytes += len(body)
        if self._bytes > DRAINED_BYTES:
            self.transport.close()

    def on_message_complete(self) -> None:
        if self._refused:
            self._refused = False
            if self._last:
                self.transport.close()
            self._wait(IDLE_S)
        elif self.transport.is_closing():
            return
        elif self._busy():
            self._all.waiting.pop(self, None)
            if self._flow and not self.pipeline:
                self.scope["state"]["expected"] = self._all.admission.expect(self._flow)
            super().on_message_complete()
        else:
            # Answered before its body had arrived.
            self._wait(IDLE_S)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._busy():
            self._wait(IDLE_S)

    def send_400_response(self, msg: str) -> None:
        self._end(BAD_REQUEST, "this is no HTTP/1.1 request that can be read")

    def too_slow(self) -> None:
        """Close it; a caller that has begun a request is told why."""
        if self._in_head or self._refused:
            self._end(REQUEST_TIMEOUT, f"the head of a request must arrive within {HEAD_S:g} s")
        else:
            self.transport.close()

    def _busy(self) -> bool:
        """Whether a request is under way here, read or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self, seconds: float) -> None:
        """The caller is to send something, within so many seconds."""
        # Anew, so that the oldest come first.
        self._all.waiting.pop(self, None)
        if not self.transport.is_closing():
            self._all.waiting[self] = self.loop.time() + seconds

    def _refuse(self, problem: Problem, headers: Mapping[bytes, bytes]) -> None:
        """Answer at once; the body is read and thrown away."""
        length = headers.get(b"content-length", b"0")
        self._last = (
            not self.parser.should_keep_alive() or not length.isdigit() or int(length) > DRAINED_BYTES
        )
        retry_after = (problem.headers or {}).get("Retry-After", "1")
        head, body = _rendered(problem.kind, problem.detail, self._path(), retry_after, self._last)
        cors = self._all.cors(headers[b"origin"]) if b"origin" in headers else b""
        self.transport.write(
            b"%sx-request-id: %s\r\n%s\r\n%s" % (head, request_id_of(headers).encode(), cors, body)
        )
        self._refused = True
        # A caller that waits for "100 Continue" never sends the body.
        if self.expect_100_continue:
            self.transport.close()
        else:
            self._wait(HEAD_S)

    def _end(self, kind: ProblemType, detail: str) -> None:
        """Answer what can't be read, and close."""
        if self.transport.is_closing():
            return
        # In the middle of another answer nothing can be said.
        if not self._busy():
            self.transport.write(b"%s\r\n%s" % _rendered(kind, detail, self._path(), None, True))
        self.transport.close()

    def _path(self) -> str:
        return getattr(self, "url", b"").partition(b"?")[0].decode("latin-1")


@lru_cache(256)
def _rendered(
    kind: ProblemType, detail: str, path: str, retry_after: str | None, last: bool
) -> tuple[bytes, bytes]:
    """(head without the empty line, body) of a problem's answer."""
    headers = {"Retry-After": retry_after} if retry_after else {}
    response = Problem(kind, detail, headers | ({"Connection": "close"} if last else {})).response(path)
    lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n".encode()]
    lines += [b"%s: %s\r\n" % line for line in secured(response.raw_headers)]
    return b"".join(lines), bytes(response.body)
