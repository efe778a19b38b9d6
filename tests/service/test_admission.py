"""Admission of images and of bodies."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from service.admission import USUAL, Admission
from service.errors import SERVICE_UNAVAILABLE, Problem
from service.limits import HELD_BODIES, BodyLimit
from service.telemetry import Metrics
from tests.service.conftest import IMAGE, Start


def test_what_can_never_be_taken(start: Start) -> None:
    """More rows than the queue has; a body that is too large by its head, or only by its chunks."""
    client = start(queue_images=4, max_body_bytes=1000)
    response = client.post("/embed", files=IMAGE * 3, params={"t_end": ["0.1", "0.2"]})
    assert (response.status_code, response.json()["title"]) == (422, "Too many images")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(100)

    for body in (bytes(2000), chunks()):
        response = client.post("/embed", content=body, headers={"content-type": "image/png"})
        assert (response.status_code, response.json()["title"]) == (413, "Body too large")


def test_admission_refuses_when_full_and_names_an_honest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.admission.time.monotonic", lambda: now)

    def refused(admission: Admission, images: int) -> str:
        """When to come back."""
        with pytest.raises(Problem) as error:
            admission.admit(images).__enter__()
        assert error.value.kind is SERVICE_UNAVAILABLE
        return (error.value.headers or {})["Retry-After"]

    admission = Admission(100, Metrics())
    for _ in range(10):  # ten images a second
        with admission.admit(10):
            now += 1
    with admission.admit(80):
        assert refused(admission, 30) == "8"
    with admission.admit(100):
        assert admission.held == 100
    assert admission.held == 0
    now += 1000
    fresh = Admission(100, Metrics())
    with fresh.admit(90):
        now += 0.1
        with fresh.admit(10):
            now += 1
        assert refused(fresh, 30) == "9"  # ten rows in the second that it has worked at all
    for _ in range(5000):
        with fresh.admit(1):
            pass
    assert len(fresh._done) <= 500


def test_a_few_slow_answers_refuse_nobody_for_his_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.admission.time.monotonic", lambda: now)
    admission = Admission(100, Metrics())

    def answer() -> None:
        nonlocal now
        with admission.admit(1):
            now += 3

    answer()
    with admission.admit(15):
        with admission.admit(1, wait_s=30):
            pass
        for _ in range(USUAL):
            answer()
        with pytest.raises(Problem, match="longer than the deadline"):
            admission.admit(1, wait_s=30).__enter__()


async def test_bodies_read_at_once_are_bounded_and_leave_room_for_small_ones() -> None:
    release, answers = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except Problem as problem:
            answers.append((scope["size"], problem.kind.status))
            return
        await release.wait()
        answers.append((scope["size"], 200))

    def receive(size: int) -> Any:
        async def body() -> dict[str, Any]:
            return {"type": "http.request", "body": bytes(size), "more_body": False}

        return body

    limited = BodyLimit(app, 100)
    scope = {"type": "http", "headers": []}
    sizes = [100] * (HELD_BODIES + 2) + [10]
    calls = [limited(scope | {"size": size}, receive(size), None) for size in sizes]  # type: ignore[arg-type]
    done = asyncio.gather(*calls)
    await asyncio.sleep(0)
    release.set()
    await done
    assert sorted(answers) == [(10, 200)] + [(100, 200)] * (HELD_BODIES - 1) + [(100, 503)] * 3
    assert limited.held == 0
