"""Stop, reload, new weights and a rolling restart, each under load: no request is lost or answered wrong.

drain            SIGTERM with PRG_DRAIN_S; the callers stop as soon as /health/ready says no, as a balancer would
stop at once     SIGTERM without it; what the service's log has was answered, and who came too late got no connection
reload           SIGHUP again and again
new version      a second version is written into the repository, then SIGHUP; then a third, and the first is removed
replaced         the version that answers is removed too; who was on the way to it may be refused
rolling restart  two gateways behind nginx, one restarted after the other
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx

from benchmarks.trust.load import client, load
from benchmarks.trust.rows import Absent, Row, main, rows_of
from benchmarks.trust.stage import Gateway, staged
from tests.real_triton.server import free_ports

CALLERS = 16
SLOW_MS = 200
"""How long a request takes, so that many are in flight."""
DRAIN_S = 2.0
RELOADS = 5
STOPPED = (0, -signal.SIGTERM)
"""uvicorn ends by the signal itself, once it is done."""
NGINX = """
daemon off;
worker_processes 1;
{user}
pid {work}/nginx.pid;
error_log {work}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {work}/nginx-body;
    proxy_temp_path {work}/nginx-proxy;
    fastcgi_temp_path {work}/nginx-fastcgi;
    uwsgi_temp_path {work}/nginx-uwsgi;
    scgi_temp_path {work}/nginx-scgi;
    upstream prg {{
        {servers}
        keepalive 16;
        keepalive_timeout 60s;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://prg;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream error non_idempotent;
        }}
    }}
}}
"""


def run(engine: str) -> list[Row]:
    """All of them."""
    parts: dict[str, Callable[[str], list[Row]]] = {
        "drain": lambda engine: asyncio.run(drain(engine)),
        "stop at once": lambda engine: asyncio.run(stop_at_once(engine)),
        "reload": lambda engine: asyncio.run(reloads(engine)),
        "rolling restart": lambda engine: asyncio.run(rolling_restart(engine)),
    }
    return [row for name, part in parts.items() for row in rows_of(name, part, engine)]


def slowly(engine: str) -> dict[str, object]:
    """Settings by which a request takes SLOW_MS with the embedded engine, whose batches wait so long."""
    return {"max_delay_ms": SLOW_MS} if engine == "embedded" else {}


async def drain(engine: str) -> list[Row]:
    """SIGTERM with PRG_DRAIN_S."""
    with staged(engine, **slowly(engine), drain_s=DRAIN_S) as stage:
        stage.slow(SLOW_MS)
        gateway, open_to = stage.gateway, asyncio.Event()
        open_to.set()
        async with load(gateway.url, CALLERS, open_to=open_to) as seen, client(gateway.url) as http:
            await asyncio.sleep(2)
            told = time.monotonic()
            gateway.signal(signal.SIGTERM)
            while (await http.get("/health/ready")).status_code == 200:
                await asyncio.sleep(0.02)
            flipped = time.monotonic() - told
            open_to.clear()
            code = await asyncio.to_thread(gateway.process.wait, 60)
            taken = time.monotonic() - told
        figure = f"not ready after {flipped * 1e3:.0f} ms, exit {code} after {taken:.1f} s; {seen.summary()}"
    passed = not seen.bad() and code in STOPPED and flipped < DRAIN_S / 2
    return [
        Row(
            "drain",
            f"SIGTERM with PRG_DRAIN_S={DRAIN_S:g}, {CALLERS} callers until it is not ready",
            figure,
            "all right",
            passed,
        )
    ]


async def stop_at_once(engine: str) -> list[Row]:
    """SIGTERM without PRG_DRAIN_S."""
    with staged(engine, **slowly(engine)) as stage:
        stage.slow(SLOW_MS)
        gateway = stage.gateway
        async with load(gateway.url, CALLERS) as seen:
            await asyncio.sleep(2)
            gateway.signal(signal.SIGTERM)
            code = await asyncio.to_thread(gateway.process.wait, 60)
        admitted = {line["request_id"] for line in gateway.events() if line["event"] == "request"}
        lost = [o for o in seen.bad() if o.kind != "refused" and o.request_id in admitted]
        figure = f"{seen.summary()}; admitted and lost: {len(lost)}; exit {code}"
    passed = not lost and not seen.count("wrong", "failed") and code in STOPPED
    limit = "none admitted and lost, none wrong"
    return [Row("stop at once", f"SIGTERM, {CALLERS} callers who go on", figure, limit, passed)]


async def reloads(engine: str) -> list[Row]:
    """SIGHUP, with and without something new."""
    rows: list[Row] = []
    with staged(engine) as stage:
        gateway = stage.gateway

        async def under_load(
            name: str, done: str, *published: tuple[str, ...], may_refuse: bool = False
        ) -> None:
            async with load(gateway.url, CALLERS) as seen:
                for versions in published:
                    await asyncio.sleep(0.5)
                    if versions:
                        stage.publish(*versions)
                    await asyncio.to_thread(gateway.hang_up)
                await asyncio.sleep(1)
            newest = max(published[-1], default="1")
            answers = ", ".join(f"{n:,} by version {v}" for v, n in sorted(seen.versions().items()))
            bad = [outcome for outcome in seen.bad() if not (may_refuse and outcome.kind == "refused")]
            passed = not bad and seen.outcomes[-1].said == newest
            limit = f"all right{' or refused' if may_refuse else ''}, at last by version {newest}"
            rows.append(Row(name, done, f"{seen.summary()}; {answers}", limit, passed))

        callers = f"{CALLERS} callers"
        await under_load("reload", f"SIGHUP {RELOADS} times, {callers}", *[()] * RELOADS)
        await under_load("new version", f"version 2 beside 1, SIGHUP, {callers}", ("1", "2"))
        await under_load("new version, old one removed", f"3 comes, 1 goes, SIGHUP, {callers}", ("2", "3"))
        await under_load("replaced", f"4 in place of 2 and 3, SIGHUP, {callers}", ("4",), may_refuse=True)
    return rows


async def rolling_restart(engine: str) -> list[Row]:
    """Two gateways behind nginx."""
    with staged(engine, drain_s=DRAIN_S) as stage:
        second = stage.another().start()
        try:
            async with nginx(stage.work, stage.gateway, second) as url, load(url, CALLERS) as seen:
                for gateway in (stage.gateway, second):
                    await asyncio.sleep(1)
                    gateway.signal(signal.SIGTERM)
                    await asyncio.to_thread(gateway.process.wait, 60)
                    gateway.start(wait=False)
                    await asyncio.to_thread(gateway.wait_ready)
                await asyncio.sleep(1)
        finally:
            second.stop()
    done = f"two gateways behind nginx, PRG_DRAIN_S={DRAIN_S:g}, one restarted after the other, {CALLERS} callers"
    return [Row("rolling restart", done, seen.summary(), "all right", not seen.bad())]


@contextlib.asynccontextmanager
async def nginx(work: Path, *gateways: Gateway) -> AsyncIterator[str]:
    """The address of an nginx before these gateways. Raises Absent."""
    if shutil.which("nginx") is None:
        raise Absent("no nginx: apt-get install nginx")
    [port] = free_ports(1)
    servers = " ".join(f"server 127.0.0.1:{gateway.port} max_fails=0;" for gateway in gateways)
    # Its workers would be another user, who may not enter the folder.
    user = "user root;" if os.getuid() == 0 else ""
    text = NGINX.format(work=work, servers=servers, port=port, user=user)
    (work / "nginx.conf").write_text(text)
    process = subprocess.Popen(
        ["nginx", "-e", str(work / "nginx.log"), "-c", str(work / "nginx.conf")], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with client(url) as http:
            for _ in range(100):
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get("/health/ready")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
