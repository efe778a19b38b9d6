"""The client against the service itself, and what it does when that refuses."""

import asyncio
import base64
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from prg.client import AsyncClient, Client, NoServiceError, ServiceError
from prg.errors import PrgError
from prg.uploads import REQUEST_BYTES, REQUEST_ROWS
from service.app import create_app
from service.settings import Settings
from tests.serving import served
from tests.tiny import png, write_tiny_entry

RED, BLUE = png(), png((0, 0, 255))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    write_tiny_entry(tmp_path / "models")
    with (
        served(Settings(model_repository=tmp_path / "models")) as address,
        Client(f"http://{address}") as found,
    ):
        yield found


def test_embeddings_of_many_images_in_order(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BLUE)
    images = [
        RED,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        b"text",
        *([RED, BLUE] * 35),
        tmp_path / "none",
    ]
    found = client.embed(images, t_end=0.5)
    assert (found.vectors.shape, found.vectors.dtype, len(found.fingerprint)) == ((75, 4), np.float32, 12)
    assert found.vectors[0] == pytest.approx([1, 0, 0, 0.5])
    assert found.vectors[[1, 2, 73]] == pytest.approx(np.array([[0, 0, 1, 0.5]] * 3))
    assert list(found.errors) == [3, 74]
    assert "none" in found.errors[74]
    assert np.isnan(found.vectors[[3, 74]]).all()


def test_one_image_in_each_form(client: Client, tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.png", np.full((32, 32, 3), (255, 0, 0), np.uint8)
    path.write_bytes(RED)
    for image in (path, str(path), RED, pixels, Image.fromarray(pixels)):
        assert client.embed(image).vectors == pytest.approx(np.array([[1, 0, 0, 0.8]]), abs=1e-5)


def test_levels_features_classes_and_models(client: Client) -> None:
    found = client.embed([RED, BLUE], t_end=[0.5, 0.25, 1.0], feature="state", normalize=True)
    assert found.vectors.shape == (2, 3, 768)
    assert np.linalg.norm(found.vectors, axis=2) == pytest.approx(np.ones((2, 3)), abs=1e-5)
    classes = client.classify([BLUE, b"text"], top_k=2)
    assert [p.label for p in classes.predictions[0]] == ["blue", "late"]
    assert (classes.predictions[1], list(classes.errors)) == ([], [1])
    assert client.models()["default"] == "tiny"
    of_another_call = (i for i in [RED, BLUE] if client.classify([i]).predictions[0][0].label == "blue")
    assert client.embed(of_another_call, t_end=0.5).vectors.tolist() == [pytest.approx([0, 0, 1, 0.5])]


def test_threads_share_one(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: client.embed([RED], t_end=k / 32).vectors[0, 3], range(32)))
    assert found == [k / 32 for k in range(32)]


def test_all_bad_is_no_exception_and_none_is(client: Client) -> None:
    assert list(client.embed([b"text"]).errors) == [0]
    with pytest.raises(ValueError):
        client.embed([])
    with pytest.raises(ServiceError, match="^422.*unknown"):
        client.embed([RED], model="unknown")


async def test_asyncio(tmp_path: Path) -> None:
    write_tiny_entry(tmp_path)
    app = create_app(Settings(model_repository=tmp_path))
    async with app.router.lifespan_context(app), async_client_of(httpx.ASGITransport(app)) as found:
        several = await asyncio.gather(*(found.embed([RED, BLUE], t_end=k / 8) for k in range(8)))
        assert [e.vectors[1, 3] for e in several] == [k / 8 for k in range(8)]
        assert (await found.classify([BLUE])).predictions[0][0].label == "blue"
        with pytest.raises(ServiceError, match="t_end"):
            await found.embed([RED], t_end=3)


def client_of(service: Callable[[httpx.Request], httpx.Response], **options: Any) -> Client:
    found = Client(**options)
    found._http = httpx.Client(transport=httpx.MockTransport(service), base_url="http://service")
    return found


def async_client_of(service: httpx.AsyncBaseTransport, **options: Any) -> AsyncClient:
    found = AsyncClient(**options)
    found._http = httpx.AsyncClient(transport=service, base_url="http://service")
    return found


