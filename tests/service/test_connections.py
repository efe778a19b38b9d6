"""Connections, spoken to in bytes: what is refused unread, what is no HTTP, and callers that are slow."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service import connections, server
from service.admission import Flow
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import eventually
from tests.serving import served
from tests.tiny import png, write_tiny_entry

POST = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
HEALTH = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Service(ExitStack):
    """A running service, and the connections to it."""

    def __init__(self, app: FastAPI, address: str) -> None:
        super().__init__()
        self.all: connections.Connections = app.state.connections
        self.address = address

    def connect(self, content: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        host, port = self.address.split(":")
        connection = self.enter_context(socket.create_connection((host, int(port)), timeout=20))
        connection.sendall(content)
        return connection


def read(connection: socket.socket) -> bytes:
    """Everything until the other side closes, or resets."""
    answer = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def status(connection: socket.socket) -> int:
    """Of the next answer; 0 where the connection was closed without one."""
    try:
        return int(connection.recv(65536)[9:12] or b"0")
    except ConnectionResetError:
        return 0


@contextmanager
def running(work: Path, **settings: Any) -> Iterator[Service]:
    write_tiny_entry(work / "models")
    chosen = Settings(model_repository=work / "models", **settings)
    app = create_app(chosen)
    with served(chosen, app=app) as address, Service(app, address) as service:
        yield service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(
        tmp_path_factory.mktemp("service"), queue_images=8, cors_origins=("https://app.example",)
    ) as it:
        yield it


@contextmanager
def full(service: Service, flow: Flow = Flow(), requests: int = 8) -> Iterator[None]:  # noqa: B008
    """So many requests of an image each are in work."""
    with ExitStack() as stack:
        for _ in range(requests):
            stack.enter_context(service.all.admission.admit(1, flow))
        yield


def test_a_request_that_cannot_be_admitted_is_refused_unread(service: Service) -> None:
    """On a connection that goes on; nothing else is refused, and what is refused is counted."""
    body = png()
    with full(service):
        connection = service.connect(POST + b"X-Request-ID: mine\r\nContent-Length: %d\r\n\r\n" % len(body))
        # Its body has not been sent.
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1\r\n" in answer
        assert b"x-content-type-options: nosniff\r\n" in answer
        assert b"x-request-id: mine\r\n" in answer
        assert b"access-control" not in answer
        connection.sendall(body + HEALTH)
        assert status(connection) == 200
        models = httpx.get(f"http://{service.address}/models")
        assert models.status_code == 200
        counted = 'prg_requests_total{route="/embed",status="503"} 1.0'
        eventually(lambda: counted in httpx.get(f"http://{service.address}/metrics").text)
        page = httpx.post(
            f"http://{service.address}/v1/embeddings", headers={"Origin": "https://app.example"}, json={}
        )
        assert page.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert page.json()["error"]["code"] == "service_unavailable"
    connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert status(connection) == 200


@pytest.mark.parametrize("size", [100, 2 << 20])
def test_a_refused_caller_reads_the_refusal_whatever_it_was_sending(service: Service, size: int) -> None:
    with full(service):
        assert (
            httpx.post(
                f"http://{service.address}/embed", content=bytes(size), headers={"Content-Type": "image/png"}
            ).status_code
            == 503
        )
        connection = service.connect(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size)
        assert read(connection).startswith(b"HTTP/1.1 503")


def test_flows_leave_room_for_each_other(service: Service) -> None:
    """Bulk and a greedy key are refused while others are let in."""
    bulk, one, other = Flow("bulk"), Flow(key="one"), Flow(key="other")
    shut = service.all.admission.shut
    with full(service, bulk, 4):
        assert shut(bulk)
        assert not shut(Flow())
        url, image = f"http://{service.address}/embed", {"files": ("a.png", png())}
        sent = [httpx.post(url, files=image, headers={"Priority": p}) for p in ("bulk", "interactive")]
        assert [response.status_code for response in sent] == [503, 200]
    with full(service, one, 7):
        assert shut(one)
        assert not shut(other)
    assert not shut(bulk)


def test_a_request_counts_from_its_arrival_until_it_ends(service: Service) -> None:
    """Also where it ends before it is admitted, and nothing stays counted."""
    admission = service.all.admission
    for content, sent in ((png(), 200), (b"nothing", 422)):
        connection = service.connect(POST + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        assert status(connection) == sent
    service.connect(POST + b"Content-Length: %d\r\n\r\n" % len(png()) + png()).close()
    eventually(lambda: not admission._flows)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /%ff%00 HTTP/9.9\r\n\r\n", 400),
        (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: -3\r\n\r\n", 400),
        (POST + b"Content-Length: 3x\r\n\r\nabc", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 0),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /" + b"a" * 100_000, 431),
        (b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n", 431),
    ],
)
def test_what_is_no_request_is_told_so_and_closed(service: Service, content: bytes, expected: int) -> None:
    connection = service.connect()
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(content)
    answer = read(connection)
    # A reset can overtake what was answered to a caller that goes on sending.
    assert int(answer[9:12] or b"0") in (
        {expected, 0} if len(content) > connections.HEAD_BYTES else {expected}
    )
    assert httpx.get(f"http://{service.address}/health/live").status_code == 200


def test_a_body_that_lies_about_its_length(service: Service) -> None:
    """Shorter: closed when its sender hangs up. Longer: the rest is no request."""
    body = png()
    connection = service.connect(POST + b"Content-Length: 5000\r\n\r\n" + body)
    connection.shutdown(socket.SHUT_WR)
    assert read(connection) == b""
    connection = service.connect(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"more\r\n\r\n")
    assert b"HTTP/1.1 5" not in read(connection)


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    body = png()
    post = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = HEALTH.replace(b"Host", b"Connection: close\r\nHost")
    answer = read(service.connect(post + HEALTH + post + last))
    kinds = [b"embedding" in part for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert kinds == [True, False, True, False]
    eventually(lambda: not service.all.admission._flows)


def test_slow_callers_are_closed_and_delay_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that takes too long, a connection on which nothing comes, an answer that nobody reads."""
    for name in ("HEAD_S", "UNREAD_S", "SWEEP_S"):
        monkeypatch.setattr(connections, name, 0.2)
    with running(tmp_path) as service:
        nothing, slow = service.connect(), service.connect(b"GET / HT")
        assert read(slow).startswith(b"HTTP/1.1 408")
        assert read(nothing) == b""
        unread = service.connect(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        eventually(lambda: not service.all.unread and unread not in service.all.waiting)
        assert httpx.get(f"http://{service.address}/health/live").status_code == 200


def test_of_too_many_connections_the_longest_idle_is_closed(tmp_path: Path) -> None:
    with running(tmp_path, max_connections=3) as service:
        first = service.connect(HEALTH)
        assert status(first) == 200
        # One of these sends its body a byte at a time.
        others = [service.connect(), service.connect(POST + b"Content-Length: 9\r\n\r\n")]
        eventually(lambda: len(service.all.waiting) == 3)
        last = service.connect(HEALTH)
        assert status(last) == 200
        assert read(first) == b""
        others[1].sendall(b"123456789")
        assert status(others[1]) == 422


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [((1024, resource.RLIM_INFINITY), 2256), ((1024, 1500), 1500), ((4096, 4096), 2256)],
)
def test_as_many_files_are_asked_for_as_connections_need(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], allowed: int
) -> None:
    """An unlimited number is a negative one to the system."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    assert server._allow_files(2256) == allowed
    assert asked == ([] if limits[0] >= allowed else [(allowed, limits[1])])
