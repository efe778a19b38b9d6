"""What both POST routes share: the items of an answer, and how they are documented."""

from collections.abc import Callable
from typing import Any

import orjson
from fastapi import Request, Response
from pydantic import BaseModel

from service.errors import Problem, item_error
from service.gateway import Gateway
from service.inference import Results

ITEMS = {
    "inputs": {
        "type": "array",
        "items": {"type": "object", "required": ["b64"], "properties": {"b64": {"type": "string"}}},
    }
}
FILES = {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}}


def gateway_of(request: Request) -> Gateway:
    """The running service's parts."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def answer(facts: dict[str, Any], results: Results, item: Callable[[int], dict[str, Any]]) -> Response:
    """The answer: `item` makes the fields of an image from its row. All images bad: a 422 with the same data."""
    if not results.rows:
        raise failed(facts, results, item)
    content = orjson.dumps(_body(facts, results, item), option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json")


def failed(facts: dict[str, Any], results: Results, item: Callable[[int], dict[str, Any]]) -> Problem:
    """The 422 of a request whose bad images leave it without an answer; it has the data all the same."""
    count, bad = len(results.rows) + len(results.errors), len(results.errors)
    first = str(results.errors[min(results.errors)])
    detail = first if count == 1 else f"{bad} of {count} images could not be used; the first: {first}"
    return Problem(422, "No usable image", detail, members=_body(facts, results, item))


def _body(facts: dict[str, Any], results: Results, item: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    count = len(results.rows) + len(results.errors)
    data = [
        {"index": i, "error": item_error(results.errors[i])}
        if i in results.errors
        else {"index": i, **item(results.rows[i])}
        for i in range(count)
    ]
    return facts | {"data": data, "usage": {"images": count, "failed": len(results.errors)}}


def documented(options: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI of a POST route: its options in the query, and the three forms of a body."""
    properties = options.model_json_schema()["properties"]
    for schema in properties.values():
        schema.pop("title", None)

    def form(images: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "required": list(images), "properties": images | properties}

    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
            for name, schema in properties.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form(FILES)},
                "application/json": {"schema": form(ITEMS)},
                "image/*": {"schema": {"type": "string", "format": "binary"}},
            },
        },
    }
