"""The table of problems: complete, and the same in the code, in the answers and in the documentation."""

import re
from pathlib import Path

from fastapi.testclient import TestClient

from service import errors
from service.errors import PROBLEMS, Problem

ROOT = Path(__file__).parents[2]


def test_titles_are_unique_and_become_types() -> None:
    assert len({row.title for row in PROBLEMS}) == len(PROBLEMS) > 30
    for row in PROBLEMS:
        assert re.fullmatch(r"urn:prg:problem:[a-z0-9]+(-[a-z0-9]+)*", errors.problem_body(row, "")["type"])
        assert 400 <= row.status < 600
    error = errors.image_error(errors.EMPTY_IMAGE, "the image is empty (0 bytes)")
    assert errors.problem_body(error, str(error)) == {
        "type": "urn:prg:problem:empty-image",
        "title": "Empty image",
        "status": 422,
        "detail": "the image is empty (0 bytes)",
    }


def test_the_errors_of_images_in_the_table_are_those_that_the_code_makes() -> None:
    files = ("entry/images.py", "service/intake.py", "service/fetch.py")
    code = "".join((ROOT / path).read_text("utf-8") for path in files)
    made = {(int(s), title) for s, title in re.findall(r'ImageError\(\s*(\d+),\s*"([^"]+)"', code)}
    rows = [getattr(errors, name) for name in re.findall(r"image_error\((?:errors\.)?(\w+)", code)]
    made |= {(row.status, row.title) for row in rows}
    assert made == {(row.status, row.title) for row in PROBLEMS if row.of == "image"}


def test_under_v1_an_error_has_openais_shape() -> None:
    for kind, status, error_type, code in (
        (errors.BODY_TOO_LARGE, 400, "invalid_request_error", "body_too_large"),
        (errors.UNKNOWN_MODEL, 404, "invalid_request_error", "model_not_found"),
        (errors.RATE_LIMIT, 429, "invalid_request_error", "rate_limit"),
        (errors.SERVICE_UNAVAILABLE, 503, "server_error", "service_unavailable"),
    ):
        answer = Problem(kind, "what happened", headers={"Retry-After": "3"}).response("/v1/embeddings")
        assert (answer.status_code, answer.media_type) == (status, "application/json")
        assert answer.headers["retry-after"] == "3"
        body = {"message": "what happened", "type": error_type, "param": None, "code": code}
        assert errors.orjson.loads(answer.body) == {"error": body}


def test_the_documentation_has_the_table() -> None:
    """To update it, paste what `errors.markdown_table()` returns."""
    assert f"\n\n{errors.markdown_table()}\n\n" in (ROOT / "docs" / "api.md").read_text("utf-8")


def test_what_is_not_there_is_in_the_table(client: TestClient) -> None:
    for row, requests in (
        (errors.NOT_FOUND, ("GET /nothing", "GET /models/other", "POST /embed/", "GET /v1/nothing")),
        (errors.METHOD_NOT_ALLOWED, ("DELETE /models", "GET /embed", "GET /v1/embeddings", "HEAD /embed")),
    ):
        for method, path in (request.split() for request in requests):
            answer = client.request(method, path, follow_redirects=False)
            status, media_type, body = errors.rendered(row, "", openai=path.startswith("/v1/"))
            assert (answer.status_code, answer.headers["content-type"]) == (status, media_type), path
            if method != "HEAD":
                found = answer.json()
                found.get("error", found)["message" if "error" in found else "detail"] = ""
                assert found == body
    for path in ("/", "/docs", "/health/live", "/models", "/models/tiny", "/metrics"):
        assert client.head(path).status_code == client.get(path).status_code == 200
