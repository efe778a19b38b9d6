"""Images by URL, for services that allow it: never from the service's own network."""

import asyncio
import ipaddress
import socket
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urljoin, urlsplit

import httpx

from entry.images import ImageError
from service.errors import IMAGE_TOO_LARGE, URL_NOT_READABLE, URL_REFUSED, image_error

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0
"""Of one image, redirects and all."""
AT_ONCE = 16
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is assigned to the internet. What `is_global` says of the rest differs between Pythons."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Fetcher:
    """Reads images from public addresses alone.

    A name is resolved once and the connection made to the very address that was checked, so that an answer
    that changes between the two (DNS rebinding) gains nothing; each redirect is checked like the first URL.
    """

    def __init__(self, allowed: bool, max_bytes: int) -> None:
        self._allowed = allowed
        self._max_bytes = max_bytes
        self._places = asyncio.Semaphore(AT_ONCE)
        self._http = _client() if allowed else None

    async def close(self) -> None:
        """Close the connections."""
        if self._http:
            await self._http.aclose()

    async def fetch(self, url: str) -> bytes:
        """The bytes at a URL. Raises ImageError: 403 for one that is refused, 413, or 422 where it can't be read."""
        if self._http is None:
            detail = "this service reads no URLs (PRG_ALLOW_URLS); send the image itself"
            raise image_error(URL_REFUSED, detail)
        try:
            async with asyncio.timeout(TIMEOUT_S), self._places:
                for _ in range(MAX_REDIRECTS + 1):
                    content, url = await self._hop(self._http, url)
                    if content is not None:
                        return content
        except TimeoutError:
            raise _unreadable(f"it took longer than {TIMEOUT_S:g} s") from None
        except httpx.HTTPError as error:
            raise _unreadable(type(error).__name__) from None
        except ImageError:
            raise
        # urlsplit, urljoin, httpx and the codecs raise these where the text is not a URL.
        except (httpx.InvalidURL, ValueError):
            raise image_error(URL_REFUSED, "the URL is malformed") from None
        raise _unreadable(f"over {MAX_REDIRECTS} redirects")

    async def _hop(self, http: httpx.AsyncClient, url: str) -> tuple[bytes | None, str]:
        """(content, "") or (None, the next URL)."""
        host, port, pinned = await _check(url)
        request = http.build_request(
            "GET",
            pinned,
            headers={"Host": _netloc(host, port), "Accept-Encoding": "identity"},
            extensions={"sni_hostname": host},
        )
        response = await http.send(request, stream=True)
        try:
            if response.is_redirect:
                return None, urljoin(url, response.headers.get("location", ""))
            if response.status_code != 200:
                raise _unreadable(f"it answers {response.status_code}")
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > self._max_bytes:
                    raise image_error(IMAGE_TOO_LARGE, f"at most {self._max_bytes:,} bytes are taken")
            return bytes(content), ""
        finally:
            await response.aclose()


def _client() -> httpx.AsyncClient:
    """A client that carries nothing from one image to the next: no cookie, no connection.

    A connection is known by its address, so another site at that address would be read over it unverified.
    """
    return httpx.AsyncClient(
        # A proxy of the environment would connect to wherever it resolves the name.
        trust_env=False,
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_keepalive_connections=0),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
    )


async def _check(url: str) -> tuple[str, int | None, str]:
    """(host, port if given, the URL with an address in the host's place). Raises ImageError, ValueError for no URL."""
    parts = urlsplit(url)
    host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise image_error(URL_REFUSED, "only http:// and https:// URLs without a user are read")
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
    except OSError:
        raise _unreadable("its host has no address") from None
    addresses = [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]
    if not all(is_public(address) for address in addresses):
        raise image_error(URL_REFUSED, "its host is in a private or reserved network")
    return host, port, parts._replace(netloc=_netloc(str(addresses[0]), port), fragment="").geturl()


def _netloc(host: str, port: int | None) -> str:
    literal = f"[{host}]" if ":" in host else host
    return literal if port is None else f"{literal}:{port}"


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether anybody on the internet could reach it; an IPv4 address inside an IPv6 one is checked itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        # Tunnels end wherever the IPv4 address inside says, and no site of today is behind one.
        if address not in GLOBAL_UNICAST or address.sixtofour or address.teredo:
            return False
    return address.is_global and not address.is_multicast


def _unreadable(reason: str) -> ImageError:
    return image_error(URL_NOT_READABLE, f"the image's URL can't be read: {reason}")
