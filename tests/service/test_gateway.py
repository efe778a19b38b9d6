"""What callers get when the engine fails, is slow, or they hang up."""

import asyncio

import numpy as np
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from service.engines.contract import EngineOverloaded, EngineUnavailable, Job
from service.limits import HungUp, while_connected
from tests.service.conftest import IMAGE, engine_of


def test_a_bug_is_a_500_that_says_nothing_of_the_inside(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("service.decoding.load_image", lambda *_: {}["secret detail"])
        response = client.post("/embed", files=IMAGE)
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert response.headers["x-request-id"]
    assert "secret" not in response.text
    assert client.post("/embed", files=IMAGE).status_code == 200


@pytest.mark.parametrize("value", [np.nan, np.inf, EngineOverloaded("full"), EngineUnavailable("dead")])
def test_an_engine_that_fails_or_answers_no_numbers_is_503(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, value: Exception | float
) -> None:
    async def infer(self: object, job: Job) -> dict[str, np.ndarray]:
        if isinstance(value, Exception):
            raise value
        return {name: np.full((len(job.images), 4), value, np.float32) for name in job.outputs}

    monkeypatch.setattr(type(engine_of(client)), "infer", infer)
    response = client.post("/embed", files=IMAGE)
    assert (response.status_code, response.json()["title"]) == (503, "Service unavailable")
    assert int(response.headers["retry-after"]) >= 1


def test_the_deadline_is_504(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []

    async def infer(self: object, job: Job) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(type(engine_of(client)), "infer", infer)
    response = client.post("/embed", files=IMAGE, headers={"Request-Timeout": "0.2"})
    assert response.status_code == 504
    assert response.headers["connection"] == "close"
    assert cancelled


async def test_a_caller_that_hangs_up_ends_the_work() -> None:
    gone, ended = asyncio.Event(), []

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        gone.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(HungUp):
        await while_connected(Request({"type": "http"}, receive), work())
    assert ended
