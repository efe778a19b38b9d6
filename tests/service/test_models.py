"""What /models says of each entry."""

from pathlib import Path

from fastapi.testclient import TestClient

from tests.service.conftest import Start, engine_of, eventually
from tests.tiny import png, write_tiny_entry

IMAGE = [("files", ("a.png", png()))]


def test_models(client: TestClient) -> None:
    listing = client.get("/models").json()
    assert listing["default"] == "tiny"
    [item] = listing["data"]
    assert item == client.get("/models/tiny").json()
    assert item.keys() == {
        *("name", "state", "versions", "default_version", "image_size", "feature", "t_end", "features"),
        *("labels", "classify_t_end", "path", "solver", "steps", "nfe", "accuracy"),
    }
    assert item["state"] == "ready"
    assert item["features"] == {"state": {"dim": 768}, "hidden": {"dim": 4, "layers": ["middle_block"]}}


def test_a_refused_entry_is_failed_with_its_reason(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "good")
    (write_tiny_entry(tmp_path / "m", "broken") / "1" / "model.pt").write_bytes(b"damaged")
    client = start(model_repository=tmp_path / "m", default_model="good")
    items = {item["name"]: item for item in client.get("/models").json()["data"]}
    assert items["broken"]["state"] == "failed"
    reason = "zip archive" if "Triton" in type(engine_of(client)).__name__ else "sha256"
    assert reason in items["broken"]["reason"]
    assert client.post("/embed", files=IMAGE).json()["model"] == "good"
    refused = client.post("/embed", files=IMAGE, params={"model": "broken"})
    assert refused.status_code == 503
    assert reason in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) >= 1


def test_a_broken_entry_that_comes_first_by_name_is_not_the_default(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "good")
    (write_tiny_entry(tmp_path / "m", "aaa") / "1" / "model.pt").write_bytes(b"damaged")
    client = start(model_repository=tmp_path / "m")
    assert client.get("/models").json()["default"] == "good"
    assert client.post("/embed", files=IMAGE).json()["model"] == "good"
    eventually(lambda: client.get("/health/ready").status_code == 200)


def test_chosen_models_and_versions(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "a")
    write_tiny_entry(tmp_path / "m", "b", versions=("1", "2", "3"))
    client = start(model_repository=tmp_path / "m", models="b:1,b:2")
    [item] = client.get("/models").json()["data"]
    assert (item["versions"], item["default_version"]) == (["1", "2"], "2")
