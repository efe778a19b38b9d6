"""What the OpenAPI page says of each route: options, forms of a body, answers and errors, with an example of each."""

import json
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service.errors import MEDIA_TYPE, Problem, problem
from service.schemas import OpenAIProblem


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


IMAGE = (  # a ship, in 8 x 8 pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAgMAAAC5YVYYAAAADFBMVEXm5uF4qtw8MjwUPG5JBjioAAAAHElEQVR42mMMZWBiYGBi2MDEwMAkuoTx"
    "P4TLAAAiuQLM6GamBAAAAABJRU5ErkJggg=="
)
FACTS = {"model": "prg-cifar10", "model_version": "1", "fingerprint": "f9271d0f313c"}
SHIP = {"label": "ship", "class_id": 8, "probability": 0.917, "logit": 4.375}
PLANE = {"label": "airplane", "class_id": 0, "probability": 0.017, "logit": 0.409}
BROKEN = problem(422, "Not an image", "the bytes are no image, or are broken at the start; accepted: JPEG, PNG, WEBP, "
                 "GIF, BMP, TIFF")  # fmt: skip
NUMBERS = [5.128, -3.499, -86.516, 9.579]
INPUTS = {"type": "array", "minItems": 1, "items": {"anyOf": [
    {"type": "object", "required": [kind], "properties": {kind: {"type": "string"}}, "additionalProperties": False}
    for kind in ("b64", "data_uri", "url")
]}}  # fmt: skip
FILES = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
HEADERS = [
    {"name": "Request-Timeout", "in": "header", "schema": {"type": "number", "exclusiveMinimum": 0},
     "description": "seconds; shortens the deadline"},
    {"name": "Priority", "in": "header", "schema": {"enum": ["interactive", "bulk"], "default": "interactive"},
     "description": "which queue"},
]  # fmt: skip
RETRY_AFTER = {
    "Retry-After": {"schema": {"type": "integer"}, "description": "seconds until it is worth trying again"}
}

ERRORS: dict[int, tuple[str, tuple[tuple[str, str], ...]]] = {
    401: ("no key, or an unknown one", (("Key needed", "send a valid key as `Authorization: Bearer <key>`"),)),
    403: ("the key lacks the scope", (("Scope missing", "the key 'demo' lacks the scope 'infer'"),)),
    404: ("there is no such model", (("Not found", "no model 'other' here; there are: prg-cifar10"),)),
    413: (
        "the request's body is too large",
        (("Body too large", "a request may have 67,108,864 bytes; send fewer images in each"),),
    ),
    415: (
        "the body's content type is not accepted",
        (("Content type not accepted", "'text/plain' is not accepted; send multipart/form-data with `files`, an image "
          "as the body with its image/* type, or JSON"),),
    ),
    422: (
        "no image, too many, a wrong option or header, or no image that could be used",
        (
            ("No image", "the request has no image; send multipart/form-data with `files`"),
            ("Too many images", "a request may have 64 images; send several requests"),
            ("Malformed body", 'the JSON must be an object such as {"inputs": [{"b64": "…"}]}'),
            ("Wrong option", "t_end is '2', must be a number from 0 (noise) to 1 (the image), or up to 8 of them"),
            ("Unknown option", "'topk' in the form is no option here; allowed: model, model_version, t_end"),
            ("Unknown field", "a file came as 'image'; send files as `files`"),
            ("Contradicting options", "t_end is given twice: 0.8 and 0.5"),
            ("Unknown model", "no model 'other' here; there are: prg-cifar10"),
            ("Unknown model version", "prg-cifar10 has no version '7'; there are: 1"),
            ("Wrong header", "Priority is 'high', must be interactive or bulk"),
            ("No classes", "features was exported without a head; /embed works with it"),
        ),
    ),
    429: (
        "the key's own rate limit",
        (("Rate limit", "the key 'demo' may send 60 images a minute; come back in 12 s"),),
    ),
    500: (
        "a bug of the service",
        (("Internal error", "this is a bug of the service; its log has the trace under this X-Request-ID"),),
    ),
    503: (
        "overload or a failing engine",
        (("Service unavailable", "512 images are waiting, at most 512 may"),),
    ),
    504: (
        "not done by the deadline",
        (("Deadline exceeded", "not done within 30 s; send fewer images, or come back when there is less load"),),
    ),
}  # fmt: skip
"""Status -> when, and (title, detail) of each example."""
OF_CLASSIFY = ("No classes",)
"""Titles that only /classify answers."""
_DETAILS = dict(ERRORS[413][1] + ERRORS[422][1])
OPENAI_400 = (
    *((title, _DETAILS[title]) for title in ("Body too large", "Wrong header")),
    ("Malformed body", "model: Field required"),
    ("Wrong option", "dimensions is 3, hidden of this model has 256"),
    ("Too many images", "images x levels = 600, at most 512 fit in this server's queue; send fewer"),
    ("No usable image", f"input[0]: {BROKEN['detail']}"),
)  # fmt: skip
OPENAI_404 = (("Unknown model", _DETAILS["Unknown model"]),)
"""What the OpenAI route answers: some of the errors above, and what is wrong in its own fields."""


