"""Headers that every answer has, so that a browser makes nothing of it but what it is."""

from collections.abc import Iterable

Header = tuple[bytes, bytes]
SECURITY: tuple[Header, ...] = (
    # An answer is data: it loads nothing, runs nothing and stands in no frame. A page has a policy of its own.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    # No other site's page takes it as an image or script; by CORS it may, where that is set.
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


def secured(headers: Iterable[Header]) -> list[Header]:
    """The headers of an answer, and those of SECURITY that it does not set itself."""
    given = list(headers)
    names = {name for name, _ in given}
    return given + [header for header in SECURITY if header[0] not in names]
