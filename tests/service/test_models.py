"""What /models says of each entry, and which of them a request is for."""

import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.service.conftest import IMAGE, Start, engine_of, eventually, rescan
from tests.tiny import tiny_digest, write_tiny_entry


def test_models(client: TestClient) -> None:
    listing = client.get("/models").json()
    assert listing["default"] == "tiny"
    [item] = listing["data"]
    assert item == client.get("/models/tiny").json()
    assert item["state"] == "ready"
    assert item["features"] == {
        "state": {"dim": 768},
        "hidden": {"dim": 5, "layers": ["middle_block"], "pooling": ["mean"]},
        "embedding": {"dim": 4},
    }
    assert item["fingerprints"] == {"1": {"encoder": tiny_digest()[:12], "model": tiny_digest()[:-13:-1]}}
    assert item["failed_versions"] == {}


@pytest.mark.slow
def test_a_broken_entry_and_a_missing_version_are_named_and_the_others_serve(
    start: Start, tmp_path: Path
) -> None:
    """The broken one comes first by name, and is not the default."""
    (write_tiny_entry(tmp_path / "m", "broken") / "1" / "model.pt").write_bytes(b"damaged")
    shutil.rmtree(write_tiny_entry(tmp_path / "m", "good", versions=("1", "2")) / "2")
    client = start(model_repository=tmp_path / "m")
    listing = client.get("/models").json()
    broken, good = listing["data"]
    reason = "zip archive" if "Triton" in type(engine_of(client)).__name__ else "sha256"
    assert broken["state"] == "failed"
    assert reason in broken["reason"]
    assert (good["state"], good["versions"], good["default_version"]) == ("ready", ["1"], "1")
    assert good["failed_versions"].keys() == {"2"}
    assert listing["default"] == "good"
    answer = client.post("/embed", files=IMAGE).json()
    assert (answer["model"], answer["model_version"]) == ("good", "1")
    eventually(lambda: client.get("/health/ready").status_code == 200)
    refused = client.post("/embed", files=IMAGE, params={"model": "broken"})
    assert refused.status_code == 503
    assert reason in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) >= 1
    second = client.post("/embed", files=IMAGE, params={"model_version": "2"})
    assert second.status_code == 503
    assert not [text for text in (str(listing), refused.text, second.text) if str(tmp_path) in text]


@pytest.mark.slow
def test_a_reload_never_moves_unnamed_requests_to_another_model(start: Start, tmp_path: Path) -> None:
    damaged = write_tiny_entry(tmp_path / "m", "a") / "1" / "model.pt"
    good = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    write_tiny_entry(tmp_path / "m", "b")
    client = start(model_repository=tmp_path / "m")
    assert client.get("/models").json()["default"] == "b"
    damaged.write_bytes(good)
    rescan(client)
    assert client.get("/models/a").json()["state"] == "ready"
    assert client.post("/embed", files=IMAGE, params={"model": "a"}).status_code == 200
    assert client.post("/embed", files=IMAGE).json()["model"] == "b"
    shutil.rmtree(tmp_path / "m" / "b")
    rescan(client)
    assert client.post("/embed", files=IMAGE).status_code == 503


@pytest.mark.slow
def test_models_and_versions_are_chosen(start: Start, tmp_path: Path) -> None:
    for name, more in (("a", {}), ("b", {"size": 16}), ("plain", {"head": False}), ("late", {}), ("off", {})):
        write_tiny_entry(tmp_path / "m", name, versions=("1", "2", "3") if name == "b" else ("1",), **more)
    client = start(model_repository=tmp_path / "m", models="a,b:1,b:2,plain,late:7")
    items = {item["name"]: item for item in client.get("/models").json()["data"]}
    assert items.keys() == {"a", "b", "plain", "late"}
    assert (items["b"]["versions"], items["b"]["default_version"]) == (["1", "2"], "2")
    assert items["late"]["state"] == "failed"
    assert "7" in items["late"]["reason"]

    def last(**options: str) -> tuple[str, str, float]:
        answer = client.post("/embed", files=IMAGE, params=options).json()
        return answer["model"], answer["model_version"], round(answer["data"][0]["embedding"][3], 3)

    assert last() == ("a", "1", 0.8)
    assert last(model="b") == ("b", "2", 0.81)
    assert last(model="b", model_version="1") == ("b", "1", 0.8)
    assert last(model="plain") == ("plain", "1", 0.8)
    assert client.post("/classify", files=IMAGE, params={"model": "plain"}).json()["title"] == "No classes"
