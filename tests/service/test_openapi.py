"""The OpenAPI page: valid, its examples true to their schemas, and what it says is what the service does."""

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from entry.config import read_entry
from service.app import create_app
from service.auth import new_key
from service.errors import PROBLEMS
from service.openapi import FINGERPRINTS
from service.settings import Settings
from tests.tiny import png, write_tiny_entry

Run = Callable[..., TestClient]
FORM: dict[str, Any] = {"files": [("files", ("a.png", png()))]}
POSTS = ("/embed", "/classify", "/v1/embeddings")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start the service with these settings on one tiny entry that has the name of the examples."""
    with ExitStack() as stack:

        def start(**settings: Any) -> TestClient:
            entry = write_tiny_entry(tmp_path / "models", "prg-cifar10", head=settings.pop("head", True))
            if settings.pop("broken", False):
                (entry / "1" / "model.pt").write_bytes(b"damaged")
            settings = {"model_repository": tmp_path / "models"} | settings
            return stack.enter_context(TestClient(create_app(Settings(**settings))))

        yield start


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    repository = tmp_path_factory.mktemp("models")
    write_tiny_entry(repository)
    return create_app(Settings(model_repository=repository)).openapi()


def operations(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def contents(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, media type object) of the request and of each response."""
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        yield f"request {kind}", media
    for status, response in operation["responses"].items():
        for kind, media in response.get("content", {}).items():
            yield f"{status} {kind}", media