def problems(*statuses: int, without: tuple[str, ...] = ()) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that answers these errors as problem+json, but for some titles."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        when, rows = ERRORS[status]
        examples = {
            _slug(title): {"summary": title, "value": problem(status, title, detail)}
            for title, detail in rows
            if title not in without
        }
        if status == 422:
            body = problem(422, "No usable image", BROKEN["detail"]) | FACTS
            body |= {"data": [{"index": 0, "error": BROKEN}], "usage": {"images": 1, "failed": 1}}
            examples["no-usable-image"] = {"summary": "No usable image", "value": body}
        schema = {"$ref": "#/components/schemas/ProblemBody"}
        responses[status] = {
            "description": when,
            "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}},
        }
        if status in (429, 503):
            responses[status]["headers"] = RETRY_AFTER
    return responses


POSTED = (401, 403, 413, 415, 422, 429, 500, 503, 504)
"""What both POST routes may answer."""


def openai_problems() -> dict[int | str, dict[str, Any]]:
    """Errors in OpenAI's shape: 400 for anything wrong in the input, 404 for an unknown model."""
    table = {status: ERRORS[status] for status in (401, 403, 429, 500, 503, 504)}
    table |= {400: ("the input is wrong", OPENAI_400), 404: ("no such model", OPENAI_404)}
    responses: dict[int | str, dict[str, Any]] = {}
    for status, (when, rows) in sorted(table.items()):
        examples = {
            _slug(title): {
                "summary": title,
                "value": json.loads(bytes(Problem(status, title, detail).openai().body)),
            }
            for title, detail in rows
        }
        responses[status] = {
            "description": when,
            "model": OpenAIProblem,
            "content": {"application/json": {"examples": examples}},
        }
        if status in (429, 503):
            responses[status]["headers"] = RETRY_AFTER
    return responses


def answers(examples: dict[str, Any], description: str = "the answer") -> dict[int | str, dict[str, Any]]:
    """The 200 of a route: summary -> body."""
    shown = {_slug(summary): {"summary": summary, "value": value} for summary, value in examples.items()}
    return {200: {"description": description, "content": {"application/json": {"examples": shown}}}}


def _embedded(feature: str, t_end: Any, dim: int, data: list[dict[str, Any]]) -> dict[str, Any]:
    failed = sum("error" in item for item in data)
    facts = FACTS | {"feature": feature, "t_end": t_end, "dim": dim}
    return facts | {"data": data, "usage": {"images": len(data), "failed": failed}}


