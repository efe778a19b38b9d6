"""Problems (RFC 9457): every error that this service answers with, one row each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from entry.images import ImageError

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class ProblemType:
    """A kind of error, of a whole request or of one of its images. `when` says when it is sent."""

    title: str
    status: int
    when: str
    of: Literal["request", "image"] = "request"


BAD_REQUEST = ProblemType("Bad request", 400, "the request cannot be understood")
KEY_NEEDED = ProblemType("Key needed", 401, "the request has no key, or an unknown one")
SCOPE_MISSING = ProblemType("Scope missing", 403, "the key lacks the scope that this route needs")
NOT_FOUND = ProblemType("Not found", 404, "there is no such path, or no such model at /models/{name}")
METHOD_NOT_ALLOWED = ProblemType("Method not allowed", 405, "the path does not take this method")
REQUEST_TIMEOUT = ProblemType("Request timeout", 408, "the head of the request arrives too slowly")
BODY_TOO_LARGE = ProblemType("Body too large", 413, "the body of the request is too large")
CONTENT_TYPE_NOT_ACCEPTED = ProblemType("Content type not accepted", 415, "the Content-Type is not accepted")
CONTENT_ENCODING_NOT_ACCEPTED = ProblemType(
    "Content encoding not accepted", 415, "the body is compressed: it has a Content-Encoding"
)
NO_IMAGE = ProblemType("No image", 422, "the request has no image")
TOO_MANY_IMAGES = ProblemType(
    "Too many images", 422, "more images than a request, the queue or the key allows"
)
MALFORMED_BODY = ProblemType("Malformed body", 422, "the body does not parse, or its structure is wrong")
UNKNOWN_FIELD = ProblemType("Unknown field", 422, "a file was not sent as `files`")
UNKNOWN_OPTION = ProblemType("Unknown option", 422, "the route has no option of that name")
WRONG_OPTION = ProblemType("Wrong option", 422, "an option has a value that is not allowed")
CONTRADICTING_OPTIONS = ProblemType("Contradicting options", 422, "an option has two values")
WRONG_HEADER = ProblemType("Wrong header", 422, "Request-Timeout or Priority has a value that is not allowed")
UNKNOWN_MODEL = ProblemType("Unknown model", 422, "there is no model of that name")
UNKNOWN_MODEL_VERSION = ProblemType("Unknown model version", 422, "the model has no such version")
NO_CLASSES = ProblemType("No classes", 422, "the model has no classifier; /embed works with it")
NO_USABLE_IMAGE = ProblemType(
    "No usable image", 422, "no image (for .npy and /v1: not every image) can be used"
)
HEAD_TOO_LARGE = ProblemType("Head too large", 431, "the request's headers are too large")
RATE_LIMIT = ProblemType("Rate limit", 429, "the key has used up its images a minute; see Retry-After")
INTERNAL_ERROR = ProblemType(
    "Internal error", 500, "this is a bug of the service; its log has the trace under this X-Request-ID"
)
SERVICE_UNAVAILABLE = ProblemType(
    "Service unavailable", 503, "the load is too high, or the model fails; see Retry-After"
)
DEADLINE_EXCEEDED = ProblemType("Deadline exceeded", 504, "the answer was not ready by the deadline")

URL_REFUSED = ProblemType("URL refused", 403, "the URL is malformed or private, or URLs are off", "image")
IMAGE_TOO_LARGE = ProblemType("Image too large", 413, "the image has too many bytes or pixels", "image")
IMAGE_FORMAT_NOT_ACCEPTED = ProblemType(
    "Image format not accepted",
    415,
    "the format is known, but not accepted, such as SVG or a video",
    "image",
)
EMPTY_IMAGE = ProblemType("Empty image", 422, "the image has 0 bytes", "image")
NOT_AN_IMAGE = ProblemType("Not an image", 422, "the bytes are not an image", "image")
IMAGE_NOT_DECODABLE = ProblemType(
    "Image not decodable", 422, "the image is broken, truncated, or of a kind that is not read", "image"
)
IMAGE_NOT_USABLE = ProblemType(
    "Image not usable",
    422,
    "what the numbers of the pixels mean is not declared, or they are outside of it",
    "image",
)
NOT_BASE64 = ProblemType("Not base64", 422, "the image is not valid base64", "image")
NOT_A_DATA_URI = ProblemType("Not a data URI", 422, "the text is not a data URI in base64", "image")
URL_NOT_READABLE = ProblemType("URL not readable", 422, "the image's URL cannot be read", "image")

PROBLEMS = tuple(row for row in vars().values() if isinstance(row, ProblemType))
"""Every row above. docs/api.md shows them as `markdown_table` writes them."""


@dataclass(eq=False)
class Problem(Exception):
    """An error as it is answered: its type, and what happened in this request."""

    kind: ProblemType
    detail: str
    headers: Mapping[str, str] | None = None
    members: Mapping[str, Any] = field(default_factory=dict)
    """More members of the body, beside the four."""

    def response(self, path: str) -> Response:
        """The answer of the route at that path: problem+json, under /v1 the shape of OpenAI's errors."""
        status, media_type, body = rendered(self.kind, self.detail, openai=path.startswith("/v1/"))
        content = orjson.dumps(body | dict(self.members), option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, status, headers=self.headers, media_type=media_type)


