"""docker compose up, for real: images built, photos posted from outside, containers killed, every query answered."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from entry.images import load_image
from entry.runner import Runner
from service.readiness import FRESH_S
from service.settings import Settings
from service.telemetry import Metrics
from tests.real_triton.server import find_server, free_ports
from tests.tiny import write_tiny_entry

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MODEL = ROOT / "model_repository" / "prg-everyday"


REPLICAS = "docker/replicas.yml"


def compose_file() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return table


class Loader(yaml.SafeLoader):
    """Reads a file with Compose's own tags, such as !reset, as if it were without them."""


Loader.add_multi_constructor(
    "!",
    lambda loader, _, node: loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else None,
)


def replicas_file() -> dict[str, Any]:
    table: dict[str, Any] = yaml.load((ROOT / REPLICAS).read_text("utf-8"), Loader)
    return table


NEEDED = {
    "no Docker Engine: DOCKER_HOST is not set": os.environ.get("DOCKER_HOST"),
    "no docker command": shutil.which("docker"),
    "no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0": find_server(),
}
missing = "; ".join(reason for reason, found in NEEDED.items() if not found)
needs_engine = pytest.mark.skipif(bool(missing), reason=missing)


def run(*command: str, **more: Any) -> str:
    """Run a command in the checkout; its output, or an error that shows it."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False, **more)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def rules() -> list[dict[str, Any]]:
    """Of alerts."""
    text = (ROOT / "docker" / "prometheus" / "alerts.yml").read_text()
    found: list[dict[str, Any]] = yaml.safe_load(text)["groups"][0]["rules"]
    return found


def eventually(check: Callable[[], Any], seconds: float) -> Any:
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if found := check():
                return found
        assert time.monotonic() < until, "did not come true"
        time.sleep(0.2)


class Stack:
    """The composed services, on free ports."""

    def __init__(self, folder: Path, *more: str) -> None:
        gateway, prometheus = free_ports(2)
        self.gateway = f"http://127.0.0.1:{gateway}"
        self.prometheus = f"http://127.0.0.1:{prometheus}"
        override = folder / "override.yml"
        site = sysconfig.get_paths()["purelib"]
        triton: dict[str, Any] = {"volumes": [f"{site}:/site:ro"], "working_dir": "/tmp"}
        tritons = ["triton-cpu"]
        if REPLICAS in more:
            # Two of them would warm up the shipped models for minutes. Under the name of the default one.
            write_tiny_entry(folder / "models", MODEL.name)
            triton["volumes"].append(f"{folder / 'models'}:/models:ro")
            tritons.append("triton-cpu-2")
        override.write_text(yaml.safe_dump({"services": dict.fromkeys(tritons, triton)}))
        self.environment = os.environ | {
            "PRG_PUBLISH": f"127.0.0.1:{gateway}",
            "PROMETHEUS_PUBLISH": f"127.0.0.1:{prometheus}",
            "OMP_NUM_THREADS": "1",
        }
        files = ("docker-compose.yml", *more, str(override))
        self.files = (
            "-p",
            f"prg-test-{os.getpid()}-{gateway}",
            *(word for file in files for word in ("-f", file)),
        )

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", *self.files, *arguments, env=self.environment)

    def up(self) -> None:
        """Start what is not running; returns when all of it is healthy."""
        self.compose("up", "--wait", "--no-build", "--pull", "never")

    def query(self, expression: str) -> list[dict[str, Any]]:
        response = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}, timeout=10)
        answer = response.json()
        assert answer["status"] == "success", (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The gateway's own, and stand-ins under the names of those that no registry gives here."""
    services = replicas_file()["services"] | compose_file()["services"]

    def default_image(text: str) -> str:
        return re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", text)

    context = tmp_path_factory.mktemp("context")
    shutil.copytree(HERE / "standins", context / "standins")
    shutil.copy(ROOT / "tests" / "real_triton" / "pytorch_backend.py", context)
    build = ("docker", "build", "--network", "host", "-q", "-t")
    run(*build, services["gateway"]["image"], "-f", "docker/gateway.Dockerfile", ".")
    for service, name in (("triton-cpu", "triton"), ("prometheus", "prometheus"), ("proxy", "nginx")):
        standin = str(context / "standins" / f"{name}.Dockerfile")
        run(*build, default_image(services[service]["image"]), "-f", standin, str(context))


