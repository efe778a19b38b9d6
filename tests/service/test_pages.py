"""The pages without a browser: who may see them, what they may load, what is not handed out."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import service
from service.app import create_app
from service.auth import new_key
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
    assert "default-src 'none'; script-src 'self';" in policy
    assert "http" not in policy
    assert ("unsafe" in policy) == (path == "/docs")
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path).status_code == 200


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
