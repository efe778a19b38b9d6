"""PRG_COMPILE_CACHE: models compiled in the background."""

import time
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from entry.compiled import compiler
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import rescan
from tests.tiny import png, write_tiny_entry


def served(work: Path, **settings: object) -> TestClient:
    given = {"model_repository": work / "models", "compile_cache": work / "cache", "max_batch": 2} | settings
    return TestClient(create_app(Settings(**given)))  # type: ignore[arg-type]


def embedding(client: TestClient) -> np.ndarray:
    answer = client.post("/embed", files={"files": png()})
    assert answer.status_code == 200
    return np.array(answer.json()["data"][0]["embedding"])


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_model_is_compiled_while_it_serves_and_found_compiled_at_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_entry(tmp_path / "models")
    said = ""
    with served(tmp_path) as client:
        before = embedding(client)
        while "model compiled" not in said:
            time.sleep(0.2)
            said += capsys.readouterr().out
            assert "model not compiled" not in said
        after = embedding(client)
    assert "compiled=False" in said
    assert np.allclose(before, after, rtol=1e-5)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny-1"]
    with served(tmp_path) as client:
        assert np.allclose(embedding(client), before, rtol=1e-5)
    assert "compiled=True" in capsys.readouterr().out


def test_without_a_compiler_it_serves_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_entry(tmp_path / "models", versions=("1", "2"))
    write_tiny_entry(tmp_path / "models", "other")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with served(tmp_path, default_model="tiny") as client:
        embedding(client)
        rescan(client)
        embedding(client)
    assert capsys.readouterr().out.count("no C++ compiler") == 1
    assert not (tmp_path / "cache").exists()


def test_where_nothing_can_be_written_it_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_entry(tmp_path / "models")
    (tmp_path / "cache").write_text("a file, not a folder")
    said = ""
    with served(tmp_path) as client:
        while "model not compiled" not in said and "no C++ compiler" not in said:
            embedding(client)
            said += capsys.readouterr().out


def test_a_service_that_stops_stops_compiling(tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "models")
    with served(tmp_path) as client:
        embedding(client)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_nothing_is_compiled_in_bf16(tmp_path: Path) -> None:
    with served(
        tmp_path,
        model_repository=Path("model_repository"),
        models="prg-cifar10-pretrained",
        precision="bf16",
    ) as client:
        embedding(client)
        time.sleep(0.5)
    assert not (tmp_path / "cache").exists()
