"""API keys: who may do what, and how much."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.app import main
from service.auth import Key, Keys, new_key, read_keys
from service.errors import RATE_LIMIT, TOO_MANY_IMAGES, Problem
from service.settings import SettingsError
from tests.service.conftest import IMAGE, Start


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
    strangers: tuple[dict[str, str], ...] = ({}, bearer("wrong"), {"Authorization": infer})
    for headers, status in (*((s, 401) for s in strangers), (bearer(infer), 200), (bearer(metrics), 403)):
        for route in ("/embed", "/classify"):
            assert client.post(route, files=IMAGE, headers=headers).status_code == status
        for route in ("/models", "/models/tiny"):
            assert client.get(route, headers=headers).status_code == status
    refused = client.post("/embed", files=IMAGE)
    assert refused.headers["www-authenticate"] == "Bearer"
    assert client.get("/metrics", headers=bearer(infer)).status_code == 403
    assert client.get("/metrics", headers=bearer(metrics)).status_code == 200


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
    line = next(line for line in reversed(capsys.readouterr().out.splitlines()) if "/embed" in line)
    assert "people" in line
    assert "testclient" in line
    assert 'prg_key_images_total{key="people"} 3.0' in client.get("/metrics", headers=bearer(metrics)).text
    client.get("/health/ready", headers=bearer(infer))
    client.get("/models/none")
    assert "people" not in capsys.readouterr().out.splitlines()[-1]


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


ROW = f"[[key]]\nname = 'a'\nsha256 = '{'0' * 64}'\n"


def test_a_bad_keys_file_is_refused_and_a_reload_keeps_the_old_keys(keys: tuple[Path, str, str]) -> None:
    path, *_ = keys
    held = Keys(path)
    for text, named in (
        ("[[key]]\nname = 'a'", "key.0.sha256"),
        ("[[key]]\nname = 'a'\nsha256 = 'xyz'\nscopes = ['infer']", "key.0.sha256"),
        (ROW + "scopes = ['all']", "key.0.scopes"),
        ("[[keys]]", "keys"),
        ("not toml", "keys.toml"),
        (f"{ROW}scopes = ['infer']\n" * 2, "keys.toml"),
        (None, "keys.toml"),
    ):
        path.unlink() if text is None else path.write_text(text)
        for read in (lambda: Keys(path), held.reload):
            with pytest.raises(SettingsError) as error:
                read()
            assert str(path) in str(error.value)
            assert named in str(error.value)
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


def test_a_key_needs_a_name_that_can_be_printed() -> None:
    for name in ("", " ", "a\x7fb", "two\nlines"):
        with pytest.raises(SystemExit) as stop:
            main(["--new-key", name])
        assert stop.value.code == 2
