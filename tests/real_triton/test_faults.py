"""What callers see while Triton is killed, stopped, full, slow, broken or absent. Every server is real."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from service import readiness
from service.app import create_app
from service.settings import Settings
from tests.real_triton.conftest import Serve
from tests.real_triton.server import TritonServer
from tests.tiny import png, write_tiny_entry

DEADLINE_S = 5.0
pytestmark = pytest.mark.slow
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


@asynccontextmanager
async def gateway(*servers: TritonServer) -> AsyncIterator[httpx.AsyncClient]:
    """The gateway over these servers, in this loop."""
    addresses = tuple(server.url for server in servers)
    app = create_app(Settings(engine="triton", triton_url=addresses, request_timeout_s=DEADLINE_S))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g")
    async with app.router.lifespan_context(app), http:
        http.app = app  # type: ignore[attr-defined]
        yield http


@dataclass
class Seen:
    """What callers saw: when each request began and ended, its status, what was wrong with it."""

    rows: list[tuple[float, float, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def statuses(self, since: float, until: float = 1e18) -> set[int]:
        """Of requests that began in that time."""
        return {status for begun, _, status in self.rows if since <= begun < until}

    def add(self, begun: float, response: httpx.Response, colour: tuple[int, int, int]) -> None:
        ended = time.monotonic()
        self.rows.append((begun, ended, response.status_code))
        if ended - begun > DEADLINE_S + 0.5:
            self.wrong.append(f"took {ended - begun:.1f} s")
        if response.status_code == 200:
            found = response.json()["data"][0]["embedding"]
            if found != pytest.approx([*(c / 255 for c in colour), 0.8], abs=1e-5):
                self.wrong.append(f"{colour} was answered {found}")
        elif response.status_code != 503 or int(response.headers.get("retry-after", 0)) < 1:
            self.wrong.append(f"{response.status_code}: {response.text}")


@asynccontextmanager
async def load(http: httpx.AsyncClient) -> AsyncIterator[Seen]:
    """Callers that send one image after the other, for as long as the context lasts."""
    seen, stop = Seen(), asyncio.Event()

    async def caller(colour: tuple[int, int, int]) -> None:
        image = png(colour)
        while not stop.is_set():
            begun = time.monotonic()
            response = await http.post("/embed", content=image, headers={"content-type": "image/png"})
            seen.add(begun, response, colour)
            await asyncio.sleep(0.02)

    tasks = [asyncio.create_task(caller(colour)) for colour in COLOURS * 4]
    try:
        yield seen
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def embed(http: httpx.AsyncClient, model: str = "", **headers: str) -> httpx.Response:
    """One image."""
    headers = {"content-type": "image/png", **{k.replace("_", "-"): v for k, v in headers.items()}}
    params = {"model": model} if model else {}
    return await http.post("/embed", params=params, content=png(), headers=headers)


def is_refused(response: httpx.Response) -> bool:
    return response.status_code == 503 and int(response.headers["retry-after"]) >= 1


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float) -> float:
    """Until it is true; the seconds that took."""
    begun = time.monotonic()
    while not await check():
        assert time.monotonic() - begun < seconds, "did not come true"
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


async def answers(http: httpx.AsyncClient) -> bool:
    return (await embed(http)).status_code == 200


async def is_ready(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health/ready")).status_code == 200


def report(fact: str, seconds: float) -> None:
    """A measured figure, for the operations page: shown with pytest -s."""
    print(json.dumps({"fault": fact, "seconds": round(seconds, 2)}), file=sys.stderr)


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_server_that_goes_and_comes_back(serve: Serve, how: str) -> None:
    server = serve()
    async with gateway(server) as http, load(http) as seen:
        await asyncio.sleep(1)
        gone = time.monotonic()
        await asyncio.to_thread(getattr(server, how))
        await asyncio.sleep(1)
        server.start(wait=False)
        await asyncio.to_thread(server.wait_ready)
        back = time.monotonic()
        resumed = await eventually(lambda: answers(http), 10)
        report(f"{how}: from Triton being ready to an answer", resumed)
        await asyncio.sleep(2)
    assert seen.wrong == []
    assert {status for _, ended, status in seen.rows if ended < gone} == {200}
    assert 503 in seen.statuses(gone, back)
    assert seen.statuses(back + resumed + 1) == {200}


async def test_two_share_the_load_and_one_is_killed(serve: Serve) -> None:
    first, second = serve(), serve()
    async with gateway(first, second) as http, load(http) as seen:
        await asyncio.sleep(2)
        counts = [server.counters("nv_inference_count")["tiny"] for server in (first, second)]
        assert min(counts) > 0.25 * sum(counts)
        killed = time.monotonic()
        await asyncio.to_thread(first.kill)

        async def others_answer() -> bool:
            return len([begun for begun, *_ in seen.rows if begun > killed + 1]) > 20

        await eventually(others_answer, 30)
        text = (await http.get("/metrics")).text
        for server, up in ((first, "0.0"), (second, "1.0")):
            assert f'prg_engine_up{{address="{server.url}"}} {up}' in text
    assert seen.wrong == []
    failed = [begun - killed for begun, _, status in seen.rows if status != 200]
    report("one of two killed: from the kill to the last failed request", max(failed, default=0))
    assert seen.statuses(killed + 1) == {200}


async def test_a_full_queue(serve: Serve, tmp_path: Path) -> None:
    path = write_tiny_entry(tmp_path / "models") / "config.pbtxt"
    path.write_text(path.read_text().replace("max_queue_size: 256", "max_queue_size: 1"))
    async with gateway(serve()) as http:
        await eventually(lambda: is_ready(http), 10)
        (path.parent / "slow-ms").write_text("400")

        async def apart(number: int) -> httpx.Response:
            """Those that come together go in one call."""
            await asyncio.sleep(0.02 * number)
            return await embed(http)

        responses = await asyncio.gather(*map(apart, range(12)))
        refused = [r for r in responses if r.status_code != 200]
        assert 0 < len(refused) < 12
        assert all(map(is_refused, refused))
        assert await is_ready(http)
        counted = f'prg_rejections_total{{reason="engine queue"}} {len(refused)}.0'
        assert counted in (await http.get("/metrics")).text
        (path.parent / "slow-ms").unlink()
        assert await answers(http)


async def test_a_queue_timeout_and_a_slow_model_are_504(serve: Serve) -> None:
    server = serve()
    slow = server.repository / "tiny" / "slow-ms"
    async with gateway(server) as http:
        assert await answers(http)
        slow.write_text("1500")
        first = asyncio.create_task(embed(http))
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        queued, running = await asyncio.gather(
            embed(http, request_timeout="0.5"), embed(http, request_timeout="0.7", priority="bulk")
        )
        assert time.monotonic() - begun < 1.2
        assert (queued.status_code, running.status_code) == (504, 504)
        assert (await first).status_code == 200
        assert (await embed(http, request_timeout="0.5")).status_code == 504
        slow.unlink()
        await eventually(lambda: answers(http), 10)


async def test_a_dead_stub_while_triton_says_ready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "FRESH_S", 1.0)
    monkeypatch.setattr(readiness, "CANARY_EVERY_S", 0.3)
    server = serve()
    async with gateway(server) as http:
        await eventually(lambda: is_ready(http), 10)
        for pid in server.stubs():
            os.kill(pid, signal.SIGKILL)
        assert is_refused(await embed(http))

        async def says_no() -> bool:
            return not await is_ready(http)

        await eventually(says_no, 10)
        assert server.ready()
        assert (await http.get("/health/live")).status_code == 200


async def test_absent_at_start(serve: Serve) -> None:
    server = serve(start=False)
    async with gateway(server) as http:
        assert (await http.get("/health/live")).status_code == 200
        assert not await is_ready(http)
        assert (await http.get("/models")).json() == {"data": []}
        for model in ("", "tiny"):
            assert is_refused(await embed(http, model))
        server.start(wait=False)
        await asyncio.to_thread(server.wait_ready)
        report(
            "absent at start: from Triton being ready to an answer",
            await eventually(lambda: answers(http), 10),
        )
        await eventually(lambda: is_ready(http), 15)


async def test_a_caller_that_hangs_up_cancels_the_call(serve: Serve) -> None:
    server = serve()
    async with gateway(server) as http:
        assert await answers(http)
        replica = http.app.state.gateway.engine._replicas[0]  # type: ignore[attr-defined]

        async def idle() -> bool:
            return replica.in_flight == 0

        await eventually(idle, 5)  # the canary of the start may still be under way
        (server.repository / "tiny" / "slow-ms").write_text("1000")
        before = server.counters("nv_inference_count")["tiny"]
        # One for each of Triton's two instances, so that none is free for those who hang up.
        busy = []
        for _ in range(2):
            busy.append(asyncio.create_task(embed(http)))
            await asyncio.sleep(0.2)
        gone = [asyncio.create_task(embed(http)) for _ in range(5)]
        await asyncio.sleep(0.2)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert replica.in_flight == 2
        assert [(await task).status_code for task in busy] == [200, 200]
        (server.repository / "tiny" / "slow-ms").unlink()
        assert await answers(http)
        await asyncio.sleep(0.5)
        # The two and the last: of those who hung up none was computed.
        assert server.counters("nv_inference_count")["tiny"] - before <= 3
