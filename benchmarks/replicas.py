"""Several at once: one and two gateways behind nginx, one and two Tritons. What the second one brings and survives.

gateways    a model that takes no time, so that the gateway is the limit; each gateway is held to a share of a core,
            as a container is, so that the cores suffice for two of them and all else
Tritons     a slow model in full batches, so that Triton is the limit
killed      one of two is killed (-9) under load and started again: what the callers see
restarted   both gateways, and both Tritons, are stopped and started one after the other

PYTHONPATH=. python benchmarks/replicas.py
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trust.drain import DRAIN_S, nginx, rolling_restart
from benchmarks.trust.load import load
from benchmarks.trust.overload import coloured
from benchmarks.trust.rows import Absent, Row, main, rows_of
from benchmarks.trust.stage import NO_TRITON, Gateway
from tests.real_triton.server import TritonServer, find_server
from tests.tiny import write_tiny_entry

CALLERS = 16
"""Where one is killed."""
SLOW_MS = 200
SECONDS = 10.0
CORE_SHARE = 0.2
"""Of a core, for each gateway where gateways are the limit."""
CALLERS_OF_GATEWAYS = 64
CALLERS_OF_A_TRITON = 320
"""It computes 128 images at once, and 192 more wait: else a batch begins with the few that are back first."""
BATCH_MS = 1000
"""Of a batch, where Tritons are the limit."""
SCALES = 1.5
"""Times the throughput of one, at least, by two."""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Cluster:
    """What runs."""

    url: str
    gateways: list[Gateway]
    tritons: list[TritonServer]


@contextlib.asynccontextmanager
async def cluster(
    gateways: int, tritons: int, slow_ms: int = 0, core_share: float = 0.0
) -> AsyncIterator[Cluster]:
    """So many of each behind one nginx. Raises Absent."""
    if find_server() is None:
        raise Absent(NO_TRITON)
    with tempfile.TemporaryDirectory(prefix="prg-replicas-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        entry = write_tiny_entry(work / "models")
        if slow_ms:
            (entry / "slow-ms").write_text(str(slow_ms))
        engines = []
        for number in range(tritons):
            own = work / f"triton-{number}"
            own.mkdir()
            engines.append(triton := TritonServer(entry.parent, own))
            stack.callback(triton.kill)
            triton.start()
        settings: dict[str, object] = {
            "engine": "triton",
            "triton_url": ",".join(t.url for t in engines),
            "drain_s": DRAIN_S,
        }
        # Enough for all callers of one gateway.
        settings |= {"queue_images": 4 * CALLERS_OF_A_TRITON}
        fronts = [Gateway(work, settings) for _ in range(gateways)]
        for gateway in fronts:
            stack.callback(gateway.stop)
            gateway.start()
            if core_share:
                stack.enter_context(held_to(core_share, gateway.process.pid))
        async with nginx(work, *fronts) as url:
            yield Cluster(url, fronts, engines)


@contextlib.contextmanager
def held_to(share: float, pid: int) -> Iterator[None]:
    """A process with all its threads gets this share of a core at most. Raises Absent."""
    period_us = 20_000
    old, group = CGROUPS / "cpu", f"prg-{pid}"
    folder = (old if old.is_dir() else CGROUPS) / group
    try:
        folder.mkdir()
        if old.is_dir():
            (folder / "cpu.cfs_period_us").write_text(str(period_us))
            (folder / "cpu.cfs_quota_us").write_text(str(int(share * period_us)))
        else:
            (folder / "cpu.max").write_text(f"{int(share * period_us)} {period_us}")
        (folder / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise Absent(f"no control group to hold a gateway to a share of a core ({error})") from None
    try:
        yield
    finally:
        (folder.parent / "cgroup.procs").write_text(str(pid))
        folder.rmdir()


async def throughput(gateways: int, tritons: int, callers: int, slow_ms: int, core_share: float) -> float:
    """Right answers a second, of callers who each wait for theirs."""
    async with cluster(gateways, tritons, slow_ms, core_share) as running:
        callers_of = coloured(int(running.url.rpartition(":")[2]))
        callers_of.closed(callers, 3)
        return callers_of.closed(callers, SECONDS).rate


def by_gateways(engine: str) -> list[Row]:
    """One and two, where they are the limit."""
    rates = [asyncio.run(throughput(n, 1, CALLERS_OF_GATEWAYS, 0, CORE_SHARE)) for n in (1, 2)]
    done = f"a model that takes no time; each gateway has {CORE_SHARE:g} of a core; {CALLERS_OF_GATEWAYS} callers"
    figure = f"one {rates[0]:.0f}/s, two {rates[1]:.0f}/s: {rates[1] / rates[0]:.2f} times"
    return [Row("gateways", done, figure, f"{SCALES:g} times", rates[1] >= SCALES * rates[0])]


def by_tritons(engine: str) -> list[Row]:
    """One and two, where they are the limit, behind one and two gateways."""
    rates = {
        (gateways, tritons): asyncio.run(
            throughput(gateways, tritons, tritons * CALLERS_OF_A_TRITON, BATCH_MS, 0)
        )
        for gateways in (1, 2)
        for tritons in (1, 2)
    }
    done = f"a batch of up to 64 takes {BATCH_MS} ms, two at once a Triton; {CALLERS_OF_A_TRITON} callers a Triton"
    figure = "; ".join(
        f"{'one gateway' if n == 1 else 'two gateways'}: one {rates[n, 1]:.0f}/s, two {rates[n, 2]:.0f}/s"
        for n in (1, 2)
    )
    scaled = all(rates[n, 2] >= SCALES * rates[n, 1] for n in (1, 2))
    return [Row("Tritons", done, figure, f"{SCALES:g} times", scaled)]


async def killed() -> list[Row]:
    """One of two gateways, then one of two Tritons."""
    async with cluster(2, 2, SLOW_MS) as running:
        return [
            await killed_under_load(running.url, "gateway", running.gateways[0]),
            await killed_under_load(running.url, "Triton", running.tritons[0]),
        ]


async def killed_under_load(url: str, name: str, one: Gateway | TritonServer) -> Row:
    """Killed, and started again."""
    async with load(url, CALLERS) as seen:
        await asyncio.sleep(1)
        await asyncio.to_thread(one.kill)
        await asyncio.sleep(2)
        one.start(wait=False)
        await asyncio.to_thread(one.wait_ready)
        await asyncio.sleep(1)
    done = f"one of two {name}s killed (-9) and started again, {CALLERS} callers, {SLOW_MS} ms a batch"
    return Row(f"{name} killed", done, seen.summary(), "all right", not seen.bad())


async def restarted() -> list[Row]:
    """Both Tritons, one after the other."""
    async with cluster(2, 2, SLOW_MS) as running, load(running.url, CALLERS) as seen:
        for triton in running.tritons:
            await asyncio.sleep(1)
            await asyncio.to_thread(triton.stop)
            triton.start(wait=False)
            await asyncio.to_thread(triton.wait_ready)
            # Until the gateways have found it again; the other may only stop then.
            await asyncio.sleep(2)
    done = f"two Tritons behind two gateways, one restarted after the other, {CALLERS} callers, {SLOW_MS} ms a batch"
    return [Row("Tritons restarted", done, seen.summary(), "all right", not seen.bad())]


def run(engine: str) -> list[Row]:
    """All of them."""
    parts = {
        "gateways": by_gateways,
        "Tritons": by_tritons,
        "killed": lambda engine: asyncio.run(killed()),
        "gateways restarted": lambda engine: asyncio.run(rolling_restart(engine)),
        "Tritons restarted": lambda engine: asyncio.run(restarted()),
    }
    return [row for name, part in parts.items() for row in rows_of(name, part, engine)]


if __name__ == "__main__":
    sys.exit(main(__doc__, run, ("triton",)))