def check(spec: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator(schema | {"components": spec["components"]}).validate(value)


def examples(media: dict[str, Any]) -> list[Any]:
    single = [media["example"]] if "example" in media else []
    return single + [example["value"] for example in media.get("examples", {}).values()]


def test_it_is_valid(spec: dict[str, Any]) -> None:
    validate(spec)


def test_every_body_has_an_example_and_every_example_is_true_to_its_schema(spec: dict[str, Any]) -> None:
    for route, operation in operations(spec):
        for where, media in contents(operation):
            found = examples(media)
            assert found or where == "200 application/x-npy", f"{route}, {where}: no example"
            for value in found:
                check(spec, media["schema"], value)


def test_errors_of_every_route_are_documented(spec: dict[str, Any]) -> None:
    keyed = {"401", "403", "500"}
    expected = {
        "get /health/live": {"500"},
        "get /health/ready": {"500", "503"},
        "get /metrics": keyed,
        "get /models": keyed,
        "get /models/{name}": keyed | {"404"},
        "post /embed": keyed | {"413", "415", "422", "429", "503", "504"},
        "post /classify": keyed | {"413", "415", "422", "429", "503", "504"},
        "get /v1/models": keyed,
        "post /v1/embeddings": keyed | {"400", "404", "429", "503", "504"},
    }
    assert {route: set(o["responses"]) - {"200"} for route, o in operations(spec)} == expected
    for route, operation in operations(spec):
        assert ("401" in operation["responses"]) == ("security" in operation), route


@pytest.mark.parametrize("path", POSTS)
def test_example_requests_are_answered_as_in_the_example(run: Run, spec: dict[str, Any], path: str) -> None:
    client, operation = run(), spec["paths"][path]["post"]
    bodies, answers = operation["requestBody"]["content"], operation["responses"]["200"]["content"]
    [example] = examples(answers["application/json"])
    for value in examples(bodies["application/json"]):
        answer = client.post(path, json=value)
        assert answer.status_code == 200, answer.text
        check(spec, answers["application/json"]["schema"], answer.json())
    first = client.post(path, json=examples(bodies["application/json"])[0]).json()
    assert first.keys() == example.keys()
    assert first["data"][0].keys() == example["data"][0].keys()
    for value in examples(bodies.get("multipart/form-data", {})):
        files = [("files", (name, png())) for name in value.pop("files")]
        assert client.post(path, files=files, data=value).status_code == 200


@pytest.mark.parametrize("path", ["/models", "/models/prg-cifar10", "/health/live"])
def test_example_answers_have_the_fields_of_real_ones(run: Run, spec: dict[str, Any], path: str) -> None:
    documented = spec["paths"][path.replace("prg-cifar10", "{name}")]["get"]["responses"]["200"]["content"]
    [example] = examples(documented["application/json"])
    answer = run().get(path).json()
    assert answer.keys() == example.keys()
    if "data" in example:
        assert answer["data"][0].keys() == example["data"][0].keys()


def image_request(client: TestClient, path: str, **more: Any) -> Any:
    if path == "/v1/embeddings":
        body = {"model": "prg-cifar10", "input": base64.b64encode(png()).decode()} | more.pop("json", {})
        return client.post(path, json=body, **more)
    return client.post(path, **FORM, **more)


def keys_file(folder: Path, scope: str = "infer") -> tuple[Path, dict[str, str]]:
    """A key for one image a minute, and its header."""
    key, row = new_key("demo")
    (folder / "keys.toml").write_text(row.replace("infer", scope).replace("6000", "1"))
    return folder / "keys.toml", {"Authorization": f"Bearer {key}"}


def provoke(status: int, path: str, run: Run, folder: Path) -> Any:
    """Make the service answer with that status for real."""
    if status in (401, 403, 429):
        file, headers = keys_file(folder, "metrics" if status == 403 else "infer")
        client = run(api_keys_file=file)
        if status == 429:
            image_request(client, path, headers=headers)
        return image_request(client, path, headers={} if status == 401 else headers)
    client = run(**{413: {"max_body_bytes": 10}, 503: {"broken": True}}.get(status, {}))
    if status == 500:
        client.app.state.gateway = None  # type: ignore[attr-defined]
    if status == 415:
        return client.post(path, content=b"hello", headers={"Content-Type": "text/plain"})
    more: dict[str, Any] = {"headers": {"Request-Timeout": "0.000001"}} if status == 504 else {}
    if status == 422:
        more = {"json" if path == "/v1/embeddings" else "params": {"t_end": 2}}
    return image_request(client, path, **more)


STATUSES = (401, 403, 413, 415, 422, 429, 500, 503, 504)
PROVOKED = [(path, status) for path in POSTS for status in STATUSES]
PROVOKED.remove(("/v1/embeddings", 415))  # it reads any body as JSON


@pytest.mark.parametrize(("path", "status"), PROVOKED)
def test_real_errors_are_as_documented(
    run: Run, spec: dict[str, Any], path: str, status: int, tmp_path: Path
) -> None:
    answer = provoke(status, path, run, tmp_path)
    openai = path == "/v1/embeddings"
    assert answer.status_code == (400 if openai and status in (413, 422) else status)
    documented = spec["paths"][path]["post"]["responses"][str(answer.status_code)]
    [(kind, media)] = documented["content"].items()
    assert answer.headers["content-type"] == kind
    check(spec, media["schema"], answer.json())
    name = (lambda body: body["error"]["code"]) if openai else (lambda body: body["title"])
    assert name(answer.json()) in {name(value) for value in examples(media)}
    assert ("retry-after" in answer.headers) == ("headers" in documented)


WRONG: dict[str, dict[str, Any]] = {
    "No image": {"json": {"inputs": []}},
    "Too many images": {"files": FORM["files"] * 65},
    "Malformed body": {"json": []},
    "Wrong option": FORM | {"params": {"t_end": 2}},
    "Unknown option": FORM | {"params": {"topk": 1}},
    "Contradicting options": FORM | {"params": {"t_end": 0.8}, "data": {"t_end": "0.5"}},
    "Unknown model": FORM | {"params": {"model": "other"}},
    "Unknown model version": FORM | {"params": {"model_version": "7"}},
    "Wrong header": FORM | {"headers": {"Priority": "high"}},
    "Unknown field": {"files": [("image", ("a.png", png()))]},
    "No usable image": {"files": [("files", ("a.png", b"no"))]},
    "No classes": FORM,
}
"""What is wrong with a request -> one that is so."""
OPENAI_WRONG: dict[str, dict[str, Any]] = {
    "Body too large": {},
    "Malformed body": {"json": {"model": None}},
    "Wrong option": {"json": {"dimensions": 1000}},
    "Unknown model": {"json": {"model": "other"}},
    "Wrong header": {"headers": {"Priority": "high"}},
    "Content encoding not accepted": {"headers": {"Content-Encoding": "gzip"}},
    "Too many images": {"json": {"input": [base64.b64encode(png()).decode()] * 2}},
    "No usable image": {"json": {"input": "iVBORw0KGgo="}},
}


def titles(responses: dict[str, Any], *statuses: str) -> set[str]:
    """What a route's page lists under these statuses."""
    media = [kind for status in statuses for kind in responses[status]["content"].values()]
    return {title for kind in media for title in kind["examples"]}


@pytest.mark.parametrize("path", ["/embed", "/classify"])
def test_every_mistake_on_the_page_is_answered_so(run: Run, spec: dict[str, Any], path: str) -> None:
    listed = titles(spec["paths"][path]["post"]["responses"], "422")
    assert listed == WRONG.keys() - ({"No classes"} if path == "/embed" else set())
    client = run()
    for title in sorted(listed - {"No classes"}):
        answer = client.post(path, **WRONG[title])
        assert (answer.status_code, answer.json()["title"]) == (422, title)
    if "No classes" in listed:
        assert run(head=False).post(path, **WRONG["No classes"]).json()["title"] == "No classes"


def test_every_mistake_of_the_openai_route_is_answered_so(
    run: Run, spec: dict[str, Any], tmp_path: Path
) -> None:
    responses = spec["paths"]["/v1/embeddings"]["post"]["responses"]
    assert titles(responses, "400", "404") == OPENAI_WRONG.keys()
    file, key = keys_file(tmp_path)
    for title, wrong in OPENAI_WRONG.items():
        client = run(**{"max_body_bytes": 10} if title == "Body too large" else {"api_keys_file": file})
        headers = key | wrong.get("headers", {})
        answer = image_request(client, "/v1/embeddings", json=wrong.get("json", {}), headers=headers)
        listed = responses[str(answer.status_code)]["content"]["application/json"]["examples"]
        assert answer.json()["error"]["code"] == listed[title]["value"]["error"]["code"]


def test_every_error_on_the_page_is_a_row_of_the_table_and_says_when(spec: dict[str, Any]) -> None:
    when = {row.title: row.when for row in PROBLEMS}
    seen = set()
    for route, operation in operations(spec):
        for where, media in contents(operation):
            if not where.startswith(("4", "5")):
                continue
            for title, example in media["examples"].items():
                body = example["value"]
                said = body["error"]["message"] if "/v1/" in route else body["detail"]
                assert said == when[title]
                assert "/v1/" in route or str(body["status"]) == where.split()[0]
                seen.add(title)
    of_requests = {row.title for row in PROBLEMS if row.of == "request"}
    unrouted = {"Bad request", "Method not allowed", "Head too large", "Request timeout"}
    assert of_requests - seen == unrouted


def test_the_example_of_a_model_is_the_shipped_one(spec: dict[str, Any]) -> None:
    shipped = read_entry(Path(__file__).parents[2] / "model_repository" / "prg-cifar10")
    content = spec["paths"]["/models/{name}"]["get"]["responses"]["200"]["content"]
    [example] = examples(content["application/json"])
    measured = shipped.prg.versions[shipped.default_version].accuracy[0]
    for key in ("data", "images", "top1", "top5"):
        assert example["accuracy"][0][key] == getattr(measured, key)
    assert shipped.fingerprints(shipped.default_version) == FINGERPRINTS
