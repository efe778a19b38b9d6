"""The three forms of a request, multipart, raw and JSON, to images and options."""

import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import unquote

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from entry.images import ImageError, Limits
from service.errors import Problem
from service.schemas import Options
from service.settings import Settings

Kind = TypeVar("Kind", bound=Options)


@dataclass(frozen=True)
class Remote:
    """An image that is still to be fetched."""

    url: str


Item = Callable[[], bytes] | Remote
"""Gives an image's bytes, in the decoding pool; raises ImageError. Or says where they are."""
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


@dataclass(frozen=True)
class Intake:
    """One request, read but not judged."""

    items: list[Item]
    options: list[Given] = field(default_factory=list)


@asynccontextmanager
async def read_request(request: Request, settings: Settings) -> AsyncIterator[Intake]:
    """Images and options of a POST. Uploaded files stay readable as long as the context lasts.

    Raises Problem: 415 for another content type, 422 for a body that does not parse, no image or too many.
    """
    query = Given(list(request.query_params.multi_items()), True, "the query")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limits = settings.image_limits
    if kind == "multipart/form-data":
        async with _form(request, settings.max_images) as (items, given):
            _check_count(items, settings.max_images)
            yield Intake(items, [query, given])
    elif kind == "application/json":
        items, given = await run_in_threadpool(_parse_json, await request.body(), limits)
        _check_count(items, settings.max_images)
        yield Intake(items, [query, given])
    elif kind.startswith("image/"):
        body = await request.body()
        yield Intake([lambda: body], [query])
    elif not kind and not await request.body():
        raise _no_image()
    else:
        shown = f"{kind[:80]!r} is not accepted" if kind else "the body has no Content-Type"
        raise Problem(415, "Content type not accepted", f"{shown}; {FORMS}")


def parse_options(kind: type[Kind], given: Iterable[Given]) -> Kind:
    """Options of all places as one. Raises Problem for an unknown one, a wrong value, or two that differ."""
    values: dict[str, Any] = {}
    for source in given:
        grouped: dict[str, list[Any]] = {}
        for name, value in source.pairs:
            if name not in kind.model_fields:
                allowed = ", ".join(kind.model_fields)
                raise Problem(
                    422,
                    "Unknown option",
                    f"{name[:80]!r} in {source.place} is no option here; allowed: {allowed}",
                )
            grouped.setdefault(name, []).append(value)
        for name, found in grouped.items():
            repeated = name in kind.lists and len(found) > 1
            for value in [found] if repeated else found:
                parsed = _parse(kind, name, value, source.text)
                if name in values and values[name] != parsed:
                    raise Problem(
                        422,
                        "Contradicting options",
                        f"{name} is given twice: {values[name]!r} and {parsed!r}",
                    )
                values[name] = parsed
    return kind.model_validate(values)


def _parse(kind: type[Kind], name: str, value: object, text: bool) -> object:
    """One option of one place. Text is read leniently ("1" is a number and true), JSON by its own types."""
    try:
        return getattr(kind.model_validate({name: value}, strict=not text), name)
    except ValidationError:
        must = kind.model_fields[name].description
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "…"
        raise Problem(422, "Wrong option", f"{name} is {shown}, must be {must}") from None


@asynccontextmanager
async def _form(request: Request, max_images: int) -> AsyncIterator[tuple[list[Item], Given]]:
    try:
        form = await request.form(max_files=max_images, max_fields=100)
    except HTTPException as error:
        if "Too many files" in error.detail:
            raise _too_many(max_images) from None
        raise Problem(422, "Malformed body", f"the multipart body does not parse: {error.detail}") from None
    except (UnicodeError, LookupError) as error:
        raise Problem(422, "Malformed body", f"the multipart body has a strange charset: {error}") from None
    try:
        items: list[Item] = []
        pairs: list[tuple[str, Any]] = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name == "files":
                items.append(value.file.read)
            elif isinstance(value, UploadFile):
                raise Problem(422, "Unknown field", f"a file came as {name[:80]!r}; send files as `files`")
            elif name == "files":
                raise Problem(422, "No image", "`files` came as text; send files (curl -F files=@photo.jpg)")
            else:
                pairs.append((name, value))
        yield items, Given(pairs, True, "the form")
    finally:
        await form.close()


def _parse_json(body: bytes, limits: Limits) -> tuple[list[Item], Given]:
    try:
        table = json.loads(body, object_pairs_hook=_no_contradiction, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(422, "Malformed body", f"the JSON does not parse: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get("inputs"), list):
        raise Problem(422, "Malformed body", 'the JSON must be an object such as {"inputs": [{"b64": "…"}]}')
    items: list[Item] = []
    for index, entry in enumerate(table.pop("inputs")):
        items.append(_item(entry, f"inputs[{index}]", limits))
    # A null is an option left out, as in most clients' serialisation.
    return items, Given([(k, v) for k, v in table.items() if v is not None], False, "the JSON")


def _no_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys do not contradict each other; JSON itself would take the last."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table and table[key] != value:
            raise Problem(
                422, "Contradicting options", f"{key[:80]!r} is in the JSON twice, with different values"
            )
        table[key] = value
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _item(entry: object, where: str, limits: Limits) -> Item:
    """One element of `inputs`. Raises Problem where it has another form."""
    if isinstance(entry, dict) and len(entry) == 1:
        [(kind, value)] = entry.items()
        if isinstance(value, str):
            if kind == "b64":
                return Base64(value, limits.max_bytes)
            if kind == "data_uri":
                return DataUri(value, limits.max_bytes)
            if kind == "url":
                return Remote(value)
    raise Problem(
        422,
        "Malformed body",
        f'{where} must be {{"b64": "…"}}, {{"data_uri": "data:image/…"}} or {{"url": "…"}}',
    )


@dataclass(frozen=True)
class Base64:
    """An image as base64 text, with or without line breaks and padding."""

    text: str
    max_bytes: int

    def __call__(self) -> bytes:
        if len(self.text) * 3 // 4 > 2 * self.max_bytes:  # known too large before it is decoded
            raise ImageError(413, "Image too large", f"at most {self.max_bytes:,} bytes are taken")
        compact = "".join(self.text.split())
        try:
            return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ImageError(
                422, "Not base64", "the image is not valid base64 (RFC 4648, section 4)"
            ) from None


@dataclass(frozen=True)
class DataUri:
    """An image as a data URI (RFC 2397) in base64."""

    text: str
    max_bytes: int

    def __call__(self) -> bytes:
        head, found, body = self.text.partition(",")
        kind, *parameters = head[5:].lower().split(";")
        if not head[:5].lower() == "data:" or not found or "base64" not in parameters:
            raise ImageError(422, "Not a data URI", "a data URI must be data:image/…;base64,…")
        if not kind.startswith("image/"):
            raise ImageError(
                415, "Image format not accepted", f"the data URI says {kind[:60]!r}, not an image"
            )
        return Base64(unquote(body), self.max_bytes)()


def _check_count(items: list[Item], max_images: int) -> None:
    if not items:
        raise _no_image()
    if len(items) > max_images:
        raise _too_many(max_images)


def _no_image() -> Problem:
    return Problem(422, "No image", f"the request has no image; {FORMS}")


def _too_many(max_images: int) -> Problem:
    return Problem(422, "Too many images", f"a request may have {max_images} images; send several requests")
