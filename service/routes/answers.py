"""What both POST routes share: the items of an answer."""

from collections.abc import Callable
from typing import Any

import orjson
from fastapi import Request, Response

from service.errors import Problem, item_error
from service.gateway import Gateway
from service.inference import Results


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
