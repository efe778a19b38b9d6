"""A real tritonserver for tests: the binary of the PyPI wheel nvidia-pytriton, run directly."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

STAND_IN = Path(__file__).with_name("pytorch_backend.py")


def find_server() -> Path | None:
    """The folder `tritonserver` of the wheel, if it is installed."""
    spec = importlib.util.find_spec("pytriton")
    roots = [Path(place) / "tritonserver" for place in (spec and spec.submodule_search_locations) or ()]
    return next((root for root in roots if (root / "bin" / "tritonserver").is_file()), None)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class TritonServer:
    """One server on a model repository; its ports stay the same over restarts."""

    def __init__(self, repository: Path, work: Path) -> None:
        self.repository = repository
        self.work = work
        self.http, self.grpc, self.metrics = free_ports(3)
        self.process: subprocess.Popen[bytes] | None = None
        self.options: tuple[str, ...] = ()
        """More of its command line."""
        self.log = work / "tritonserver.log"
        root = find_server()
        assert root is not None
        self.root = root
        self._backends(work / "backends")

    @property
    def url(self) -> str:
        """Of gRPC."""
        return f"127.0.0.1:{self.grpc}"

    def _backends(self, folder: Path) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "python").mkdir(parents=True, exist_ok=True)
        (folder / "pytorch").mkdir(exist_ok=True)
        # Copied: links out of the folder are refused to a Python-based backend.
        for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
            shutil.copy(self.root / "backends" / "python" / name, folder / "python")
        stub = self.root / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, folder / "python")
        shutil.copy(STAND_IN, folder / "pytorch" / "model.py")

    def start(self, wait: bool = True) -> "TritonServer":
        """Start it; returns once it is ready."""
        command = [
            str(self.root / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self.work / 'backends'}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--exit-on-error=false",
            "--strict-readiness=false",
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--exit-timeout-secs=5",
            "--metrics-interval-ms=200",
            *self.options,
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            *(f"--{kind}-port={getattr(self, kind)}" for kind in ("http", "grpc", "metrics")),
        ]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where a stub finds torch
            "LD_LIBRARY_PATH": str(self.root.parents[1] / "nvidia_pytriton.libs"),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, seconds: float = 60) -> None:
        """Until it says that it is ready; with what it wrote, if it does not."""
        until = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > until or self.process is None or self.process.poll() is not None:
                raise AssertionError(f"tritonserver is not ready: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def ready(self) -> bool:
        """What its own readiness says."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2).status_code == 200
        return False

    def counters(self, name: str) -> dict[str, float]:
        """A metric of its own, by model."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics}/metrics").text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(name + "{"):
                model = line.split('model="')[1].split('"')[0]
                found[model] = found.get(model, 0) + float(line.rsplit(" ", 1)[1])
        return found

    def stubs(self) -> list[int]:
        """Process ids of its model processes."""
        assert self.process
        command = ["pgrep", "-g", str(self.process.pid), "-f", "triton_python_backend_stub"]
        found = subprocess.run(command, capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> None:
        """kill -9, of the whole group: orphaned stubs stay behind otherwise."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._signal(signal.SIGTERM, group=False)

    def _signal(self, number: signal.Signals, group: bool = True) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None