def scripted(monkeypatch: pytest.MonkeyPatch, *steps: Any) -> tuple[Client, list[float]]:
    """A client of a service that answers step by step with (status, headers), and what it waited between them."""
    left, waited = iter(steps), []

    def service(_: httpx.Request) -> httpx.Response:
        step = next(left)
        if isinstance(step, Exception):
            raise step
        body = {"data": [], "default": "x"} if step[0] == 200 else {"detail": "no"}
        return httpx.Response(step[0], headers=step[1], json=body)

    async def sleep(_: object, seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("prg.client._Blocking._sleep", sleep)
    return client_of(service), waited


def test_it_waits_as_long_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    soon, past = (
        format_datetime(datetime.fromtimestamp(1_700_000_000 + s, UTC), usegmt=True) for s in (12, -9)
    )
    steps: list[Any] = [(503, {"Retry-After": after}) for after in ("7", "9999", soon, past, "later")]
    steps.insert(2, httpx.ConnectError("refused"))
    found, waited = scripted(monkeypatch, *steps, (200, {}))
    assert found.models()["default"] == "x"
    assert waited == [7, 60, 1, 12, 0, 8]


def test_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, attempts in ((503, 7), *((status, 1) for status in (400, 401, 403, 404, 422, 500, 504))):
        found, waited = scripted(monkeypatch, *[(status, {})] * attempts)
        with pytest.raises(ServiceError, match=f"^{status}"):
            found.models()
        assert len(waited) == attempts - 1
    found, waited = scripted(monkeypatch, *[httpx.ConnectError("refused")] * 7)
    with pytest.raises(NoServiceError, match="http://service/models"):
        found.models()
    assert sum(waited) < 2


def test_an_image_larger_than_a_request_may_be_fails_alone() -> None:
    def service(request: httpx.Request) -> httpx.Response:
        if len(request.content) > REQUEST_BYTES:
            return httpx.Response(413, json={"detail": "at most 100,000 bytes"})
        return answer(request)

    found = client_of(service).embed([b"image 1.", bytes(REQUEST_BYTES), b"image 2."])
    assert list(found.errors) == [1]
    assert "100,000 bytes" in found.errors[1]
    assert found.vectors[[0, 2], 0].tolist() == [1, 2]
    with pytest.raises(ServiceError, match="413"):
        client_of(service).embed([bytes(REQUEST_BYTES)])


def answer(request: httpx.Request, fingerprint: str = "f") -> httpx.Response:
    """Of a service whose embedding of the image b"image N." is [N]."""
    numbers = [float(n) for n in re.findall(rb"image (\d+)\.", request.content)]
    data = [{"embedding": base64.b64encode(np.float32([n]).tobytes()).decode()} for n in numbers]
    return httpx.Response(200, json={"model": "m", "fingerprint": fingerprint, "dim": 1, "data": data})


def numbered(count: int, read: list[int] | None = None) -> Iterator[bytes]:
    for number in range(count):
        if read is not None:
            read.append(number)
        yield b"image %d." % number


def test_several_requests_are_in_flight_and_answers_stay_in_order() -> None:
    meeting, lock = threading.Barrier(3), threading.Lock()
    answered, read = [], []

    def service(request: httpx.Request) -> httpx.Response:
        assert len(read) - sum(answered) <= (3 + 1) * REQUEST_ROWS + 1  # no more is held in memory
        meeting.wait(30)  # three at once, or an error
        found = answer(request)
        with lock:
            answered.append(len(found.json()["data"]))
        time.sleep(0.01 * (len(answered) % 3))
        return found

    count = 6 * REQUEST_ROWS
    found = client_of(service, concurrency=3).embed(numbered(count, read))
    assert found.vectors[:, 0].tolist() == list(range(count))


async def test_concurrency_is_bounded() -> None:
    running, most = 0, 0

    async def service(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return answer(request)

    async with async_client_of(httpx.MockTransport(service), concurrency=2) as found:
        vectors = (await found.embed(numbered(300))).vectors
    assert vectors[:, 0].tolist() == list(range(300))
    assert most == 2
    with pytest.raises(PrgError, match="concurrency"):
        Client(concurrency=0)


def test_the_first_failure_ends_the_others() -> None:
    asked, others = [], threading.active_count()

    def service(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if b"image 0." not in request.content:
            return httpx.Response(503, headers={"Retry-After": "60"}, json={"detail": "busy"})
        while len(asked) < 4:
            time.sleep(0.001)
        return httpx.Response(422, json={"detail": "no such option"})

    with pytest.raises(ServiceError, match="^422"):
        client_of(service).embed(numbered(1000))
    until = time.monotonic() + 30
    while threading.active_count() > others and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= others  # none waits out its minute
    assert len(asked) == 4


def test_answers_of_two_models_are_not_mixed() -> None:
    def service(request: httpx.Request) -> httpx.Response:
        return answer(request, "old" if b"image 0." in request.content else "new")

    with pytest.raises(ServiceError, match="^409"):
        client_of(service).embed(numbered(100))


def test_levels_count_as_rows_of_a_request() -> None:
    sizes = []

    def service(request: httpx.Request) -> httpx.Response:
        data = [{"embeddings": [{"embedding": "AACAPw=="}] * 8}] * len(answer(request).json()["data"])
        sizes.append(len(data))
        return httpx.Response(200, json={"model": "m", "fingerprint": "f", "dim": 1, "data": data})

    levels = [k / 8 for k in range(8)]
    assert client_of(service).embed(numbered(10), t_end=levels).vectors.shape == (10, 8, 1)
    assert max(sizes) * 8 <= REQUEST_ROWS


def test_an_error_of_the_images_themselves_is_raised_as_it_is() -> None:
    def broken() -> Iterator[bytes]:
        yield from numbered(100)
        raise LookupError("no more")

    with pytest.raises(LookupError):
        client_of(answer).embed(broken())


def test_a_client_that_nobody_closes_lets_the_program_end_and_needs_no_torch() -> None:
    code = "import sys; from prg.client import Client; Client('http://127.0.0.1:9'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "http://[::1", "ftp://a", ""])
def test_an_address_without_a_scheme_is_an_error_at_once(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(PrgError, match=re.escape(repr(url))):
            kind(url)


def test_proxies_are_not_for_this_machine(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(client._http.base_url)
    for name in ("ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    with Client(f" {address} ") as found:
        assert found.models()["default"] == "tiny"
    with pytest.raises(PrgError, match="NO_PROXY"):
        Client("http://elsewhere")
