"""Neither an answer nor the log holds what it must not: a key, a file's place, what a caller sent."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from service.auth import new_key
from tests.real_triton.server import free_ports
from tests.service.conftest import IMAGE, eventually
from tests.service.test_command import status
from tests.tiny import png, write_tiny_entry

ROOT = Path(__file__).parents[2]
SECRETS = ("stolen-token", "dXNlcjpzZWNyZXQ", "signature-of-a-url", "password-in-a-url", "query-of-a-caller")
"""In a header, in another, in a URL's query, in its user, in our own query."""
TELLTALE = ("Traceback", 'File "', "site-packages", str(ROOT), sys.prefix)

FAULTY = """
from service import fetch
from entry.runner import Runner
from service.gateway import Gateway
choose, run = Gateway.choose, Runner.run

def choose_or_not(self, model, version=None):
    if model == "bug":
        raise KeyError("a bug")
    return choose(self, model, version)

def run_or_not(self, images, t_end):
    if (t_end == 0.125).any():
        raise OSError(2, "gone", __import__("os").environ["PRG_MODEL_REPOSITORY"])
    return run(self, images, t_end)

Gateway.choose, Runner.run = choose_or_not, run_or_not
fetch.is_public = lambda address: str(address) == "127.0.0.1"
from service.app import main
main([])
"""
"""The service with a bug, which is the model "bug", a model that fails at one level, and one address to fetch from."""


class Said(NamedTuple):
    """What the service said to its callers, and to its log."""

    answers: list[tuple[int, str]]
    log: str


@pytest.fixture(scope="module", params=["file", "terminal"])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """Of errors of every kind, by a process whose log goes there."""
    folder = tmp_path_factory.mktemp("place-of-files")
    models = folder / "models"
    write_tiny_entry(models)
    (write_tiny_entry(models, "damaged") / "1" / "model.pt").write_bytes(b"damaged")
    shutil.rmtree(write_tiny_entry(models, "half", versions=("1", "2")) / "2")
    write_tiny_entry(models, "strange").joinpath("config.pbtxt").write_text("no configuration")
    key, row = new_key("alice")
    other, other_row = new_key("prometheus", ["metrics"])
    (folder / "keys.toml").write_text(row.replace("6000", "60") + other_row)
    [port] = free_ports(1)
    environment = os.environ | {
        "PRG_MODEL_REPOSITORY": str(models),
        "PRG_API_KEYS_FILE": str(folder / "keys.toml"),
        "PRG_DEFAULT_MODEL": "tiny",
        "PRG_ALLOW_URLS": "1",
        "PRG_MAX_BODY_BYTES": "100000",
        "PRG_MAX_IMAGES": "8",
        "PRG_PORT": str(port),
    }
    log: list[bytes] = []
    ours, theirs = pty.openpty() if request.param == "terminal" else os.pipe()
    command = [sys.executable, "-c", FAULTY]
    server = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)

    def read() -> None:
        # A terminal whose other end is closed is an error, a pipe gives nothing.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 1 << 16):
                log.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    base = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: status(f"{base}/health/ready") == 200, 60)
        with httpx.Client(base_url=base) as http:
            answers = [(a.status_code, a.text) for a in provoked(http, key, other)]
            (folder / "keys.toml").write_text(row + row)
            (models / "tiny" / "config.pbtxt").write_text("no configuration")
            server.send_signal(signal.SIGHUP)
            own = {"Authorization": f"Bearer {key}"}
            eventually(lambda: "older" in http.get("/models", headers=own).text, 30)
            answers.append((200, http.get("/models", headers=own).text))
    finally:
        server.terminate()
        server.wait(30)
        reader.join()
        os.close(ours)
    return Said(answers, b"".join(log).decode().replace(key, "THE KEY").replace(str(folder), "THE FOLDER"))


def provoked(http: httpx.Client, key: str, other: str) -> Iterator[httpx.Response]:
    """Answers to requests of every kind that fails."""
    own = {"Authorization": f"Bearer {key}"}
    for wrong in ("Bearer stolen-token", "Basic dXNlcjpzZWNyZXQ=", f"Bearer {other}", f"Bearer{key}", key):
        for path in ("/models", "/v1/models", "/metrics"):
            yield http.get(path, headers={"Authorization": wrong})
        yield http.post("/embed", files=IMAGE, headers={"Authorization": wrong})
    for path in (
        "/nothing/query-of-a-caller",
        "/models/query-of-a-caller",
        "/playground/../app.py",
        "/models",
    ):
        yield http.get(path, headers=own)
    yield http.delete("/embed", headers=own)
    for name, value in (
        *(("model", "query-of-a-caller"), ("model", "damaged"), ("model", "strange"), ("model", "bug")),
        *(
            ("model_version", "9"),
            ("t_end", "0.125"),
            ("t_end", "x"),
            ("query-of-a-caller", "1"),
            ("top_k", "2"),
        ),
    ):
        for path in ("/embed", "/classify", "/v1/embeddings"):
            body = {"input": "AAAA", name: value}
            given = {"json": body} if path.startswith("/v1") else {"files": IMAGE, "params": {name: value}}
            yield http.post(path, headers=own, **given)
    yield http.post("/embed", params={"model": "half", "model_version": "2"}, files=IMAGE, headers=own)
    for header in ({"Request-Timeout": "1e-6"}, {"Request-Timeout": "x"}, {"Content-Encoding": "gzip"}):
        yield http.post("/embed", files=IMAGE, headers=own | header)
    for kind, content in (
        *(("image/png", b"no image"), ("image/png", png()[:60]), ("image/png", b""), ("text/plain", b"x")),
        *(
            ("application/json", b"{"),
            ("application/json", b'{"inputs": [1]}'),
            ("multipart/form-data", b"x"),
        ),
        *(("multipart/form-data; boundary=x", b"--x\r\n"), ("image/png", bytes(200_000))),
    ):
        yield http.post("/embed", content=content, headers=own | {"Content-Type": kind})
    urls = (
        "http://no-such-host.invalid/?signature-of-a-url",
        "http://u:password-in-a-url@8.8.8.8/",
        "file:///etc",
    )
    for url in (*urls, "http://10.0.0.1/?signature-of-a-url"):
        yield http.post("/embed", json={"inputs": [{"url": url}]}, headers=own)
    good = f"{http.base_url}/playground/samples/black.png?signature-of-a-url"
    fetched = http.post("/embed", json={"inputs": [{"url": good}]}, headers=own)
    assert fetched.status_code == 200
    yield fetched
    for _ in range(10):
        yield http.post("/embed", files=IMAGE * 8, headers=own)


@pytest.mark.slow
def test_every_kind_of_error_was_among_them(said: Said) -> None:
    statuses = {200, 400, 401, 403, 404, 405, 413, 415, 422, 429, 500, 503, 504}
    assert {code for code, _ in said.answers} == statuses
    for event in ("bug", "inference failed", "entry refused", "version refused", "reload failed", "request"):
        assert event in said.log


@pytest.mark.slow
def test_no_answer_says_where_files_are(said: Said) -> None:
    assert [(code, text) for code, text in said.answers if "place-of-files" in text] == []
    for word in TELLTALE:
        assert [(code, text) for code, text in said.answers if word in text] == []


@pytest.mark.slow
def test_the_log_has_no_secret(said: Said) -> None:
    assert "THE KEY" not in said.log
    for secret in (*SECRETS, "Bearer", "Authorization"):
        assert [line for line in said.log.splitlines() if secret in line] == []