def problem_body(kind: ProblemType | ImageError, detail: str) -> dict[str, Any]:
    """The four members that every problem has; an image's error has the same."""
    urn = f"urn:prg:problem:{kind.title.lower().replace(' ', '-')}"
    return {"type": urn, "title": kind.title, "status": kind.status, "detail": detail}


def rendered(kind: ProblemType, detail: str, openai: bool) -> tuple[int, str, dict[str, Any]]:
    """(status, media type, body) of an error as a problem, or as OpenAI's clients know it.

    OpenAI's shape has one status for anything wrong in the input, 400, and 404 for an unknown model.
    """
    if not openai:
        return kind.status, MEDIA_TYPE, problem_body(kind, detail)
    status = 400 if kind.status in (413, 415, 422) else kind.status
    code = kind.title.lower().replace(" ", "_")
    if kind is UNKNOWN_MODEL:
        status, code = 404, "model_not_found"
    error_type = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": detail, "type": error_type, "param": None, "code": code}}
    return status, "application/json", body


def image_error(kind: ProblemType, detail: str) -> ImageError:
    """An error of one image; the others are answered."""
    return ImageError(kind.status, kind.title, detail)


def unavailable(detail: str, retry_after_s: int) -> Problem:
    """503 for load or a failing engine, with when to come back.

    Its Retry-After is computed in `admission` and a constant elsewhere; that of a 429 is set in `auth`.
    """
    return Problem(SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(retry_after_s)})


def markdown_table() -> str:
    """All rows by status, for the documentation."""
    rows = sorted(PROBLEMS, key=lambda row: row.status)
    lines = [f"| {row.status} | {row.title} | {row.when} | {row.of} |" for row in rows]
    return "\n".join(["| status | title | when | of |", "|---|---|---|---|", *lines])


def install(app: FastAPI) -> None:
    """Answer Problem, and the framework's own errors, as problem+json."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response(request.url.path)

    async def translate(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, status = request.url.path, error.status_code
        kind, detail = {
            404: (NOT_FOUND, f"there is nothing at {path}; /docs shows what there is"),
            405: (METHOD_NOT_ALLOWED, f"{request.method} is not possible at {path}"),
        }.get(status, (replace(BAD_REQUEST, status=status), str(error.detail)))
        return Problem(kind, detail, headers=error.headers).response(path)

    app.add_exception_handler(Problem, answer)
    app.add_exception_handler(HTTPException, translate)
