"""The three forms of a request, multipart, raw and JSON, to images and options."""

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from service import errors
from service.errors import Problem, image_error
from service.multipart import MultipartError, TooManyPartsError, parse_multipart
from service.schemas import Options
from service.settings import Settings

T = TypeVar("T")
Kind = TypeVar("Kind", bound=Options)


@dataclass(frozen=True)
class Remote:
    """An image that is still to be fetched."""

    url: str


Item = partial[bytes] | Remote
"""Gives an image's bytes, out of its only or first argument; raises ImageError. Or says where they are."""
FORMS = (
    "send multipart/form-data with `files` (curl -F files=@photo.jpg), an image as the body with its "
    'image/* type, or JSON {"inputs": [{"b64": "…"}]}'
)

SMALL_BODY = 32 << 10
MOST_FIELDS = 100
"""Fields of a form beside its files."""


@dataclass(frozen=True)
class Given:
    """Options from one place of the request, with whether they are text or already of JSON's types."""

    pairs: list[tuple[str, Any]]
    text: bool
    place: str


async def read_request(request: Request, options: type[Kind], settings: Settings) -> tuple[list[Item], Kind]:
    """Images and options of a POST.

    Raises Problem: 415 for another content type, 422 for a body that does not parse, no image, too many, or
    an option that can't be used.
    """
    query = Given(list(request.query_params.multi_items()), True, "the query")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        content_type = request.headers["content-type"]
        items, given = await _aside(_parse_form, await request.body(), content_type, settings.max_images)
        return items, parse_options(options, [query, given])
    if kind == "application/json":
        items, given = await _aside(_parse_json, await request.body(), settings)
        return items, parse_options(options, [query, given])
    if kind.startswith("image/"):
        body = await request.body()
        return [partial(bytes, body)], parse_options(options, [query])
    if not kind and not await request.body():
        raise _no_image()
    reason = f"{kind[:80]!r} is not accepted" if kind else "the body has no Content-Type"
    raise Problem(errors.CONTENT_TYPE_NOT_ACCEPTED, f"{reason}; {FORMS}")


async def _aside(parse: Callable[..., T], body: bytes, *more: object) -> T:
    """Parsed in a thread, but for a body so small that the way there and back takes longer."""
    return parse(body, *more) if len(body) <= SMALL_BODY else await run_in_threadpool(parse, body, *more)


def parse_options(kind: type[Kind], given: Iterable[Given]) -> Kind:
    """Options of all places as one. Raises Problem for an unknown one, a wrong value, or two that differ."""
    values: dict[str, Any] = {}
    for source in given:
        grouped: dict[str, list[Any]] = {}
        for name, value in source.pairs:
            if name not in kind.model_fields:
                allowed = ", ".join(kind.model_fields)
                unknown = f"{name[:80]!r} in {source.place} is no option here"
                raise Problem(errors.UNKNOWN_OPTION, f"{unknown}; allowed: {allowed}")
            grouped.setdefault(name, []).append(value)
        for name, found in grouped.items():
            repeated = name in kind.lists and len(found) > 1
            for value in [found] if repeated else found:
                parsed = _parse(kind, name, value, source.text)
                if name in values and values[name] != parsed:
                    twice = f"{name} is given twice: {values[name]!r} and {parsed!r}"
                    raise Problem(errors.CONTRADICTING_OPTIONS, twice)
                values[name] = parsed
    return kind.model_validate(values)


def _parse(kind: type[Kind], name: str, value: object, text: bool) -> object:
    """One option of one place. Text is read leniently ("1" is a number and true), JSON by its own types."""
    try:
        return getattr(kind.model_validate({name: value}, strict=not text), name)
    except ValidationError:
        must = kind.model_fields[name].description
        found = repr(value)
        if len(found) > 60:
            found = found[:60] + "…"
        raise Problem(errors.WRONG_OPTION, f"{name} is {found}, must be {must}") from None


