"""API keys: who may do what, and how much."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import main
from service.auth import Key, Keys, new_key, read_keys
from service.errors import RATE_LIMIT, TOO_MANY_IMAGES, Problem
from service.settings import SettingsError
from tests.service.conftest import Start
from tests.tiny import png

IMAGE = [("files", ("a.png", png()))]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """(file, a key that may infer, a key that may read metrics)."""
    infer, infer_row = new_key("people")
    metrics, metrics_row = new_key("prometheus", ["metrics"])
    path = tmp_path / "keys.toml"
    path.write_text(infer_row + metrics_row)
    return path, infer, metrics


def test_keys_open_what_their_scopes_say(start: Start, keys: tuple[Path, str, str]) -> None:
    path, infer, metrics = keys
    client = start(api_keys_file=path)
    table = [
        ({}, 401),
        (bearer("wrong"), 401),
        ({"Authorization": infer}, 401),
        (bearer(infer), 200),
        (bearer(metrics), 403),
    ]
    for headers, status in table:
        assert client.post("/embed", files=IMAGE, headers=headers).status_code == status
        assert client.post("/classify", files=IMAGE, headers=headers).status_code == status
        assert client.get("/models", headers=headers).status_code == status
        assert client.get("/models/tiny", headers=headers).status_code == status
    refused = client.post("/embed", files=IMAGE)
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["content-type"] == "application/problem+json"
    assert client.get("/metrics", headers=bearer(infer)).status_code == 403
    assert client.get("/metrics", headers=bearer(metrics)).status_code == 200
    for path_ in ("/health/live", "/docs", "/openapi.json"):
        assert client.get(path_).status_code == 200


def test_a_key_is_refused_from_the_day_it_expires(start: Start, tmp_path: Path) -> None:
    path, today = tmp_path / "keys.toml", datetime.now(UTC).date()
    (old, old_row), (good, good_row) = new_key("old"), new_key("good")
    path.write_text(f"{old_row}expires = {today}\n{good_row}expires = {today + timedelta(2)}\n")
    client = start(api_keys_file=path)
    refused = client.get("/models", headers=bearer(old))
    assert (refused.status_code, refused.json()["title"]) == (401, "Key needed")
    assert client.get("/models", headers=bearer(good)).status_code == 200


def test_images_and_log_lines_have_the_keys_name(
    start: Start, keys: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, infer, metrics = keys
    client = start(api_keys_file=path)
    client.post("/embed", files=IMAGE * 3, headers=bearer(infer))
    lines = [line for line in capsys.readouterr().out.splitlines() if "/embed" in line]
    assert "people" in lines[-1]
    assert "testclient" in lines[-1]
    assert 'prg_key_images_total{key="people"} 3.0' in client.get("/metrics", headers=bearer(metrics)).text
    client.get("/health/ready", headers=bearer(infer))
    client.get("/models/none")
    assert "people" not in capsys.readouterr().out.splitlines()[-1]


def test_without_a_file_the_service_is_open(client: TestClient) -> None:
    assert client.get("/models").status_code == 200
    assert client.get("/metrics").status_code == 200


def test_the_rate_is_images_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.auth.time.monotonic", lambda: now)
    key = Key(name="k", sha256="0" * 64, scopes=["infer"], images_per_minute=60)
    keys = Keys(None)
    keys.take(key, 50)
    with pytest.raises(Problem) as error:
        keys.take(key, 30)
    assert error.value.kind is RATE_LIMIT
    assert error.value.headers == {"Retry-After": "20"}
    now += 20
    keys.take(key, 30)
    with pytest.raises(Problem) as error:
        keys.take(key, 61)
    assert error.value.kind is TOO_MANY_IMAGES


def test_over_the_rate_is_429(start: Start, tmp_path: Path) -> None:
    key, row = new_key("slow")
    path = tmp_path / "keys.toml"
    path.write_text(row.replace("6000", "2"))
    client = start(api_keys_file=path)
    assert client.post("/embed", files=IMAGE * 2, headers=bearer(key)).status_code == 200
    refused = client.post("/embed", files=IMAGE, headers=bearer(key))
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 30


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[key]]\nname = 'a'", "key.0.sha256"),
        ("[[key]]\nname = 'a'\nsha256 = 'xyz'\nscopes = ['infer']", "key.0.sha256"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\nscopes = ['all']", "key.0.scopes"),
        ("[[keys]]", "keys"),
        ("not toml", "keys.toml"),
        (f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\nscopes = ['infer']\n" * 2, "same name"),
    ],
)
def test_a_bad_keys_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_keys(path)
    assert str(path) in str(error.value)
    assert named in str(error.value)


def test_a_missing_keys_file_is_refused_at_start(start: Start, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        start(api_keys_file=tmp_path / "none.toml")


def test_reload_keeps_the_old_keys_where_the_file_is_bad(keys: tuple[Path, str, str]) -> None:
    path, *_ = keys
    held = Keys(path)
    path.write_text("nonsense")
    with pytest.raises(SettingsError):
        held.reload()
    assert len(held._keys) == 2


def test_new_key_prints_a_row_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--new-key", 'the "best" café']) == 0
    printed = capsys.readouterr()
    path = tmp_path / "keys.toml"
    path.write_text(printed.out)
    [found] = read_keys(path)
    assert found.name == 'the "best" café'
    [key] = [line for line in printed.err.splitlines() if line.startswith("prg_")]
    assert hashlib.sha256(key.encode()).hexdigest() == found.sha256
    assert key not in printed.out


@pytest.mark.parametrize("name", ["", " ", "a\x7fb", "two\nlines"])
def test_a_key_needs_a_name_that_can_be_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--new-key", name])
    assert stop.value.code == 2
    assert "printable" in capsys.readouterr().err