EMBED_ANSWERS = answers({
    "One image (its numbers cut short)": _embedded("hidden", 0.8, 256, [{"index": 0, "embedding": NUMBERS}]),
    "Two levels": _embedded("state", [0.9, 0.6], 768, [{"index": 0, "embeddings": [
        {"t_end": 0.9, "embedding": [-0.211, -0.315, -0.315]}, {"t_end": 0.6, "embedding": [-0.118, -0.31, -0.311]},
    ]}]),
    "In base64": _embedded("hidden", 0.8, 256, [{"index": 0, "embedding": "XvgUQN1GBEA0+hJADVufQA=="}]),
    "One of two images is broken": _embedded("hidden", 0.8, 256, [
        {"index": 0, "embedding": NUMBERS}, {"index": 1, "error": BROKEN},
    ]),
})  # fmt: skip
EMBED_ANSWERS[200]["content"]["application/x-npy"] = {
    "schema": {"type": "string", "format": "binary", "description": "float32 .npy, [N, D] or [N, levels, D]"}
}
CLASSIFY_ANSWERS = answers({
    "One image": FACTS | {"t_end": 0.8, "data": [{"index": 0, "predictions": [SHIP, PLANE]}],
                          "usage": {"images": 1, "failed": 0}},
    "One of two images is broken": FACTS | {
        "t_end": 0.8, "data": [{"index": 0, "predictions": [SHIP]}, {"index": 1, "error": BROKEN}],
        "usage": {"images": 2, "failed": 1}},
})  # fmt: skip
OPENAI_ANSWERS = answers({
    "One image (its numbers cut short)": {
        "object": "list", "model": "prg-cifar10",
        "data": [{"object": "embedding", "index": 0, "embedding": NUMBERS}],
        "usage": {"prompt_tokens": 0, "total_tokens": 0}},
})  # fmt: skip
MODEL = {
    "name": "prg-cifar10", "state": "ready", "versions": ["1"], "default_version": "1", "image_size": 32,
    "feature": "hidden", "t_end": 0.8,
    "features": {"state": {"dim": 768}, "hidden": {"dim": 256, "layers": ["middle_block"]}},
    "labels": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "classify_t_end": [0.8], "path": "icfm", "solver": "euler", "steps": 1, "nfe": 2,
    "accuracy": [{"data": "cifar10/test", "images": 10000, "top1": 0.9482, "top5": 0.9949}],
}  # fmt: skip
FAILED = {
    "name": "broken",
    "state": "failed",
    "reason": "1/model.pt: its sha256 is not the one in config.pbtxt",
}
METRICS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "metrics", "content": {"text/plain": {
        "schema": {"type": "string"}, "example": "# HELP prg_ready 1 where /health/ready is good\n"
        "# TYPE prg_ready gauge\nprg_ready 1.0\n",
    }}},
}  # fmt: skip
OPENAI_REQUESTS = {
    "one": {"summary": "One image", "value": {"model": "prg-cifar10", "input": IMAGE}},
    "two": {
        "summary": "Two images, base64 answers",
        "value": {"model": "prg-cifar10", "input": [f"data:image/png;base64,{IMAGE}", IMAGE],
                  "encoding_format": "base64", "normalize": True},
    },
}  # fmt: skip


def posted(options: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a POST route: its options in the query, and the three forms of a body; `example` are options."""
    properties = options.model_json_schema()["properties"]
    for schema in properties.values():
        schema.pop("title", None)

    def form(name: str, images: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "required": [name], "properties": {name: images} | properties}

    json_examples = {
        "base64": {"summary": "base64", "value": {"inputs": [{"b64": IMAGE}]}},
        "options": {
            "summary": "a data URI, with options",
            "value": {"inputs": [{"data_uri": f"data:image/png;base64,{IMAGE}"}]} | example,
        },
        "url": {
            "summary": "a URL (where the service allows it) beside another image",
            "value": {"inputs": [{"b64": IMAGE}, {"url": "https://example.com/cat.jpg"}]},
        },
    }
    form_examples = {
        "one": {"summary": "one file", "value": {"files": ["cat.jpg"]}},
        "options": {
            "summary": "two files, with options",
            "value": {"files": ["cat.jpg", "dog.jpg"]} | example,
        },
    }
    raw_example = {"file": {"summary": "the bytes of a file (curl --data-binary @cat.jpg)", "value": "…"}}
    query = [
        {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
        for name, schema in properties.items()
    ]
    return {
        "parameters": query + HEADERS,
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form("files", FILES), "examples": form_examples},
                "application/json": {"schema": form("inputs", INPUTS), "examples": json_examples},
                "image/*": {"schema": {"type": "string", "format": "binary"}, "examples": raw_example},
            },
        },
    }


def install(app: FastAPI) -> None:
    """Say in the application's OpenAPI how a key travels, and nothing of the framework's own 422, which never comes."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            table = plain()
            table["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "only where the service has keys"}
            }
            for operation in (one for path in table["paths"].values() for one in path.values()):
                if "401" in operation["responses"]:
                    operation["security"] = [{}, {"key": []}]
                unseen = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
                if "HTTPValidationError" in str(unseen):
                    del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                table["components"]["schemas"].pop(name, None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
