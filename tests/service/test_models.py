"""What /models says of each entry."""

import shutil
from pathlib import Path

from fastapi.testclient import TestClient

from tests.service.conftest import Start, engine_of, eventually, rescan
from tests.tiny import png, tiny_digest, write_tiny_entry

IMAGE = [("files", ("a.png", png()))]


def test_models(client: TestClient) -> None:
    listing = client.get("/models").json()
    assert listing["default"] == "tiny"
    [item] = listing["data"]
    assert item == client.get("/models/tiny").json()
    assert item.keys() == {
        *("name", "state", "versions", "default_version", "image_size", "feature", "t_end", "features"),
        *("labels", "classify_t_end", "path", "solver", "steps", "nfe", "precision", "accuracy"),
        *("fingerprints", "failed_versions"),
    }
    assert item["state"] == "ready"
    assert item["features"] == {
        "state": {"dim": 768},
        "hidden": {"dim": 5, "layers": ["middle_block"], "pooling": ["mean"]},
        "embedding": {"dim": 4},
    }
    assert item["fingerprints"] == {"1": {"encoder": tiny_digest()[:12], "model": tiny_digest()[:-13:-1]}}
    assert item["failed_versions"] == {}


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


def test_a_bad_version_is_named_and_the_others_serve(start: Start, tmp_path: Path) -> None:
    directory = write_tiny_entry(tmp_path / "m", "a", versions=("1", "2"))
    shutil.rmtree(directory / "2")
    client = start(model_repository=tmp_path / "m")
    item = client.get("/models/a").json()
    assert (item["state"], item["versions"], item["default_version"]) == ("ready", ["1"], "1")
    assert item["failed_versions"].keys() == {"2"}
    assert client.post("/embed", files=IMAGE).json()["model_version"] == "1"
    assert client.post("/embed", files=IMAGE, params={"model_version": "2"}).status_code == 503


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
    assert client.post("/embed", files=IMAGE).json()["model"] == "b"
    shutil.rmtree(tmp_path / "m" / "b")
    rescan(client)
    assert client.post("/embed", files=IMAGE).status_code == 503


def test_chosen_models_and_versions(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "a")
    write_tiny_entry(tmp_path / "m", "b", versions=("1", "2", "3"))
    client = start(model_repository=tmp_path / "m", models="b:1,b:2")
    [item] = client.get("/models").json()["data"]
    assert (item["versions"], item["default_version"]) == (["1", "2"], "2")
