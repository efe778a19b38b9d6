"""Health, metrics, settings, load, deadlines and callers that hang up."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.admission import Admission
from service.app import create_app, main
from service.auth import new_key
from service.engines.contract import EngineOverloaded, EngineUnavailable, Job, ModelStatus
from service.errors import SERVICE_UNAVAILABLE, Problem
from service.limits import HELD_BODIES, BodyLimit, HungUp, while_connected
from service.readiness import FRESH_S, Readiness
from service.settings import Settings, SettingsError, load_settings, unknown_variables
from service.telemetry import Metrics
from tests.service.conftest import Start
from tests.tiny import png, write_tiny_entry

IMAGE = [("files", ("a.png", png()))]


def engine_of(client: TestClient) -> Any:
    return client.app.state.gateway.engine  # type: ignore[attr-defined]


def eventually(check: Any, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "did not come true"
        time.sleep(0.02)


def test_models(client: TestClient) -> None:
    listing = client.get("/models").json()
    assert listing["default"] == "tiny"
    [item] = listing["data"]
    assert item == client.get("/models/tiny").json()
    assert item.keys() == {
        *("name", "state", "versions", "default_version", "image_size", "feature", "t_end", "features"),
        *("labels", "classify_t_end", "path", "solver", "steps", "nfe", "accuracy"),
    }
    assert item["state"] == "ready"
    assert item["features"] == {"state": {"dim": 768}, "hidden": {"dim": 4, "layers": ["middle_block"]}}


def test_a_refused_entry_is_failed_with_its_reason(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "good")
    (write_tiny_entry(tmp_path / "m", "broken") / "1" / "model.pt").write_bytes(b"damaged")
    client = start(model_repository=tmp_path / "m", default_model="good")
    items = {item["name"]: item for item in client.get("/models").json()["data"]}
    assert items["broken"]["state"] == "failed"
    reason = "zip archive" if "Triton" in type(engine_of(client)).__name__ else "sha256"
    assert reason in items["broken"]["reason"]
    assert client.post("/embed", files=IMAGE).json()["model"] == "good"
    refused = client.post("/embed", files=IMAGE, params={"model": "broken"})
    assert refused.status_code == 503
    assert reason in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) >= 1


def test_a_broken_entry_that_comes_first_by_name_is_not_the_default(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "good")
    (write_tiny_entry(tmp_path / "m", "aaa") / "1" / "model.pt").write_bytes(b"damaged")
    client = start(model_repository=tmp_path / "m")
    assert client.get("/models").json()["default"] == "good"
    assert client.post("/embed", files=IMAGE).json()["model"] == "good"
    eventually(lambda: client.get("/health/ready").status_code == 200)


def test_ready_once_a_canary_was_answered(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    eventually(lambda: client.get("/health/ready").status_code == 200)


def test_not_ready_where_the_default_model_failed(start: Start, tmp_path: Path) -> None:
    (write_tiny_entry(tmp_path / "m", "broken") / "1" / "model.pt").write_bytes(b"damaged")
    client = start(model_repository=tmp_path / "m")
    eventually(
        lambda: client.get("/models/broken").json()["reason"] in client.get("/health/ready").json()["detail"]
    )
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert client.get("/health/live").status_code == 200


class Engine:
    """An engine that answers as it is told to."""

    def __init__(self, status: ModelStatus) -> None:
        self.status = status
        self.error: Exception | None = None

    def models(self) -> dict[str, ModelStatus]:
        return {"tiny": self.status}

    async def infer(self, job: Job) -> dict[str, np.ndarray]:
        if self.error:
            raise self.error
        return {name: np.zeros((len(job.images), 4), np.float32) for name in job.outputs}


def test_readiness_follows_answers_and_ignores_rejections(client: TestClient) -> None:
    engine = Engine(engine_of(client).models()["tiny"])
    now = 100.0

    async def scene() -> None:
        nonlocal now
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        readiness = Readiness(engine, lambda: "tiny")  # type: ignore[arg-type]
        assert readiness.reason()
        await readiness._canary()
        assert readiness.reason() is None
        now += FRESH_S - 1
        engine.error = EngineOverloaded("full")
        await readiness._canary()
        assert readiness.reason() is None
        engine.error = EngineUnavailable("dead")
        await readiness._canary()
        assert readiness.reason() is None  # it answered within the time
        now += 2
        assert "a canary failed (dead)" in (readiness.reason() or "")
        readiness.answered("another")
        assert readiness.reason()
        readiness.answered("tiny")
        assert readiness.reason() is None
        readiness.stopping = True
        assert "stopping" in (readiness.reason() or "")

    loop = asyncio.new_event_loop()
    loop.slow_callback_duration = 1e9
    real = loop.time
    try:
        loop.run_until_complete(scene())
    finally:
        loop.time = real  # type: ignore[method-assign]
        loop.close()


def test_the_metric_of_readiness_is_what_readiness_says_at_that_moment(client: TestClient) -> None:
    client.post("/embed", files=IMAGE)
    assert "prg_ready 1.0" in client.get("/metrics").text
    client.app.state.gateway.readiness.stopping = True  # type: ignore[attr-defined]
    assert client.get("/health/ready").status_code == 503
    assert "prg_ready 0.0" in client.get("/metrics").text


def test_metrics_count_by_route_and_parse(client: TestClient) -> None:
    for _ in range(3):
        client.post("/embed", files=[*IMAGE, ("files", ("b", b"text"))])
    client.get("/models/some-name")
    client.get("/a/path/of/my/own")
    client.post("/embed", files=[("files", ("some-name.png", png()))], params={"model": "some-name"})
    client.request("SOME-NAME", "/embed", headers={"X-Request-ID": "some-name"})
    text = client.get("/metrics").text
    samples = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["prg_requests_total", "/embed", "200"] == 3
    assert samples["prg_requests_total", "/models/{name}", "404"] == 1
    assert samples["prg_requests_total", "404", "unmatched"] == 1
    assert samples["prg_requests_total", "/embed", "422"] == 1
    assert samples["prg_images_total", "ok", "tiny"] == 3
    assert samples["prg_images_total", "failed", "tiny"] == 3
    assert samples["prg_decode_seconds_count",] == 6
    assert samples["prg_model_ready", "tiny"] == 1
    assert samples["prg_queued_images",] == 0
    fingerprint = client.post("/embed", files=IMAGE).json()["fingerprint"]
    assert samples["prg_model_info", *sorted(("1", fingerprint, "tiny"))] == 1
    assert "some-name" not in text
    assert "my/own" not in text


def test_a_request_id_is_kept_or_made(client: TestClient) -> None:
    assert client.get("/health/live", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "\tq"):
        made = client.get("/health/live", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_a_bug_is_a_500_that_says_nothing_of_the_inside(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("service.decoding.load_image", broken)
    response = client.post("/embed", files=IMAGE)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    assert "secret" not in response.text
    monkeypatch.undo()
    assert client.post("/embed", files=IMAGE).status_code == 200


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_no_answer(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    async def infer(self: object, job: Job) -> dict[str, np.ndarray]:
        return {name: np.full((len(job.images), 4), value, np.float32) for name in job.outputs}

    monkeypatch.setattr(type(engine_of(client)), "infer", infer)
    response = client.post("/embed", files=IMAGE)
    assert response.status_code == 503
    assert "not finite" in response.json()["detail"]


@pytest.mark.parametrize(
    ("error", "status"), [(EngineOverloaded("full"), 503), (EngineUnavailable("dead"), 503)]
)
def test_a_failing_engine_fails_the_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def infer(self: object, job: Job) -> dict[str, np.ndarray]:
        raise error

    monkeypatch.setattr(type(engine_of(client)), "infer", infer)
    response = client.post("/classify", files=IMAGE)
    assert response.status_code == status
    assert int(response.headers["retry-after"]) >= 1


def test_the_deadline_is_504(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []

    async def infer(self: object, job: Job) -> dict[str, np.ndarray]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return {}

    monkeypatch.setattr(type(engine_of(client)), "infer", infer)
    response = client.post("/embed", files=IMAGE, headers={"Request-Timeout": "0.2"})
    assert response.status_code == 504
    assert response.headers["connection"] == "close"
    assert "0.2 s" in response.json()["detail"]
    assert cancelled


def test_a_caller_that_hangs_up_ends_the_work() -> None:
    async def scene() -> None:
        gone = asyncio.Event()
        ended = []

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> str:
            gone.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(True)
            return "an answer"

        request = Request({"type": "http"}, receive)
        with pytest.raises(HungUp):
            await while_connected(request, work())
        assert ended

    asyncio.run(scene())


def test_a_request_larger_than_the_queue_can_never_be_taken(start: Start) -> None:
    client = start(queue_images=4)
    response = client.post("/embed", files=IMAGE * 3, params={"t_end": ["0.1", "0.2"]})
    assert response.status_code == 422
    assert "images x levels = 6" in response.json()["detail"]


def test_admission_refuses_when_full_and_names_an_honest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.admission.time.monotonic", lambda: now)
    admission = Admission(100, Metrics())
    for _ in range(10):  # ten images a second
        with admission.admit(10):
            now += 1
    with admission.admit(80), pytest.raises(Problem) as error:
        admission.admit(30).__enter__()
    assert error.value.kind is SERVICE_UNAVAILABLE
    assert error.value.headers == {"Retry-After": "8"}
    with admission.admit(100):
        assert admission.held == 100
    assert admission.held == 0
    now += 1000
    fresh = Admission(100, Metrics())
    with fresh.admit(90):
        now += 0.1
        with fresh.admit(10):
            now += 1
        with pytest.raises(Problem) as error:
            fresh.admit(30).__enter__()
        assert error.value.headers == {"Retry-After": "9"}  # ten rows in the second that it has worked at all
    for _ in range(5000):
        with fresh.admit(1):
            pass
    assert len(fresh._done) <= 500


def test_bodies_read_at_once_are_bounded() -> None:
    async def scene() -> None:
        release = asyncio.Event()
        answers: list[int] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            try:
                await receive()
            except Problem as problem:
                await problem.response("/embed")(scope, receive, send)
                return
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": bytes(100), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if "status" in message:
                answers.append(message["status"])

        limited = BodyLimit(app, 100)
        scope = {"type": "http", "headers": []}
        calls = [asyncio.create_task(limited(dict(scope), receive, send)) for _ in range(HELD_BODIES + 2)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*calls)
        assert sorted(answers) == [200] * HELD_BODIES + [503] * 2
        assert limited.held == 0

    asyncio.run(scene())


def test_the_gateway_imports_no_torch() -> None:
    code = "import sys, service.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PRG_ENGINE", "magic"),
        ("PRG_PORT", "http"),
        ("PRG_MAX_IMAGES", "0"),
        ("PRG_MAX_BATCH", "100"),
        ("PRG_REQUEST_TIMEOUT_S", "-1"),
        ("PRG_MODEL_REPOSITORY", "/does/not/exist"),
        ("PRG_MODELS", "tiny,other"),
        ("PRG_MODELS", ","),
        ("PRG_MODELS", ":1"),
        ("PRG_DEFAULT_MODEL", "other"),
    ],
)
def test_a_setting_that_can_not_be_used_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    write_tiny_entry(tmp_path)
    monkeypatch.setenv("PRG_MODEL_REPOSITORY", str(tmp_path))
    monkeypatch.setenv(variable, value)
    assert main([]) == 2
    assert variable in capsys.readouterr().err


def test_a_port_in_use_is_told_before_any_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_entry(tmp_path)
    monkeypatch.setenv("PRG_MODEL_REPOSITORY", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("PRG_PORT", str(other.getsockname()[1]))
        assert main([]) == 2
    said = capsys.readouterr()
    assert re.search(r"PRG_PORT=\d+: .*address already in use", said.err)
    assert said.out == ""


def test_variables_that_are_no_settings() -> None:
    names = ["PRG_MAX_PIXEL", "prg_port", "PRG_MAX_IMAGES", "PRG_BANANA", "PRG_TEST_DATA", "PRG_KEY", "PATH"]
    assert unknown_variables(names) == {"PRG_MAX_PIXEL": "PRG_MAX_PIXELS", "PRG_BANANA": None}


def test_an_empty_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no entry in it"):
        create_app(Settings(model_repository=tmp_path))


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRG_MODELS", "a, b:1,b:2, c:1,c")
    monkeypatch.setenv("PRG_CORS_ORIGINS", "http://x, http://y")
    settings = load_settings()
    assert settings.chosen_models == {"a": None, "b": frozenset({"1", "2"}), "c": None}
    assert settings.cors_origins == ("http://x", "http://y")


def test_chosen_models_and_versions(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "a")
    write_tiny_entry(tmp_path / "m", "b", versions=("1", "2", "3"))
    client = start(model_repository=tmp_path / "m", models="b:1,b:2")
    [item] = client.get("/models").json()["data"]
    assert (item["versions"], item["default_version"]) == (["1", "2"], "2")


def test_cors(start: Start) -> None:
    client = start(cors_origins="http://page.example")
    allowed = client.get("/health/live", headers={"Origin": "http://page.example"})
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    other = client.get("/health/live", headers={"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_page_elsewhere_may_read_our_headers(start: Start) -> None:
    client = start(cors_origins="http://page.example")
    headers = {"Origin": "http://page.example", "Accept": "application/x-npy"}
    answer = client.post("/embed", files=IMAGE, headers=headers)
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert {name for name in answer.headers if name.startswith("x-")} <= exposed
    assert {"retry-after", "x-fingerprint"} <= exposed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            code: int = response.status
            return code
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_command_serves_reloads_and_stops(tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m")
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    key, row = new_key("tester")
    keys = tmp_path / "keys.toml"
    keys.write_text(row)
    environment = os.environ | {
        "PRG_MODEL_REPOSITORY": str(tmp_path / "m"),
        "PRG_PORT": str(port),
        "PRG_DRAIN_S": "2",
        "PRG_API_KEYS_FILE": str(keys),
        "PRG_MAX_PIXEL": "1",
    }
    http = httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"})
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "service.app"], env=environment, stdout=log)
    try:
        eventually(lambda: status(f"{base}/health/ready") == 200, 60)
        assert http.post("/embed", files=IMAGE).json()["model_version"] == "1"
        write_tiny_entry(tmp_path / "m", versions=("1", "2"))
        keys.write_text("no longer TOML")  # must not keep the models from being looked at
        server.send_signal(signal.SIGHUP)
        eventually(lambda: http.get("/models/tiny").json()["default_version"] == "2", 30)
        assert http.post("/embed", files=IMAGE).json()["model_version"] == "2"
        with socket.create_connection(("127.0.0.1", port)) as caller:  # hangs up amid its body
            head = (
                "POST /embed HTTP/1.1",
                "Host: x",
                "Content-Type: image/png",
                "Content-Length: 99",
                "",
                "abc",
            )
            caller.sendall("\r\n".join(head).encode())
        assert http.post("/embed", files=IMAGE).status_code == 200
        server.send_signal(signal.SIGTERM)
        eventually(lambda: status(f"{base}/health/ready") == 503, 2)
        assert http.post("/embed", files=IMAGE).status_code == 200
        assert server.wait(20) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    [warning] = [e for e in events if e["event"] == "unknown setting"]
    assert (warning["variable"], warning["perhaps_meant"]) == ("PRG_MAX_PIXEL", "PRG_MAX_PIXELS")
    assert {"serving", "reloaded", "request", "model loaded"} <= {e["event"] for e in events}
    assert [e["event"] for e in events if e["level"] == "error"] == ["reload failed"]  # the keys
    http.close()
