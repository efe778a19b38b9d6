"""Image URLs: off by default, and no way into the service's own network."""

import asyncio
import base64
import contextlib
import ipaddress
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import quote, unquote

import pytest
from fastapi.testclient import TestClient

from entry.images import ImageError
from service import fetch
from service.fetch import Fetcher, is_public
from tests.service.conftest import Start
from tests.tiny import png

IMAGE = png()


class Site(BaseHTTPRequestHandler):
    """A site on this machine."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.send_response(302)
            location = unquote(self.path.removeprefix("/to/").replace("|", "/"))
            self.send_header("Location", location.encode().decode("latin-1"))
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked for the slow page is gone
            for _ in range(20 if self.path == "/slow" else 0):
                self.wfile.write(b"x")
                time.sleep(0.05)
            self.wfile.write(IMAGE if self.path == "/a.png" else bytes(100_000))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    """Its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Site.asked.clear()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def open_house(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 counts as public here, and nothing else of this machine does."""
    monkeypatch.setattr(fetch, "is_public", lambda a: str(a) == "127.0.0.1" or is_public(a))


def read(url: str, max_bytes: int = 50_000) -> bytes:
    async def scene() -> bytes:
        fetcher = Fetcher(True, max_bytes)
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.close()

    return asyncio.run(scene())


def refused(url: str) -> int:
    with pytest.raises(ImageError) as error:
        read(url)
    return error.value.status


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "198.18.0.1", "192.0.2.1", "2001:db8::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


REFUSED = (
    *("http://127.0.0.1/a.png", "http://localhost/a.png", "http://2130706433/", "http://0x7f.1/"),
    *("http://[::1]/", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]/"),
    *("file:///etc/passwd", "ftp://example.org/a.png", "gopher://127.0.0.1", "//127.0.0.1/", "http://"),
    *("http://user:pass@8.8.8.8/", "http://127.1/", "http://8.8.8.8:99999/", "http://[::1", "http://[bad"),
    *("http://8.8.8.8/a\u0001b", "http://8.8.8.8/\ud800", "http://8.8.8.8/?\x7f", "http://a..example/"),
    *("http://8.8.8.8/" + "a" * 70_000, "http://" + "a" * 64 + ".example/"),
)
"""Private addresses, other schemes, and what is no URL."""


@pytest.mark.parametrize("url", REFUSED, ids=range(len(REFUSED)))
def test_urls_that_are_refused(url: str) -> None:
    assert refused(url) == 403


def test_nothing_is_asked_of_a_private_address(site: int) -> None:
    assert refused(f"http://127.0.0.1:{site}/a.png") == 403
    assert Site.asked == []


@pytest.mark.usefixtures("open_house")
def test_an_image_is_read_and_redirects_are_followed(site: int) -> None:
    assert read(f"http://127.0.0.1:{site}/a.png") == IMAGE
    assert read(f"http://127.0.0.1:{site}/to/|a.png") == IMAGE
    assert Site.asked[0] == (f"127.0.0.1:{site}", "/a.png")


@pytest.mark.usefixtures("open_house")
@pytest.mark.parametrize(
    "place",
    [
        *("http://127.0.0.2:{port}/a.png", "file:///etc/passwd", "http://[bad", "http://8.8.8.8:port/"),
        "http://" + "ä" * 70 + ".example/",
    ],
)
def test_each_redirect_is_judged(site: int, place: str) -> None:
    target = quote(place.format(port=site), safe=":").replace("/", "|")
    assert refused(f"http://127.0.0.1:{site}/to/{target}") in (403, 422)
    assert len(Site.asked) == 1


@pytest.mark.usefixtures("open_house")
def test_what_can_not_be_read(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)  # a site that is slow is not waited for
    base = f"http://127.0.0.1:{site}"
    assert refused(f"{base}/large") == 413
    for url in ("/missing", "/to/|to/|to/|to/|a.png", "/slow"):
        assert refused(base + url) == 422
    for url in ("http://no-such-host.invalid/a.png", "http://127.0.0.1:1/a.png"):
        assert refused(url) == 422


@pytest.mark.usefixtures("open_house")
def test_a_name_is_resolved_once(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address at the second look gains nothing."""
    asked = []

    async def resolve(self: object, host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        return [(0, 0, 0, "", ("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    assert read(f"http://rebinding.example:{site}/a.png") == IMAGE
    assert asked == ["rebinding.example"]
    assert Site.asked == [(f"rebinding.example:{site}", "/a.png")]


def test_urls_are_off_by_default(client: TestClient, site: int) -> None:
    response = client.post("/embed", json={"inputs": [{"url": f"http://127.0.0.1:{site}/a.png"}]})
    assert response.status_code == 422
    [item] = response.json()["data"]
    assert item["error"]["status"] == 403
    assert "PRG_ALLOW_URLS" in item["error"]["detail"]
    assert Site.asked == []


@pytest.mark.usefixtures("open_house")
def test_urls_beside_other_images(start: Start, site: int) -> None:
    client = start(allow_urls=True)
    inputs = [{"url": f"http://127.0.0.1:{site}/{name}"} for name in ("a.png", "missing", "large")]
    inputs += [{"b64": base64.b64encode(IMAGE).decode()}]
    inputs += [{"url": "http://10.0.0.1/"}, {"url": "http://8.8.8.8/a\u0001b"}]
    items = client.post("/embed", json={"inputs": inputs}).json()["data"]
    assert [item.get("error", {}).get("status") for item in items] == [None, 422, 422, None, 403, 403]
    assert items[0]["embedding"] == items[3]["embedding"]


@pytest.mark.usefixtures("open_house")
def test_a_name_in_other_letters_is_asked_for_in_ascii(site: int) -> None:
    assert read(f"http://１２７.0.0.1:{site}/a.png") == IMAGE
    assert Site.asked == [(f"127.0.0.1:{site}", "/a.png")]
