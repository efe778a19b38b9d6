"""What computes is killed and comes back, under load: what is answered is right, the rest is refused, and it recovers.

triton    Triton is killed (-9) and restarted, twice; then one of two is killed
embedded  the service itself is killed (-9) and restarted; then a new version whose file is damaged, and SIGHUP
"""

import asyncio
import sys
import time

from benchmarks.trust.load import Seen, ask, client, load
from benchmarks.trust.rows import Row, main
from benchmarks.trust.stage import Stage, staged
from tests.real_triton.server import TritonServer

CALLERS = 16
KILLS = 2
AWAY_S = 1.0
RECOVERY_S = 5.0
"""From the engine being ready to a right answer, at most."""
LONGEST_S = 5.0
"""What a request may take while the engine is away: no caller waits for its return."""


def run(engine: str) -> list[Row]:
    """All of them."""
    return asyncio.run(of_triton() if engine == "triton" else of_the_service())


async def recovered(url: str) -> float:
    """Seconds until a request is answered right."""
    begun = time.monotonic()
    async with client(url) as http:
        while (await ask(http)).kind != "right":
            await asyncio.sleep(0.02)
    return time.monotonic() - begun


async def of_triton() -> list[Row]:
    """One Triton is killed; one of two is."""
    recoveries = []
    with staged("triton") as stage:
        triton = stage.triton
        assert triton is not None
        async with load(stage.gateway.url, CALLERS) as seen:
            for _ in range(KILLS):
                await asyncio.sleep(1)
                await asyncio.to_thread(triton.kill)
                await asyncio.sleep(AWAY_S)
                triton.start(wait=False)
                await asyncio.to_thread(triton.wait_ready)
                recoveries.append(await recovered(stage.gateway.url))
            await asyncio.sleep(1)
    done = f"Triton killed (-9) and restarted {KILLS} times, {CALLERS} callers"
    one = killed("Triton killed", done, seen, recoveries)
    return [one, await one_of_two()]


def killed(name: str, done: str, seen: Seen, recoveries: list[float]) -> Row:
    """The row of an engine that was away: refused meanwhile, and answered soon after."""
    longest = max(outcome.ended - outcome.begun for outcome in seen.outcomes)
    figure = f"answered {max(recoveries):.1f} s after its return; the longest request {longest:.1f} s; {seen.summary()}"
    limit = f"right or refused, {RECOVERY_S:g} s, {LONGEST_S:g} s"
    good = seen.count("right", "refused") == len(seen.outcomes) and seen.count("refused")
    return Row(name, done, figure, limit, bool(good) and max(recoveries) < RECOVERY_S and longest < LONGEST_S)


async def one_of_two() -> Row:
    """Two Tritons behind a gateway, one is killed."""
    with staged("triton") as stage:
        first = stage.triton
        assert first is not None
        (stage.work / "second").mkdir()
        second = TritonServer(stage.repository, stage.work / "second").start()
        try:
            gateway = stage.another(triton_url=f"{first.url},{second.url}").start()
            try:
                async with load(gateway.url, CALLERS) as seen:
                    await asyncio.sleep(1)
                    await asyncio.to_thread(first.kill)
                    await asyncio.sleep(2)
            finally:
                gateway.stop()
        finally:
            second.kill()
    done = f"one of two Tritons killed (-9), {CALLERS} callers"
    return Row("one of two killed", done, seen.summary(), "all right", not seen.bad())


async def of_the_service() -> list[Row]:
    """The service itself is killed; a damaged version is published."""
    with staged("embedded") as stage:
        gateway, recoveries = stage.gateway, []
        async with load(gateway.url, CALLERS) as seen:
            await asyncio.sleep(1)
            gateway.kill()
            await asyncio.sleep(AWAY_S)
            gateway.start(wait=False)
            await asyncio.to_thread(gateway.wait_ready)
            recoveries.append(await recovered(gateway.url))
            await asyncio.sleep(1)
        unanswered = seen.count("lost")
        figure = f"answered {recoveries[0]:.1f} s after it was ready; {seen.summary()}"
        good = not seen.count("wrong", "failed") and unanswered <= CALLERS and recoveries[0] < RECOVERY_S
        limit = f"none wrong, one request of each caller lost, {RECOVERY_S:g} s"
        one = Row("service killed", f"killed (-9) and restarted, {CALLERS} callers", figure, limit, good)
        return [one, await damaged(stage)]


async def damaged(stage: Stage) -> Row:
    """A second version whose file is damaged."""
    stage.publish("1", "2")
    (stage.repository / "tiny" / "2" / "model.pt").write_bytes(b"damaged")
    async with load(stage.gateway.url, CALLERS) as seen:
        await asyncio.sleep(0.5)
        await asyncio.to_thread(stage.gateway.hang_up)
        await asyncio.sleep(1)
    done = f"a damaged version 2 beside 1, SIGHUP, {CALLERS} callers"
    passed = not seen.bad() and set(seen.versions()) == {"1"}
    return Row("damaged version", done, seen.summary(), "all right, by version 1", passed)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
