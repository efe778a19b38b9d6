"""The client against the service itself, and what it does when that refuses."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from prg import client as module
from prg.client import AsyncClient, Client, NoServiceError, ServiceError
from prg.errors import PrgError
from service.app import create_app
from service.settings import Settings
from tests.serving import served
from tests.tiny import png, write_tiny_entry

RED, BLUE = png(), png((0, 0, 255))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of a service on a tiny entry."""
    write_tiny_entry(tmp_path / "models")
    with (
        served(Settings(model_repository=tmp_path / "models")) as address,
        Client(f"http://{address}") as found,
    ):
        yield found


def test_embeddings_of_many_images_in_order(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BLUE)
    images = [RED, tmp_path / "a.png", str(tmp_path / "a.png"), b"text", *([RED, BLUE] * 35)]
    found = client.embed(images, t_end=0.5)
    assert found.vectors.shape == (74, 4)
    assert found.vectors.dtype == np.float32
    assert found.vectors[0] == pytest.approx([1, 0, 0, 0.5])
    assert found.vectors[[1, 2, 73]] == pytest.approx(np.array([[0, 0, 1, 0.5]] * 3))
    assert list(found.errors) == [3]
    assert np.isnan(found.vectors[3]).all()
    assert len(found.fingerprint) == 12


def test_levels_features_and_lengths(client: Client) -> None:
    found = client.embed([RED, BLUE], t_end=[0.5, 0.25, 1.0], feature="state", normalize=True)
    assert found.vectors.shape == (2, 3, 768)
    assert np.linalg.norm(found.vectors, axis=2) == pytest.approx(np.ones((2, 3)), abs=1e-5)


def test_classes_and_models(client: Client) -> None:
    found = client.classify([BLUE, b"text"], top_k=2)
    assert [p.label for p in found.predictions[0]] == ["blue", "late"]
    assert found.predictions[1] == []
    assert list(found.errors) == [1]
    assert client.models()["default"] == "tiny"


def test_images_may_come_from_another_call(client: Client) -> None:
    blue = (image for image in [RED, BLUE] if client.classify([image]).predictions[0][0].label == "blue")
    assert client.embed(blue, t_end=0.5).vectors.tolist() == [pytest.approx([0, 0, 1, 0.5])]


def test_threads_share_one(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: client.embed([RED], t_end=k / 32).vectors[0, 3], range(32)))
    assert found == [k / 32 for k in range(32)]


def test_all_bad_is_no_exception_and_none_is(client: Client) -> None:
    assert list(client.embed([b"text"]).errors) == [0]
    with pytest.raises(ValueError, match="no images"):
        client.embed([])
    with pytest.raises(ServiceError, match="422: .*unknown"):
        client.embed([RED], model="unknown")


def test_asyncio(tmp_path: Path) -> None:
    write_tiny_entry(tmp_path)

    async def scene() -> None:
        app = create_app(Settings(model_repository=tmp_path))
        async with app.router.lifespan_context(app), AsyncClient() as found:
            found._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
            several = await asyncio.gather(*(found.embed([RED, BLUE], t_end=k / 8) for k in range(8)))
            assert [e.vectors[1, 3] for e in several] == [k / 8 for k in range(8)]
            assert (await found.classify([BLUE])).predictions[0][0].label == "blue"
            with pytest.raises(ServiceError, match="t_end"):
                await found.embed([RED], t_end=3)

    asyncio.run(scene())


class Script:
    """A transport that answers as it is told, and a clock that keeps what was waited."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.waited: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        status, headers = step
        return httpx.Response(
            status, headers=headers, json={"data": [], "default": "x"} if status == 200 else {"detail": "no"}
        )


def scripted(monkeypatch: pytest.MonkeyPatch, *steps: Any) -> tuple[Client, Script]:
    script = Script(*steps)

    monkeypatch.setattr("time.sleep", script.waited.append)
    found = Client()
    found._client._blocking = httpx.Client(transport=httpx.MockTransport(script), base_url="http://service")
    return found, script


def test_it_waits_as_long_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = httpx.ConnectError("refused")
    steps = [(503, {"Retry-After": "7"}), (429, {"Retry-After": "9999"}), refusal, (503, {}), (200, {})]
    found, script = scripted(monkeypatch, *steps)
    assert found.models()["default"] == "x"
    assert script.waited == [7, 60, 1, 2]


def test_a_proxy_may_ask_by_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    dates = [format_datetime(datetime.fromtimestamp(1_700_000_000 + s, UTC), usegmt=True) for s in (12, -9)]
    steps = [*((503, {"Retry-After": date}) for date in dates), (503, {"Retry-After": "soon"}), (200, {})]
    found, script = scripted(monkeypatch, *steps)
    found.models()
    assert script.waited == [12, 0, 1]


def test_an_image_larger_than_a_request_may_be_fails_alone() -> None:
    def service(request: httpx.Request) -> httpx.Response:
        if len(request.content) > module.REQUEST_BYTES:
            return httpx.Response(413, json={"detail": "at most 100,000 bytes"})
        facts = {"model": "m", "fingerprint": "f", "dim": 1}
        return httpx.Response(200, json=facts | {"data": [{"index": 0, "embedding": "AACAPw=="}]})

    found = Client()
    found._client._blocking = httpx.Client(transport=httpx.MockTransport(service), base_url="http://service")
    answer = found.embed([RED, bytes(module.REQUEST_BYTES), BLUE])
    assert list(answer.errors) == [1]
    assert "100,000 bytes" in answer.errors[1]
    assert answer.vectors[[0, 2], 0].tolist() == [1, 1]
    with pytest.raises(ServiceError, match="413"):
        found.embed([bytes(module.REQUEST_BYTES)])


def test_a_client_that_nobody_closes_lets_the_program_end() -> None:
    code = "from prg.client import Client; Client('http://127.0.0.1:9')"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "http://[::1", "ftp://a", ""])
def test_an_address_without_a_scheme_is_an_error_at_once(url: str) -> None:
    with pytest.raises(PrgError, match="is no address of a service"):
        Client(url)
    with pytest.raises(PrgError, match="is no address of a service"):
        AsyncClient(url)


def test_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = scripted(monkeypatch, *[(503, {})] * 7)
    with pytest.raises(ServiceError, match="503: no"):
        found.models()
    found, script = scripted(monkeypatch, *[httpx.ConnectError("refused")] * 7)
    with pytest.raises(NoServiceError, match="http://service/models"):
        found.models()
    assert sum(script.waited) < 2


def test_proxies_are_not_for_this_machine(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(client._client._blocking.base_url)
    for name in ("ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    with Client(f" {address} ") as found:
        assert found.models()["default"] == "tiny"
    with pytest.raises(PrgError, match="add elsewhere to NO_PROXY"):
        Client("http://elsewhere")


def test_one_image_in_each_form(client: Client, tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.png", np.full((32, 32, 3), (255, 0, 0), np.uint8)
    path.write_bytes(RED)
    one = client.embed(path).vectors
    assert one.shape == (1, 4)
    for image in (str(path), RED, pixels, Image.fromarray(pixels)):
        assert np.allclose(client.embed(image).vectors, one, atol=1e-5)
    found = client.embed([RED, tmp_path / "missing.png", BLUE])
    assert np.isnan(found.vectors).all(1).tolist() == [False, True, False]
    assert "missing.png" in found.errors[1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500, 504])
def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    found, script = scripted(monkeypatch, (status, {}))
    with pytest.raises(ServiceError, match=str(status)):
        found.models()
    assert script.waited == []


def test_it_needs_no_torch() -> None:
    code = "import sys, prg.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
