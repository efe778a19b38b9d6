"""Readiness: answers and canaries count, a full queue does not."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.engines.contract import EngineOverloaded, EngineUnavailable, Job, ModelStatus
from service.readiness import FRESH_S, Readiness
from tests.service.conftest import Start, engine_of, eventually
from tests.tiny import png, write_tiny_entry

IMAGE = [("files", ("a.png", png()))]


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


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/health/live", "/models", "/models/tiny", "/v1/models", "/metrics"]
)
def test_head_answers_where_get_does(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == client.get(path).status_code == 200
    assert client.head("/embed").status_code == 405
