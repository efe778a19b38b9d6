"""Settings: refused by name, read from the environment."""

from pathlib import Path

import pytest

from service.app import create_app
from service.settings import Settings, SettingsError, load_settings, unknown_variables
from tests.tiny import write_tiny_entry


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ("PRG_ENGINE", ["magic"]),
        ("PRG_MAX_IMAGES", ["0"]),
        ("PRG_MAX_BATCH", ["100"]),
        ("PRG_REQUEST_TIMEOUT_S", ["-1"]),
        ("PRG_DEFAULT_MODEL", ["other"]),
        ("PRG_MODEL_REPOSITORY", ["/does/not/exist", "."]),
        ("PRG_MODELS", ["tiny,other", ",", ":1"]),
        ("PRG_PORT", ["http", "tcp://10.96.14.7:8000"]),
        ("PRG_CORS_ORIGINS", ["app.example", "https://*.example.com", "https://user@app.example"]),
        ("PRG_CORS_ORIGINS", [f"https://app.example{more}" for more in ("/page", ",*", ":port")]),
        ("PRG_CORS_ORIGINS", ['["https://app.example"]']),
    ],
)
def test_a_setting_that_can_not_be_used_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, values: list[str]
) -> None:
    write_tiny_entry(tmp_path / "models")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("PRG_MODEL_REPOSITORY", str(tmp_path / "models"))
    for value in values:
        monkeypatch.setenv(variable, value)
        with pytest.raises(SettingsError, match=variable):
            create_app(load_settings())


def test_variables_that_are_no_settings() -> None:
    names = ["PRG_MAX_PIXEL", "prg_port", "PRG_MAX_IMAGES", "PRG_BANANA", "PRG_TEST_DATA", "PRG_KEY", "PATH"]
    assert unknown_variables(names) == {"PRG_MAX_PIXEL": "PRG_MAX_PIXELS", "PRG_BANANA": None}


def test_without_a_repository_the_shipped_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings().model_repository == Path("model_repository")  # a checkout ships none
    monkeypatch.setattr("service.settings.SHIPPED", tmp_path / "package")
    write_tiny_entry(tmp_path / "package")
    assert Settings().model_repository == tmp_path / "package"
    (tmp_path / "model_repository").mkdir()
    assert Settings().model_repository == Path("model_repository")
    monkeypatch.setenv("PRG_MODEL_REPOSITORY", "elsewhere")
    assert Settings().model_repository == Path("elsewhere")


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRG_MODELS", "a, b:1,b:2, c:1,c")
    monkeypatch.setenv("PRG_CORS_ORIGINS", "http://x:80/, HTTP://Y, https://z:8443,http://[::1]:3000")
    settings = load_settings()
    assert settings.chosen_models == {"a": None, "b": frozenset({"1", "2"}), "c": None}
    assert settings.cors_origins == ("http://x", "http://y", "https://z:8443", "http://[::1]:3000")
