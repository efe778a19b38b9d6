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


def of_images() -> set[tuple[int, str]]:
    """(status, title) of every error of an image that the code makes: spelled out, or by its row."""
    found: set[tuple[int, str]] = set()
    for path in ("entry/images.py", "service/intake.py", "service/fetch.py"):
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func).removeprefix("errors.")
            if name == "ImageError":
                found.add(tuple(ast.literal_eval(word) for word in call.args[:2]))
            elif name == "image_error":
                row = getattr(errors, ast.unparse(call.args[0]).removeprefix("errors."))
                found.add((row.status, row.title))
    return found


def test_titles_are_unique_and_become_types() -> None:
    assert len({row.title for row in PROBLEMS}) == len(PROBLEMS) > 30
    for row in PROBLEMS:
        assert re.fullmatch(r"urn:prg:problem:[a-z0-9]+(-[a-z0-9]+)*", errors.problem_body(row, "")["type"])
        assert 400 <= row.status < 600
        assert row.when


def test_the_errors_of_images_in_the_table_are_those_that_the_code_makes() -> None:
    assert of_images() == {(row.status, row.title) for row in PROBLEMS if row.of == "image"}


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


@pytest.mark.parametrize(
    ("method", "path", "row"),
    [
        *(("GET", path, errors.NOT_FOUND) for path in ("/nothing", "/models/other")),
        ("POST", "/embed/", errors.NOT_FOUND),
        *(("DELETE", "/models", errors.METHOD_NOT_ALLOWED), ("GET", "/embed", errors.METHOD_NOT_ALLOWED)),
        *(("HEAD", "/embed", errors.METHOD_NOT_ALLOWED), ("GET", "/v1/nothing", errors.NOT_FOUND)),
        ("GET", "/v1/embeddings", errors.METHOD_NOT_ALLOWED),
    ],
)
def test_what_is_not_there_is_in_the_table(
    client: TestClient, method: str, path: str, row: errors.ProblemType
) -> None:
    answer = client.request(method, path, follow_redirects=False)
    status, media_type, body = errors.rendered(row, "", openai=path.startswith("/v1/"))
    assert (answer.status_code, answer.headers["content-type"]) == (status, media_type)
    if method != "HEAD":
        found = answer.json()
        found.get("error", found)["message" if "error" in found else "detail"] = ""
        assert found == body


@pytest.mark.parametrize("path", ["/", "/docs", "/health/live", "/models", "/models/tiny", "/metrics"])
def test_head_answers_where_get_does(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == client.get(path).status_code == 200