def _parse_form(body: bytes, content_type: str, max_images: int) -> tuple[list[Item], Given]:
    try:
        parts = [(part.name, part) for part in parse_multipart(body, content_type, max_images + MOST_FIELDS)]
    except TooManyPartsError:
        raise _too_many(max_images) from None
    except MultipartError as error:
        raise Problem(errors.MALFORMED_BODY, f"the multipart body does not parse: {error}") from None
    items: list[Item] = []
    pairs: list[tuple[str, Any]] = []
    for name, part in parts:
        if name == "files" and not part.is_text:
            items.append(partial(bytes, part.content))
        elif name == "files":
            raise Problem(errors.NO_IMAGE, "`files` came as text; send files (curl -F files=@photo.jpg)")
        elif b"filename" in part.options:
            raise Problem(errors.UNKNOWN_FIELD, f"a file came as {name[:80]!r}; send files as `files`")
        else:
            pairs.append((name, _text(name, part.content)))
    _check_count(items, max_images)
    return items, Given(pairs, True, "the form")


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Problem(errors.MALFORMED_BODY, f"the field {name[:80]!r} is no text in UTF-8") from None


def _parse_json(body: bytes, settings: Settings) -> tuple[list[Item], Given]:
    try:
        table = json.loads(body, object_pairs_hook=_no_contradiction, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(errors.MALFORMED_BODY, f"the JSON does not parse: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get("inputs"), list):
        raise Problem(errors.MALFORMED_BODY, 'the JSON must be an object such as {"inputs": [{"b64": "…"}]}')
    inputs = enumerate(table.pop("inputs"))
    items = [_item(entry, f"inputs[{index}]", settings.max_image_bytes) for index, entry in inputs]
    _check_count(items, settings.max_images)
    # A null is an option left out, as in most clients' serialisation.
    return items, Given([(k, v) for k, v in table.items() if v is not None], False, "the JSON")


def _no_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys do not contradict each other; JSON itself would take the last."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table and table[key] != value:
            twice = f"{key[:80]!r} is in the JSON twice, with different values"
            raise Problem(errors.CONTRADICTING_OPTIONS, twice)
        table[key] = value
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _item(entry: object, where: str, max_bytes: int) -> Item:
    """One element of `inputs`. Raises Problem where it has another form."""
    match entry:
        case {"b64": str(text), **more} if not more:
            return partial(read_base64, text, max_bytes)
        case {"data_uri": str(text), **more} if not more:
            return partial(read_data_uri, text, max_bytes)
        case {"url": str(url), **more} if not more:
            return Remote(url)
    forms = '{"b64": "…"}, {"data_uri": "data:image/…"} or {"url": "…"}'
    raise Problem(errors.MALFORMED_BODY, f"{where} must be {forms}")


def read_base64(text: str, max_bytes: int) -> bytes:
    """An image as base64 text, with or without line breaks and padding. Raises ImageError."""
    if text[:5].lower() == "data:":
        raise image_error(errors.NOT_BASE64, 'this is a data URI; send it as {"data_uri": "data:image/…"}')
    # Known to be too large before it is decoded; line breaks may be up to half of it.
    if len(text) * 3 // 4 > 2 * max_bytes:
        raise image_error(errors.IMAGE_TOO_LARGE, f"at most {max_bytes:,} bytes are taken")
    compact = "".join(text.split())
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError:
        raise image_error(errors.NOT_BASE64, "the image is not valid base64 (RFC 4648, section 4)") from None


def read_data_uri(text: str, max_bytes: int) -> bytes:
    """An image as a data URI (RFC 2397) in base64. Raises ImageError."""
    head, found, body = text.partition(",")
    kind, *parameters = head[5:].lower().split(";")
    if not head[:5].lower() == "data:" or not found or "base64" not in parameters:
        raise image_error(errors.NOT_A_DATA_URI, "a data URI must be data:image/…;base64,…")
    if not kind.startswith("image/"):
        raise image_error(errors.IMAGE_FORMAT_NOT_ACCEPTED, f"the data URI says {kind[:60]!r}, not an image")
    return read_base64(unquote(body), max_bytes)


def _check_count(items: list[Item], max_images: int) -> None:
    if not items:
        raise _no_image()
    if len(items) > max_images:
        raise _too_many(max_images)


def _no_image() -> Problem:
    return Problem(errors.NO_IMAGE, f"the request has no image; {FORMS}")


def _too_many(max_images: int) -> Problem:
    return Problem(errors.TOO_MANY_IMAGES, f"a request may have {max_images} images; send several requests")
