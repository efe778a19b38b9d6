"""Image URLs: off by default, and no way into the service's own network."""

import asyncio
import base64
import contextlib
import gzip
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
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

    protocol_version = "HTTP/1.1"  # keeps connections open, where its caller does
    asked: ClassVar[list[tuple[str, str]]] = []
    seen: ClassVar[list[tuple[int, str | None]]] = []
    """(port of the connection, cookie) of each request."""

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        self.seen.append((self.client_address[1], self.headers["Cookie"]))
        with contextlib.suppress(OSError):  # who asked for a slow page is gone
            self.answer()

    def answer(self) -> None:
        if self.path.startswith("/to/"):
            location = unquote(self.path.removeprefix("/to/").replace("|", "/"))
            return self.reply(302, b"", Location=location.encode().decode("latin-1"))
        if self.path == "/a.png":
            return self.reply(200, IMAGE, **{"Set-Cookie": "who=first; Path=/"})
        if self.path == "/zipped":
            bomb = gzip.compress(bytes(100 << 20))
            return self.reply(200, bomb, **{"Content-Encoding": "gzip"})
        if self.path == "/headers":
            self.send_response(200)
            for _ in range(2000):
                self.send_header("X-Filler", "x" * 1000)
            return self.end_headers()
        if self.path in ("/slow", "/endless"):
            self.send_response(200)
            self.end_headers()
            for _ in range(20 if self.path == "/slow" else 1000):
                self.wfile.write(b"x" if self.path == "/slow" else bytes(10_000))
                time.sleep(0.05 if self.path == "/slow" else 0)
            self.close_connection = True
            return None
        if self.path == "/lies":
            return self.reply(200, IMAGE, length=10_000_000)
        return self.reply(404 if self.path == "/missing" else 200, bytes(100_000))

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    """Its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Site.asked.clear()
    Site.seen.clear()
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
        # Kinds of IPv6 that carry an IPv4 address, are of one site, or are not assigned.
        *("::127.0.0.1", "::8.8.8.8", "64:ff9b:1::a00:1", "::ffff:0:10.0.0.1", "2002:a00:1::"),
        "2002:808:808::",
        *("2001:0:4136:e378:8000:63bf:f5ff:fffe", "fec0::1", "fe80::1%lo", "4000::1", "100::1"),
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
    # An address in other clothes: octal, hexadecimal, short, in other scripts, in IPv6.
    *(
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://0x7f000001/",
        "http://0/",
        "http://127。0。0。1/",
    ),
    *("http://①②⑦.0.0.1/", "http://[::127.0.0.1]/", "http://[64:ff9b::127.0.0.1]/"),
    "http://[2002:7f00:1::]/",
    # What one parser takes for the host, and another for a user, a path or a fragment.
    *("http://8.8.8.8@127.0.0.1/", "http://127.0.0.1#@8.8.8.8/", "http://127.0.0.1?@8.8.8.8/"),
    "http://@8.8.8.8/",
    *("http://8.8.8.8\\@127.0.0.1/", "http:127.0.0.1/", "http:///127.0.0.1/", "http://8.8.8.8:80:80/"),
    *("http://127.0.0\t.1/", " http://127.0.0.1/", "HTTP+UNIX://%2Frun/", "jar:http://8.8.8.8!/"),
    "\\\\host\\a",
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
        *("http://" + "ä" * 70 + ".example/", "http://2130706434/", "http://[::ffff:127.0.0.2]/"),
        "//127.0.0.2:{port}/",
        *("ftp://127.0.0.1/", "data:image/png;base64,AAAA", "http://user@127.0.0.1:{port}/a.png"),
    ],
)
def test_each_redirect_is_judged(site: int, place: str) -> None:
    target = quote(place.format(port=site), safe=":").replace("/", "|")
    assert refused(f"http://127.0.0.1:{site}/to/{target}") in (403, 422)
    assert len(Site.asked) == 1


UNREADABLE = {
    "/large": 413,
    "/endless": 413,
    "/missing": 422,
    "/slow": 422,
    "/lies": 422,
    "/headers": 422,
    "/to/|to/|to/|to/|a.png": 422,
    # To itself.
    "/to/": 422,
}


@pytest.mark.usefixtures("open_house")
@pytest.mark.parametrize(("path", "status"), UNREADABLE.items())
def test_what_can_not_be_read(site: int, monkeypatch: pytest.MonkeyPatch, path: str, status: int) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)  # a site that is slow is not waited for
    assert refused(f"http://127.0.0.1:{site}{path}") == status


@pytest.mark.usefixtures("open_house")
@pytest.mark.parametrize(
    "url",
    [
        *("http://no-such-host.invalid/a.png", "http://127.0.0.1:1/a.png", "http://127.0.0.2\\.8.8.8.8/"),
        *("http://%31%32%37.0.0.2/", "http://[fe80::1%25lo]/", "http://127.0.0.2./"),
        "http://no-such-host.invalid./",
    ],
)
def test_a_host_that_is_not_there(url: str) -> None:
    """What only some resolvers take for an address is refused there."""
    assert refused(url) in (403, 422)


@pytest.mark.usefixtures("open_house")
def test_what_a_site_compresses_is_not_inflated(site: int) -> None:
    """100 MB of zeros are the 100 kB that came."""
    content = read(f"http://127.0.0.1:{site}/zipped", max_bytes=200_000)
    assert content.startswith(b"\x1f\x8b")
    assert len(content) < 200_000


@pytest.mark.usefixtures("open_house")
def test_one_image_leaves_nothing_for_the_next(site: int) -> None:
    """Neither a cookie nor a connection, which would be another site's at the same address."""

    async def scene() -> None:
        fetcher = Fetcher(True, 50_000)
        for _ in range(2):
            await fetcher.fetch(f"http://127.0.0.1:{site}/a.png")
        await fetcher.close()

    asyncio.run(scene())
    (first, _), (second, cookie) = Site.seen
    assert first != second
    assert cookie is None


