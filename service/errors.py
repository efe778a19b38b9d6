"""Problems (RFC 9457): every error this service answers with, of a request or of one image."""

import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from entry.images import ImageError

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """An error as it is answered: status, a short title that is the same each time, and what happened here."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail
        self.headers = headers
        self.members = members or {}

    def response(self) -> Response:
        """The problem+json response."""
        body = problem(self.status, self.title, self.detail) | dict(self.members)
        content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, self.status, headers=self.headers, media_type=MEDIA_TYPE)

    def at(self, path: str) -> Response:
        """The response in the shape that the route at that path answers errors in."""
        return self.openai() if path.startswith("/v1/") else self.response()

    def openai(self) -> Response:
        """The same error as OpenAI's clients know it; 400 for anything wrong in the input."""
        unknown = self.title == "Unknown model"
        status = 404 if unknown else 400 if self.status in (413, 415, 422) else self.status
        kind = "invalid_request_error" if status < 500 else "server_error"
        code = "model_not_found" if unknown else re.sub(r"[^a-z0-9]+", "_", self.title.lower())
        body = {"error": {"message": self.detail, "type": kind, "param": None, "code": code}}
        return Response(orjson.dumps(body), status, headers=self.headers, media_type="application/json")


def problem(status: int, title: str, detail: str) -> dict[str, Any]:
    """The four members that every problem has; the type is made of the title."""
    kind = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return {"type": f"urn:prg:problem:{kind}", "title": title, "status": status, "detail": detail}


def item_error(error: ImageError) -> dict[str, Any]:
    """An image's error, as it stands beside the results of the others."""
    return problem(error.status, error.title, str(error))


def overloaded(detail: str, retry_after_s: int) -> Problem:
    """503 for load or a failing engine, with when to come back."""
    return Problem(503, "Service unavailable", detail, headers={"Retry-After": str(retry_after_s)})


def internal() -> Problem:
    """500: our own bug, whose trace is in the log under the request's id."""
    return Problem(
        500, "Internal error", "this is a bug of the service; its log has the trace under this X-Request-ID"
    )


def install(app: FastAPI) -> None:
    """Answer Problem, and the framework's own errors, as problem+json."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.at(request.url.path)

    async def translate(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        details = {
            404: f"there is nothing at {request.url.path}; /docs shows what there is",
            405: f"{request.method} is not possible at {request.url.path}",
        }
        detail = details.get(error.status_code, str(error.detail))
        title = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, "Bad request")
        return Problem(error.status_code, title, detail, headers=error.headers).at(request.url.path)

    app.add_exception_handler(Problem, answer)
    app.add_exception_handler(HTTPException, translate)
