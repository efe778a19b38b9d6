"""PRG_DEVICE and PRG_PRECISION."""

from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings, SettingsError
from tests.tiny import png, write_tiny_entry

NAME = "prg-cifar10-pretrained"


def test_answers_in_bf16_are_marked() -> None:
    found = {}
    for precision in ("entry", "bf16"):
        with TestClient(create_app(Settings(models=NAME, precision=precision, max_batch=2))) as client:  # type: ignore[arg-type]
            info = client.get(f"/models/{NAME}").json()
            answer = client.post("/embed", files={"files": png()}).json()
            assert answer["fingerprint"] == info["fingerprints"]["1"]["encoder"]
            found[precision] = info["precision"], answer["fingerprint"]
    assert found["entry"][0] == "fp32"
    assert found["bf16"] == ("bf16", f"{found['entry'][1]}-bf16")


def test_what_is_not_there_is_refused_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    repository = write_tiny_entry(tmp_path).parent
    for settings, named in (
        ({"device": "cuda:7"}, "PRG_DEVICE"),
        ({"device": "cpu", "engine": "triton"}, "PRG_DEVICE"),
        ({"precision": "bf16", "engine": "triton"}, "PRG_PRECISION"),
    ):
        with pytest.raises(SettingsError, match=named):
            create_app(Settings(model_repository=repository, **settings))  # type: ignore[arg-type]
