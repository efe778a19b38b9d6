"""multipart/form-data (RFC 7578) of a body that lies in memory: all its parts, or an error, never some of them."""

from dataclasses import dataclass, field
from functools import cached_property

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header


class MultipartError(ValueError):
    """The body is no whole multipart/form-data; the message says in what way."""


class TooManyPartsError(MultipartError):
    """More parts than asked for."""


@dataclass
class Part:
    """One part."""

    headers: dict[str, bytes] = field(default_factory=dict)
    """By their names in lower case."""
    pieces: list[bytes] = field(default_factory=list)

    @cached_property
    def content(self) -> bytes:
        return b"".join(self.pieces)

    @cached_property
    def options(self) -> dict[bytes, bytes]:
        """Parameters of its Content-Disposition."""
        return parse_options_header(self.headers.get("content-disposition", b""))[1]

    @property
    def name(self) -> str:
        """Raises MultipartError where it has none."""
        try:
            return self.options[b"name"].decode()
        except (KeyError, UnicodeDecodeError):
            raise MultipartError("a part has no name of UTF-8 in its Content-Disposition") from None

    @property
    def is_text(self) -> bool:
        """Whether it has neither a file's name nor a type nor bytes that are no ASCII: a field of a form."""
        named = any(option.startswith(b"filename") for option in self.options)
        return not named and "content-type" not in self.headers and self.content.isascii()


def parse_multipart(body: bytes, content_type: str, most: int) -> list[Part]:
    """The parts of `body`. Raises MultipartError, also where it ends before its closing delimiter."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise MultipartError("its Content-Type names no boundary")
    parts: list[Part] = []
    header = [b"", b""]
    ended = False

    def begin() -> None:
        if len(parts) == most:
            raise TooManyPartsError(f"more than {most} parts")
        parts.append(Part())

    def extend(place: int, data: bytes, start: int, end: int) -> None:
        header[place] += data[start:end]

    def finish_header() -> None:
        parts[-1].headers[header[0].decode("latin-1").lower()] = header[1]
        header[:] = b"", b""

    def end() -> None:
        nonlocal ended
        ended = True

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin,
            "on_part_data": lambda data, start, end: parts[-1].pieces.append(data[start:end]),
            "on_header_field": lambda *piece: extend(0, *piece),
            "on_header_value": lambda *piece: extend(1, *piece),
            "on_header_end": finish_header,
            "on_end": end,
        },
    )
    try:
        parser.write(body)
    except FormParserError as error:
        raise MultipartError(str(error)) from None
    if not ended:
        raise MultipartError("it ends before its closing delimiter, so some of it is missing")
    return parts