@contextlib.contextmanager
def composed(folder: Path, *more: str) -> Iterator[Stack]:
    """`docker compose up --wait`, with these files beside our own."""
    stack = Stack(folder, *more)
    try:
        stack.up()
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "20", "triton-cpu", "prometheus"))
        stack.compose("down", "-v", "--timeout", "5")


@pytest.fixture(scope="module")
def stack(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with composed(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((400, 300)).save(buffer, "JPEG")
    return buffer.getvalue()


@needs_engine
def test_answers_are_those_of_the_embedded_engine(stack: Stack) -> None:
    photos = [photo(i) for i in range(70)]
    files = [("files", (f"{i}.jpg", data)) for i, data in enumerate(photos[:64])]
    levels = {"t_end": ["0.8", "0.3"]}
    answer = httpx.post(f"{stack.gateway}/embed", files=files, params=levels, timeout=60).json()
    runner = Runner(MODEL)
    prg = runner.entry.prg
    images = np.stack([load_image(data, prg.image) for data in photos[:64]])
    for k, level in enumerate((0.8, 0.3)):
        expected = runner.run(images, np.full(64, level, np.float32))["EMBEDDING"]
        found = np.array([item["embeddings"][k]["embedding"] for item in answer["data"]])
        assert (np.abs(found - expected).max(1) / np.abs(expected).max(1)).max() < prg.tolerance.relative
    assert httpx.post(f"{stack.gateway}/classify", files=files[:1]).status_code == 200


@needs_engine
def test_the_gateway_runs_without_root_torch_or_a_writable_disk(stack: Stack) -> None:
    assert stack.compose("exec", "-T", "gateway", "id", "-u").strip() == "65532"
    code = "import importlib.util as u; print(u.find_spec('torch'))"
    assert stack.compose("exec", "-T", "gateway", "python", "-c", code).strip() == "None"
    writing = "import os\ntry:\n open('/x', 'w')\nexcept OSError as e:\n print(e.strerror)"
    assert "Read-only" in stack.compose("exec", "-T", "gateway", "python", "-c", writing)


@needs_engine
def test_killed_containers_come_back(stack: Stack) -> None:
    files = [("files", ("a.jpg", photo(1)))]

    def status() -> int:
        return httpx.post(f"{stack.gateway}/embed", files=files, timeout=40).status_code

    assert status() == 200
    stack.compose("kill", "-s", "KILL", "triton-cpu")
    response = httpx.post(f"{stack.gateway}/embed", files=files, timeout=40)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    stack.compose("start", "triton-cpu")
    eventually(lambda: status() == 200, 60)
    stack.compose("kill", "-s", "KILL", "gateway")
    stack.compose("start", "gateway")
    eventually(lambda: status() == 200, 60)


@needs_engine
def test_the_gateway_restarts_itself_after_a_reload(stack: Stack) -> None:
    """`docker compose kill -s HUP` would switch its restart policy off."""
    reload = "kill -HUP 1"
    for page in ("docs/operations.md", "docker/keys/README.md"):
        assert f"docker compose exec gateway sh -c '{reload}'" in (ROOT / page).read_text()
    stack.compose("exec", "-T", "gateway", "sh", "-c", reload)
    eventually(lambda: '"reloaded"' in stack.compose("logs", "--no-color", "--tail", "50", "gateway"), 60)
    container = stack.compose("ps", "-q", "gateway").strip()

    def started() -> str:
        return run("docker", "inspect", "-f", "{{.State.Running}} {{.State.StartedAt}}", container).strip()

    before = started()
    stack.compose("exec", "-T", "gateway", "sh", "-c", "kill -TERM 1")
    eventually(lambda: started() != before and started().startswith("true"), 60)
    eventually(lambda: httpx.get(f"{stack.gateway}/health/ready").status_code == 200, 60)


def post_again_and_again(url: str, stop: threading.Event) -> list[str]:
    """What came of each request."""
    seen = []
    with httpx.Client(base_url=url, timeout=40) as http:
        while not stop.is_set():
            try:
                answer = http.post("/embed", content=photo(3), headers={"content-type": "image/jpeg"})
                seen.append(f"{answer.status_code} {answer.text if answer.status_code != 200 else ''}")
            except httpx.HTTPError as error:
                seen.append(repr(error))
    return seen


@needs_engine
@pytest.mark.slow
def test_of_two_gateways_and_two_tritons_one_may_go(images: None, tmp_path: Path) -> None:
    """Killed or restarted, no request fails."""
    stop = threading.Event()
    with composed(tmp_path, REPLICAS) as stack, ThreadPoolExecutor(4) as threads:
        callers = [threads.submit(post_again_and_again, stack.gateway, stop) for _ in range(4)]
        try:
            for service in ("gateway", "triton-cpu"):
                stack.compose("kill", "-s", "KILL", service)
                time.sleep(2)
                stack.up()
            for service in ("gateway", "gateway-2"):
                stack.compose("restart", service)
                stack.up()
            time.sleep(1)
        finally:
            stop.set()
        seen = Counter(line for caller in callers for line in caller.result())
        targets = httpx.get(f"{stack.prometheus}/api/v1/targets").json()["data"]["activeTargets"]
    assert seen.keys() == {"200 "}, seen
    assert [target["health"] for target in targets] == ["up"] * 4


def expressions() -> list[tuple[str, str]]:
    """(where, query) of every panel and alert, those of a GPU left out: there is none here."""
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "prg.json").read_text())
    found = [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p.get("targets", ())]
    for rule in rules():
        sides = re.split(r" (?:==|>) ", rule["expr"])
        assert len(sides) == 2, rule["expr"]
        found += [(rule["alert"], side) for side in sides if not re.fullmatch(r"[\d.]+", side)]
    return [(where, query) for where, query in found if "nv_gpu" not in query]


