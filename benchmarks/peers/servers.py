"""The servers that are compared: where each comes from, how it starts, what it takes and answers."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.generator import Load, post
from benchmarks.trust.stage import family
from tests.real_triton.server import free_ports

ENVIRONMENTS = Path(".venv-peers")
PINNED = ("torch", "numpy", "pillow", "tritonclient[grpc]")
"""In the versions of this environment, and PyTorch in its build."""
SHARED = ("pydantic",)
"""What reading an entry needs beside those; in a version that suits the peer."""
START_S = 90.0
WARM_CALLERS = 64

Body = tuple[str, bytes]
"""Content type and content."""


def raw(png: bytes) -> Body:
    return "image/png", png


def multipart(field: str) -> Callable[[bytes], Body]:
    head = f'--peers\r\nContent-Disposition: form-data; name="{field}"; filename="image.png"\r\n'
    head += "Content-Type: image/png\r\n\r\n"
    return lambda png: ("multipart/form-data; boundary=peers", head.encode() + png + b"\r\n--peers--\r\n")


def v2(png: bytes) -> Body:
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [base64.b64encode(png).decode()]}
    return "application/json", json.dumps({"inputs": [tensor]}).encode()


@dataclass(frozen=True)
class Server:
    """One side of the comparison."""

    name: str
    packages: tuple[str, ...]
    """Of its environment; none: it runs in this one."""
    command: str
    """What follows `python -m`."""
    path: str
    body: Callable[[bytes], Body]
    vector: Callable[[Any], list[float]]
    """Out of an answer's JSON."""

    @property
    def label(self) -> str:
        """With its version."""
        return f"{self.name} {self.packages[0].partition('==')[2]}" if self.packages else self.name


SERVERS = (
    Server("prg-serve", (), "benchmarks.peers.ours", "/embed", raw, lambda a: a["data"][0]["embedding"]),
    Server(
        "LitServe",
        ("litserve==0.2.19", "python-multipart==0.0.34"),
        "benchmarks.peers.on_litserve",
        "/predict",
        multipart("image"),
        lambda a: a["embedding"],
    ),
    Server(
        "BentoML",
        ("bentoml==1.4.40",),
        "bentoml serve benchmarks.peers.on_bentoml:Embed --host 127.0.0.1 --port {port}",
        "/embed",
        multipart("images"),
        lambda a: a[0],
    ),
    Server(
        "MLServer",
        # Its worker does not start under a newer uvloop.
        ("mlserver==1.7.1", "uvloop==0.21.0"),
        "benchmarks.peers.on_mlserver",
        "/v2/models/embed/infer",
        v2,
        lambda a: a["outputs"][0]["data"],
    ),
    Server(
        "Ray Serve", ("ray[serve]==2.60.0",), "benchmarks.peers.on_ray", "/", raw, lambda a: a["embedding"]
    ),
)


def environment(server: Server) -> Path | None:
    """The python that runs a server; None where it can't be installed."""
    if not server.packages:
        return Path(sys.executable)
    folder = (ENVIRONMENTS / server.name.replace(" ", "-").lower()).absolute()
    python, done = folder / "bin" / "python", folder / "installed"
    torch, *pinned = (f"{name}=={version(name.partition('[')[0])}" for name in PINNED)
    wanted = [torch, *pinned, *SHARED, *server.packages]
    if done.exists() and done.read_text().split() == wanted:
        return python
    print(f"installing {' '.join(server.packages)} ...", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    index = f"https://download.pytorch.org/whl/{torch.partition('+')[2]}"
    # By itself and before what depends on it, which would choose another build: one that pip knows of, or the index's.
    if not (pip(python, torch) or pip(python, torch, "--index-url", index)) or not pip(python, *wanted):
        print(f"{server.label} is skipped: it could not be installed", file=sys.stderr)
        return None
    done.write_text(" ".join(wanted))
    return python


def pip(python: Path, *arguments: str) -> bool:
    """Install these."""
    return not subprocess.run([python, "-m", "pip", "install", "-q", *arguments]).returncode


@contextlib.contextmanager
def running(
    server: Server, python: Path, entry: Path, engine: str, pngs: list[bytes]
) -> Iterator[tuple[Load, int]]:
    """A started server that answers, with its process id; it and all its processes are ended afterwards."""
    [port] = free_ports(1)
    settings = {"PEERS_PORT": str(port), "PEERS_ENGINE": engine, "PEERS_ENTRY": str(entry.absolute())}
    command = [str(python), "-m", *server.command.format(port=port).split()]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
        load = Load(port, [post(server.path, *server.body(png)) for png in pngs])
        try:
            until = time.monotonic() + START_S
            while not answers(port, load):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"{server.name} does not answer: {log.read()[-3000:].decode()}")
                time.sleep(0.2)
            load.closed(WARM_CALLERS, 1)
            yield load, process.pid
        finally:
            load.close()
            end(process.pid)
            process.wait()


def answers(port: int, load: Load) -> bool:
    """Whether it answers one caller."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return bool(load.closed(1, 0.1).good)
    return False


def end(pid: int) -> None:
    """A process and all that it started, which may be in sessions of their own."""
    try:
        processes = family(pid)
    except psutil.NoSuchProcess:
        # It ended by itself.
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
