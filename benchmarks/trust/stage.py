"""A gateway, and a Triton where the engine is one, each in a process of its own."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from benchmarks.trust.rows import Absent
from prg.machine import device_name
from tests.real_triton.server import TritonServer, find_server, free_ports
from tests.tiny import write_tiny_entry

NO_TRITON = "no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0"
PATIENCE_S = 90.0


def machine() -> str:
    """What this runs on."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{device_name(torch.device('cpu'))}, {memory:.0f} GiB, Python {platform.python_version()}"


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    own = psutil.Process(pid)
    return [own, *own.children(recursive=True)]


def processor_s(pid: int) -> float:
    """Seconds of a core that a process and all that it started have used so far."""
    return sum(sum(process.cpu_times()[:2]) for process in family(pid))


@dataclass(frozen=True)
class Usage:
    """What a service's processes hold."""

    memory_mb: float
    files: int
    threads: int


class Gateway:
    """prg-serve in a process of its own; its port stays the same over restarts."""

    def __init__(self, work: Path, settings: dict[str, object]) -> None:
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = work / f"gateway-{self.port}.log"
        chosen = {f"PRG_{name.upper()}": str(value) for name, value in settings.items()}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRG_")}
        self._environment = inherited | {"PRG_PORT": str(self.port)} | chosen
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> "Gateway":
        """Start it; returns once it is ready."""
        command = [sys.executable, "-m", "service.app"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        if wait:
            self.wait_ready()
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def ready(self) -> bool:
        """What /health/ready says; False where nobody answers."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health/ready", timeout=5, trust_env=False).status_code == 200
        return False

    def wait_ready(self) -> None:
        """Until it is ready."""
        until = time.monotonic() + PATIENCE_S
        while not self.ready():
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError(f"the gateway is not ready: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def events(self) -> list[dict[str, object]]:
        """The lines of its log that are JSON."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def hang_up(self) -> None:
        """SIGHUP; returns when the log says that the repository was read again."""
        before, until = self._reloads(), time.monotonic() + PATIENCE_S
        self.signal(signal.SIGHUP)
        while self._reloads() == before:
            if time.monotonic() > until:
                raise RuntimeError("the service did not say that it reloaded")
            time.sleep(0.1)

    def _reloads(self) -> int:
        return sum(line["event"] in ("reloaded", "reload failed") for line in self.events())

    def usage(self) -> Usage:
        """What it and its decoding processes hold now."""
        all_of_it = family(self.process.pid)
        return Usage(
            sum(process.memory_info().rss for process in all_of_it) / 1e6,
            sum(process.num_fds() for process in all_of_it),
            sum(process.num_threads() for process in all_of_it),
        )

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it, whatever it takes."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Stage:
    """A model repository, who serves it, and a folder for whatever else."""

    work: Path
    repository: Path
    triton: TritonServer | None
    gateway: Gateway
    settings: dict[str, object]

    def another(self, **settings: object) -> Gateway:
        """A second gateway, with the first one's settings but for these, not yet started."""
        return Gateway(self.work, self.settings | settings)

    def slow(self, ms: int) -> None:
        """Every batch takes so long from now on, where Triton computes it."""
        (self.repository / "tiny" / "slow-ms").write_text(str(ms))

    def publish(self, *versions: str) -> None:
        """Replace the tiny model's versions, as an export does: whole files, the configuration last."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            new, old = write_tiny_entry(Path(folder), versions=versions), self.repository / "tiny"
            for version in versions:
                if not (old / version).exists():
                    (new / version).rename(old / version)
            (new / "config.pbtxt").replace(old / "config.pbtxt")
            for folder_ in old.iterdir():
                if folder_.is_dir() and folder_.name not in versions:
                    shutil.rmtree(folder_)


@contextlib.contextmanager
def staged(engine: str, **settings: object) -> Iterator[Stage]:
    """A started service on one tiny model, with these settings. Raises Absent."""
    with tempfile.TemporaryDirectory(prefix="prg-trust-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        repository = work / "models"
        write_tiny_entry(repository)
        triton = None
        if engine == "triton":
            if find_server() is None:
                raise Absent(NO_TRITON)
            triton = TritonServer(repository, work)
            stack.callback(triton.kill)
            triton.start()
            settings |= {"engine": "triton", "triton_url": triton.url}
        else:
            settings |= {"model_repository": repository}
        gateway = Gateway(work, settings)
        stack.callback(gateway.stop)
        gateway.start()
        yield Stage(work, repository, triton, gateway, settings)
