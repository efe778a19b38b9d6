"""The table of problems: complete, and the same in the code, in the answers and in the documentation."""

import ast
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from entry.images import ImageError
from service import errors
from service.errors import PROBLEMS, Problem

ROOT = Path(__file__).parents[2]
ITEM_ERRORS = ("entry/images.py", "service/intake.py", "service/fetch.py")


def calls(path: str, name: str) -> list[ast.Call]:
    found = [
        node for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    return [call for call in found if ast.unparse(call.func).removeprefix("errors.") == name]


def test_titles_are_unique_and_become_types() -> None:
    assert len({row.title for row in PROBLEMS}) == len(PROBLEMS) > 30
    for row in PROBLEMS:
        assert re.fullmatch(r"urn:prg:problem:[a-z0-9]+(-[a-z0-9]+)*", errors.problem_body(row, "")["type"])
        assert 400 <= row.status < 600
        assert row.when


@pytest.mark.parametrize("path", ITEM_ERRORS)
def test_every_error_of_an_image_is_in_the_table(path: str) -> None:
    """Those that name status and title, and those that name a row."""
    rows = {(row.status, row.title) for row in PROBLEMS if row.of == "image"}
    spelled = {tuple(ast.literal_eval(word) for word in call.args[:2]) for call in calls(path, "ImageError")}
    named = [ast.unparse(call.args[0]).removeprefix("errors.") for call in calls(path, "image_error")]
    assert spelled <= rows
    assert all(getattr(errors, name).of == "image" for name in named)
    assert spelled or named


def test_every_error_of_an_image_can_be_raised() -> None:
    spelled = {ast.literal_eval(call.args[1]) for path in ITEM_ERRORS for call in calls(path, "ImageError")}
    named = {ast.unparse(call.args[0]) for path in ITEM_ERRORS for call in calls(path, "image_error")}
    titles = {getattr(errors, name.removeprefix("errors.")).title for name in named}
    assert {row.title for row in PROBLEMS if row.of == "image"} == spelled | titles


def test_an_image_has_the_body_that_a_request_has() -> None:
    error = errors.image_error(errors.EMPTY_IMAGE, "the image is empty (0 bytes)")
    assert isinstance(error, ImageError)
    assert errors.problem_body(error, str(error)) == {
        "type": "urn:prg:problem:empty-image",
        "title": "Empty image",
        "status": 422,
        "detail": "the image is empty (0 bytes)",
    }


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "code"),
    [
        (errors.BODY_TOO_LARGE, 400, "invalid_request_error", "body_too_large"),
        (errors.WRONG_OPTION, 400, "invalid_request_error", "wrong_option"),
        (errors.UNKNOWN_MODEL, 404, "invalid_request_error", "model_not_found"),
        (errors.KEY_NEEDED, 401, "invalid_request_error", "key_needed"),
        (errors.RATE_LIMIT, 429, "invalid_request_error", "rate_limit"),
        (errors.SERVICE_UNAVAILABLE, 503, "server_error", "service_unavailable"),
    ],
)
def test_under_v1_an_error_has_openais_shape(
    kind: errors.ProblemType, status: int, error_type: str, code: str
) -> None:
    answer = Problem(kind, "what happened", headers={"Retry-After": "3"}).response("/v1/embeddings")
    assert (answer.status_code, answer.media_type) == (status, "application/json")
    assert answer.headers["retry-after"] == "3"
    body = {"message": "what happened", "type": error_type, "param": None, "code": code}
    assert errors.orjson.loads(answer.body) == {"error": body}


def test_the_documentation_has_the_table() -> None:
    """To update it, paste what `errors.markdown_table()` returns."""
    assert f"\n\n{errors.markdown_table()}\n\n" in (ROOT / "docs" / "api.md").read_text("utf-8")


def test_errors_of_the_framework_are_in_the_table(client: TestClient) -> None:
    for method, path, row in (
        ("GET", "/nothing", errors.NOT_FOUND),
        ("DELETE", "/models", errors.METHOD_NOT_ALLOWED),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["title"]) == (row.status, row.title)
