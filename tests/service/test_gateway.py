"""What callers get when the engine fails, is slow, or they hang up."""

import asyncio

import numpy as np
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from service.engines.contract import EngineOverloaded, EngineUnavailable, Job
from service.limits import HungUp, while_connected
from tests.service.conftest import engine_of
from tests.tiny import png

IMAGE = [("files", ("a.png", png()))]


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
