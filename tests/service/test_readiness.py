"""Readiness: answers and canaries count, a full queue does not."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.engines.contract import EngineOverloaded, EngineUnavailable, Job
from service.readiness import FRESH_S, Readiness
from tests.service.conftest import IMAGE, Start, engine_of, eventually
from tests.tiny import write_tiny_entry


def test_ready_once_a_canary_was_answered(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    eventually(lambda: client.get("/health/ready").status_code == 200)


def test_not_ready_where_the_default_model_failed(start: Start, tmp_path: Path) -> None:
    (write_tiny_entry(tmp_path / "m", "broken") / "1" / "model.pt").write_bytes(b"damaged")
    client = start(model_repository=tmp_path / "m")
    reason = client.get("/models/broken").json()["reason"]
    eventually(lambda: reason in client.get("/health/ready").json()["detail"])
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert client.get("/health/live").status_code == 200


async def test_readiness_follows_answers_and_ignores_rejections(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Exception | None = None
    now = 100.0

    async def infer(job: Job) -> dict[str, np.ndarray]:
        if error:
            raise error
        return {name: np.zeros((len(job.images), 4), np.float32) for name in job.outputs}

    engine = SimpleNamespace(models=engine_of(client).models, infer=infer)
    readiness = Readiness(engine, lambda: "tiny")  # type: ignore[arg-type]

    async def canary() -> bool:
        """Whether it is ready after one."""
        await readiness._canary()
        return readiness.reason() is None

    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    assert readiness.reason()
    assert await canary()
    now += FRESH_S - 1
    error = EngineOverloaded("full")
    assert await canary()
    error = EngineUnavailable("dead")
    assert await canary()  # it answered within the time
    now += 2
    assert "dead" in (readiness.reason() or "")
    readiness.answered("another")
    assert readiness.reason()
    readiness.answered("tiny")
    assert readiness.reason() is None
    readiness.stopping = True
    assert readiness.reason()


def test_the_metric_of_readiness_is_what_readiness_says_at_that_moment(client: TestClient) -> None:
    client.post("/embed", files=IMAGE)
    assert "prg_ready 1.0" in client.get("/metrics").text
    client.app.state.gateway.readiness.stopping = True  # type: ignore[attr-defined]
    assert client.get("/health/ready").status_code == 503
    assert "prg_ready 0.0" in client.get("/metrics").text
