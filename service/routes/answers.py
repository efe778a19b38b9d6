"""What the routes share: the gateway, and the items of an answer."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response

from service.errors import NO_USABLE_IMAGE, WRONG_OPTION, Problem, problem_body
from service.gateway import Chosen, Gateway, Results

Facts = dict[str, Any]
Item = Callable[[np.ndarray], dict[str, Any]]
"""Makes the fields of an image's item from its values, [levels, D]."""


def gateway_of(request: Request) -> Gateway:
    """The running service's parts."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def choose_feature(chosen: Chosen, feature: str | None, dimensions: int | None) -> tuple[str, int]:
    """(the feature to answer with, its length). Raises Problem for one that the model lacks, or a wrong length."""
    entry = chosen.entry
    name = feature or entry.prg.feature
    dim = entry.outputs().get(name.upper())
    if dim is None:
        raise Problem(WRONG_OPTION, f"{entry.name} has no {name}; there are: hidden, state")
    if dimensions is None or dimensions == dim:
        return name, dim
    if name != "embedding":
        raise Problem(
            WRONG_OPTION, f"dimensions is {dimensions}, {name} of this model has {dim}; only embedding is cut"
        )
    if not 1 <= dimensions <= dim:
        raise Problem(WRONG_OPTION, f"dimensions is {dimensions}, must be from 1 to {dim}")
    return name, dimensions


def answer(facts: Facts, results: Results, item: Item) -> Response:
    """The answer. Where all images are bad it is a 422 with the same data."""
    if not len(results.values):
        raise failed(facts, results, item)
    return as_json(_body(facts, results, item))


def failed(facts: Facts, results: Results, item: Item) -> Problem:
    """The 422 of a request whose bad images leave it without an answer; it has the data all the same."""
    count, bad = results.count, len(results.errors)
    first = str(results.errors[min(results.errors)])
    detail = first if count == 1 else f"{bad} of {count} images could not be used; the first: {first}"
    return Problem(NO_USABLE_IMAGE, detail, members=_body(facts, results, item))


def encode_vector(vector: np.ndarray, encoding_format: str) -> np.ndarray | str:
    """An embedding as JSON has it: numbers, or base64 of little-endian float32."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector


def as_json(body: dict[str, Any]) -> Response:
    """A body that may hold numpy arrays."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json")


def _body(facts: Facts, results: Results, item: Item) -> dict[str, Any]:
    values = iter(results.values)
    data = [
        {"index": i, "error": problem_body(error, str(error))}
        if (error := results.errors.get(i))
        else {"index": i, **item(next(values))}
        for i in range(results.count)
    ]
    return facts | {"data": data, "usage": {"images": results.count, "failed": len(results.errors)}}