@needs_engine
def test_every_query_of_dashboard_and_alerts_has_an_answer(stack: Stack) -> None:
    files = [("files", ("a.jpg", photo(2)))]
    begun = time.monotonic()
    while time.monotonic() - begun < 20:  # rates need several scrapes
        assert httpx.post(f"{stack.gateway}/embed", files=files, timeout=40).status_code == 200
        time.sleep(0.2)

    def unanswered() -> list[tuple[str, str]]:
        return [(where, query) for where, query in expressions() if not stack.query(query)]

    with contextlib.suppress(AssertionError):
        eventually(lambda: not unanswered(), 30)
    assert unanswered() == []
    targets = httpx.get(f"{stack.prometheus}/api/v1/targets").json()["data"]["activeTargets"]
    assert {t["labels"]["job"]: t["health"] for t in targets} == {"gateway": "up", "triton": "up"}
    groups = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for rule in groups[0]["rules"]} == {"ok"}


@needs_engine
@pytest.mark.parametrize("profiles", ["cpu", "gpu", "cpu,grafana"])
def test_the_compose_file_is_valid(profiles: str) -> None:
    environment = os.environ | {"COMPOSE_PROFILES": profiles}
    config = json.loads(run("docker", "compose", "config", "--format", "json", env=environment))
    triton = config["services"][f"triton-{'gpu' if profiles == 'gpu' else 'cpu'}"]
    assert triton["networks"]["default"]["aliases"] == ["triton"]
    assert triton["volumes"][0]["read_only"]
    both = ("-f", "docker-compose.yml", "-f", REPLICAS)
    config = json.loads(run("docker", "compose", *both, "config", "--format", "json", env=environment))
    published = [
        (name, port["target"])
        for name in config["services"]
        for port in config["services"][name].get("ports", ())
    ]
    assert ("proxy", 8000) in published
    assert not [name for name, _ in published if name.startswith(("gateway", "triton"))]
    tritons = [service for name, service in config["services"].items() if name.startswith("triton")]
    assert len(tritons) == 2
    if profiles == "gpu":
        devices = [t["deploy"]["resources"]["reservations"]["devices"] for t in tritons]
        assert [[d["device_ids"] for d in own] for own in devices] == [[["0"]], [["1"]]]
    lite = ("-f", "docker-compose.yml", "-f", "docker/gpu-lite.yml")
    config = json.loads(run("docker", "compose", *lite, "config", "--format", "json"))
    assert config["services"].keys() == {"gateway", "prometheus"}


