"""The three forms of a request, multipart, raw and JSON, to images and options."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from service import errors
from service.errors import Problem, image_error
from service.schemas import Options
from service.settings import Settings

Kind = TypeVar("Kind", bound=Options)


@dataclass(frozen=True)
class Remote:
    """An image that is still to be fetched."""

    url: str


Item = Callable[[], bytes] | Remote
"""Gives an image's bytes, in a decoding thread; raises ImageError. Or says where they are."""
FORMS = (
    "send multipart/form-data with `files` (curl -F files=@photo.jpg), an image as the body with its "
    'image/* type, or JSON {"inputs": [{"b64": "…"}]}'
)


@dataclass(frozen=True)
class Given:
    """Options from one place of the request, with whether they are text or already of JSON's types."""

    pairs: list[tuple[str, Any]]
    text: bool
    place: str


@asynccontextmanager
async def read_request(
    request: Request, options: type[Kind], settings: Settings
) -> AsyncIterator[tuple[list[Item], Kind]]:
    """Images and options of a POST. Uploaded files stay readable as long as the context lasts.

    Raises Problem: 415 for another content type, 422 for a body that does not parse, no image, too many, or
    an option that can't be used.
    """
    query = Given(list(request.query_params.multi_items()), True, "the query")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with _form(request, settings.max_images) as (items, given):
            yield items, parse_options(options, [query, given])
    elif kind == "application/json":
        items, given = await run_in_threadpool(_parse_json, await request.body(), settings)
        yield items, parse_options(options, [query, given])
    elif kind.startswith("image/"):
        body = await request.body()
        yield [lambda: body], parse_options(options, [query])
    elif not kind and not await request.body():
        raise _no_image()
    else:
        reason = f"{kind[:80]!r} is not accepted" if kind else "the body has no Content-Type"
        raise Problem(errors.CONTENT_TYPE_NOT_ACCEPTED, f"{reason}; {FORMS}")


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


@asynccontextmanager
async def _form(request: Request, max_images: int) -> AsyncIterator[tuple[list[Item], Given]]:
    try:
        form = await request.form(max_files=max_images, max_fields=100)
    except HTTPException as error:
        if "Too many files" in error.detail:
            raise _too_many(max_images) from None
        raise Problem(errors.MALFORMED_BODY, f"the multipart body does not parse: {error.detail}") from None
    except (UnicodeError, LookupError) as error:
        raise Problem(errors.MALFORMED_BODY, f"the multipart body has a strange charset: {error}") from None
    try:
        items: list[Item] = []
        pairs: list[tuple[str, Any]] = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name == "files":
                items.append(value.file.read)
            elif isinstance(value, UploadFile):
                raise Problem(errors.UNKNOWN_FIELD, f"a file came as {name[:80]!r}; send files as `files`")
            elif name == "files":
                raise Problem(errors.NO_IMAGE, "`files` came as text; send files (curl -F files=@photo.jpg)")
            else:
                pairs.append((name, value))
        _check_count(items, max_images)
        yield items, Given(pairs, True, "the form")
    finally:
        await form.close()


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
