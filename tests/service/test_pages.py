"""The pages without a browser: who may see them, what they may load, what is not handed out."""

import hashlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import service
from service.app import create_app
from service.auth import new_key
from service.headers import SECURITY
from service.settings import Settings
from tests.tiny import write_tiny_entry

SERVICE = Path(service.__file__).parent


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service with keys, called without one."""
    folder = tmp_path_factory.mktemp("pages")
    write_tiny_entry(folder / "models")
    (folder / "keys.toml").write_text(new_key("someone")[1])
    settings = Settings(model_repository=folder / "models", api_keys_file=folder / "keys.toml")
    with TestClient(create_app(settings)) as running:
        yield running


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/playground/main.js", "/swagger/start.js"])
def test_pages_need_no_key(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200
    assert client.get("/models").status_code == 401


@pytest.mark.parametrize("path", ["/", "/docs", "/playground/samples/black.png", "/swagger/swagger-ui.css"])
def test_a_strict_policy_and_no_stale_files(client: TestClient, path: str) -> None:
    answer = client.get(path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert "unsafe" not in policy
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("GET", path)
            for path in ("/", "/docs", "/openapi.json", "/playground/main.js", "/models", "/nothing")
        ),
        *(("GET", path) for path in ("/health/live", "/metrics", "/v1/models", "/playground/none.js")),
        *(("POST", "/embed"), ("DELETE", "/embed"), ("OPTIONS", "/embed"), ("HEAD", "/")),
    ],
)
def test_every_answer_tells_browsers_to_keep_out(client: TestClient, method: str, path: str) -> None:
    headers = client.request(method, path, headers={"Origin": "http://other.example"}).headers
    for name, value in SECURITY:
        assert headers.get_list(name.decode()) == [value.decode()] or name == b"content-security-policy"
    [policy] = headers.get_list("content-security-policy")
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "path",
    [
        *("/playground/__init__.py", "/playground/", "/swagger/none.js", "/playground/..%2Fapp.py"),
        *("/playground/%2e%2e/%2e%2e/README.md", "/swagger/..%2Fplayground%2Findex.html"),
    ],
)
def test_what_is_no_page_is_not_handed_out(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("page", ["playground", "swagger"])
def test_no_inline_code_and_no_other_host(page: str) -> None:
    html = (SERVICE / page / "index.html").read_text("utf-8")
    assert not re.search(r"<style|<script>| on[a-z]+=| style=|https?://(?!www\.w3\.org)", html)


def test_swagger_ui_is_what_its_note_says() -> None:
    note = (SERVICE / "swagger" / "README.txt").read_text()
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)$", note, re.MULTILINE)
    assert len(sums) == 2
    for digest, name in sums:
        assert hashlib.sha256((SERVICE / "swagger" / name).read_bytes()).hexdigest() == digest
    component = runpy.run_path(str(SERVICE.parent / "docker" / "sbom.py"))["swagger_ui"]()
    assert component["version"] in note
    assert [(c["hashes"][0]["content"], c["name"]) for c in component["components"]] == sums