def test_every_setting_reaches_the_gateway() -> None:
    """But those that the image fixes, and those of the embedded engine alone."""
    fixed = {"host", "port"}
    embedded = {"model_repository", "max_batch", "max_delay_ms", "device", "precision", "compile_cache"}
    environment = compose_file()["services"]["gateway"]["environment"]
    passed = {name: value for name, value in environment.items() if name.startswith("PRG_")}
    assert passed.keys() == {
        f"PRG_{name.upper()}" for name in Settings.model_fields.keys() - fixed - embedded
    }
    chosen = {"PRG_ENGINE": "triton", "PRG_TRITON_URL": "${PRG_TRITON_URL:-triton:8001}"}
    assert passed == {name: f"${{{name}:-}}" for name in passed} | chosen


def test_replicas_are_named_alike_everywhere() -> None:
    """In the compose file, nginx and Prometheus; and nginx lets through what the gateway does."""
    table = replicas_file()
    services, defaults = table["services"], Settings()
    addresses = re.findall(r"triton-\d(?=:8001)", table["x-gateway"]["environment"]["PRG_TRITON_URL"])
    aliases = [table[key]["networks"]["default"]["aliases"] for key in ("x-first", "x-second")]
    assert [[address] for address in addresses] == aliases
    assert {
        name.removeprefix("PRG_").lower() for name in table["x-gateway"]["environment"]
    } <= Settings.model_fields.keys()
    scraped, one = (
        yaml.safe_load((ROOT / "docker" / "prometheus" / name).read_text("utf-8"))
        for name in ("replicas.yml", "prometheus.yml")
    )
    targets = [job["static_configs"].pop() for job in scraped["scrape_configs"]]
    assert targets == [
        {"targets": [f"{name}:8000" for name in services if name.startswith("gateway")]},
        {"targets": [f"{name}:8002" for name in addresses]},
    ]
    for job in one["scrape_configs"]:
        job["static_configs"].clear()
    assert scraped == one
    text = (ROOT / "docker" / "nginx" / "replicas.conf").read_text("utf-8")
    [gateways] = table["x-gateway"]["networks"]["default"]["aliases"]
    assert f"{gateways}:8000" in text
    assert f"client_max_body_size {defaults.max_body_bytes >> 20}m;" in text
    [patience] = re.findall(r"proxy_read_timeout (\d+)s", text)
    assert int(patience) > defaults.request_timeout_s
    if nginx := shutil.which("nginx"):
        run(nginx, "-t", "-e", "stderr", "-c", str(ROOT / "docker" / "nginx" / "replicas.conf"))


def test_triton_publishes_no_port_and_reads_only() -> None:
    services = compose_file()["services"]
    for name in ("triton-cpu", "triton-gpu"):
        assert "ports" not in services[name]
        assert all(volume.endswith(":ro") for volume in services[name]["volumes"])
    assert (ROOT / ".env").read_text().splitlines()[-1] == "COMPOSE_PROFILES=cpu"


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool")
def test_every_alert_fires_when_it_must() -> None:
    folder = ROOT / "docker" / "prometheus"
    run("promtool", "check", "config", "--syntax-only", str(folder / "prometheus.yml"))
    run("promtool", "test", "rules", str(folder / "alerts_test.yml"))
    tested = (folder / "alerts_test.yml").read_text()
    assert set(re.findall(r"alertname: (\w+)", tested)) == {rule["alert"] for rule in rules()}


def test_the_operations_page_has_every_alert_and_metric_and_says_when_not_ready_fires() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules():
        assert f"| {rule['alert']} |" in page
    for family in Metrics().registry.collect():
        assert family.name in page, family.name
    every = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())["global"]
    named = [next(rule["for"] for rule in rules() if rule["alert"] == "NotReady")]
    named += [every["scrape_interval"], every["evaluation_interval"]]
    waits, scrape, evaluation = (int(text.removesuffix("s")) for text in named)
    soonest = int(FRESH_S) + waits
    [row] = re.findall(r"^\| NotReady \|.*", page, re.MULTILINE)
    seconds = [soonest, soonest + scrape + evaluation, int(FRESH_S), waits, scrape]
    assert [int(number) for number in re.findall(r"\d+", row)[:5]] == seconds
