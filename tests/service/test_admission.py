"""Admission of images and of bodies."""

import asyncio
from typing import Any

import pytest

from service.admission import Admission
from service.errors import SERVICE_UNAVAILABLE, Problem
from service.limits import HELD_BODIES, BodyLimit
from service.telemetry import Metrics
from tests.service.conftest import Start
from tests.tiny import png

IMAGE = [("files", ("a.png", png()))]


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
