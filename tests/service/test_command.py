"""prg-serve as a process."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.app import create_app, main
from service.auth import new_key
from service.server import Server, bind
from service.settings import Settings
from tests.real_triton.server import free_ports
from tests.service.conftest import IMAGE, eventually
from tests.tiny import write_tiny_entry


def test_the_gateway_imports_no_torch() -> None:
    code = "import sys, service.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_port_in_use_is_told_before_any_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_entry(tmp_path)
    monkeypatch.setenv("PRG_MODEL_REPOSITORY", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("PRG_PORT", str(other.getsockname()[1]))
        assert main([]) == 2
    said = capsys.readouterr()
    assert "PRG_PORT" in said.err
    assert said.out == ""


def test_a_port_that_another_has_begun_to_listen_on_ends_the_process(tmp_path: Path) -> None:
    """As where two are started at once: neither listens while it loads its models."""
    write_tiny_entry(tmp_path)
    first = asyncio.run(bind(Settings(model_repository=tmp_path, port=0)))
    settings = Settings(model_repository=tmp_path, port=first[0].getsockname()[1])
    second = asyncio.run(bind(settings))
    first[0].listen()
    with pytest.raises(SystemExit):
        Server(create_app(settings), settings).run(second)
    for bound in (*first, *second):
        bound.close()


def status(url: str) -> int:
    """Of its answer; 0 where nothing answers."""
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.slow
def test_the_command_serves_reloads_and_stops(tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m")
    [port] = free_ports(1)
    base = f"http://127.0.0.1:{port}"
    key, row = new_key("tester")
    keys = tmp_path / "keys.toml"
    keys.write_text(row)
    environment = os.environ | {
        "PRG_MODEL_REPOSITORY": str(tmp_path / "m"),
        "PRG_PORT": str(port),
        "PRG_DRAIN_S": "2",
        "PRG_API_KEYS_FILE": str(keys),
        "PRG_MAX_PIXEL": "1",
    }
    http = httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"})
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "service.app"], env=environment, stdout=log)
    try:
        eventually(lambda: status(f"{base}/health/ready") == 200, 60)
        assert http.post("/embed", files=IMAGE).json()["model_version"] == "1"
        write_tiny_entry(tmp_path / "m", versions=("1", "2"))
        keys.write_text("no longer TOML")  # must not keep the models from being looked at
        server.send_signal(signal.SIGHUP)
        eventually(lambda: http.get("/models/tiny").json()["default_version"] == "2", 30)
        assert http.post("/embed", files=IMAGE).json()["model_version"] == "2"
        with socket.create_connection(("127.0.0.1", port)) as caller:  # hangs up amid its body
            head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99"
            caller.sendall(f"{head}\r\n\r\nabc".encode())
        assert http.post("/embed", files=IMAGE).status_code == 200
        server.send_signal(signal.SIGTERM)
        eventually(lambda: status(f"{base}/health/ready") == 503, 2)
        assert http.post("/embed", files=IMAGE).status_code == 200
        assert server.wait(20) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    [warning] = [e for e in events if e["event"] == "unknown setting"]
    assert (warning["variable"], warning["perhaps_meant"]) == ("PRG_MAX_PIXEL", "PRG_MAX_PIXELS")
    assert {"serving", "request", "model loaded"} <= {e["event"] for e in events}
    [failed] = [e for e in events if e["level"] == "error"]
    assert (failed["event"], failed["reason"].split(":")[0]) == ("reload failed", "PRG_API_KEYS_FILE")
    assert "reloaded" not in {e["event"] for e in events}
    http.close()