Resolver = Callable[[list[list[str]]], list[str]]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Let names resolve to these addresses, at each question to the next of them; returns the names asked for."""

    def install(answers: list[list[str]]) -> list[str]:
        asked: list[str] = []

        async def resolve(self: object, host: str, port: int, **_: object) -> list[object]:
            asked.append(host)
            return [(0, 0, 0, "", (address, port)) for address in answers[len(asked) - 1]]

        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
        return asked

    return install


@pytest.mark.usefixtures("open_house")
def test_a_name_is_resolved_once(site: int, resolver: Resolver) -> None:
    """A name that means another address at the second look gains nothing."""
    asked = resolver([["127.0.0.1"], ["10.0.0.1"]])
    assert read(f"http://rebinding.example:{site}/a.png") == IMAGE
    assert asked == ["rebinding.example"]
    assert Site.asked == [(f"rebinding.example:{site}", "/a.png")]


@pytest.mark.usefixtures("open_house")
def test_a_name_is_checked_again_after_a_redirect_to_itself(site: int, resolver: Resolver) -> None:
    asked = resolver([["127.0.0.1"], ["10.0.0.1"]])
    assert refused(f"http://rebinding.example:{site}/to/|a.png") == 403
    assert asked == ["rebinding.example"] * 2
    assert len(Site.asked) == 1


@pytest.mark.usefixtures("open_house")
@pytest.mark.parametrize(
    "addresses",
    [
        *(["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "::1"]),
        ["127.0.0.1", "fe80::1%lo"],
        *(["::ffff:169.254.169.254"], ["64:ff9b::a9fe:a9fe"], ["2002:a9fe:a9fe::"], ["0.0.0.0"], ["::"]),
    ],
    ids=str,
)
def test_one_private_address_of_a_name_is_enough(site: int, resolver: Resolver, addresses: list[str]) -> None:
    resolver([addresses])
    assert refused(f"http://two-faced.example:{site}/a.png") == 403
    assert Site.asked == []


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
