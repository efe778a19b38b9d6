"""What images do to other services: poison pills, blocked event loops, bombs. None of it happens here."""

import asyncio
import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import service.decoding
from entry.images import FORMATS
from tests.service.conftest import Start
from tests.tiny import png

DATA = os.environ.get("PRG_TEST_DATA")
RED, BLUE = png(), png((0, 0, 255))
KNOWN_TO_DIFFER = 4
"""Files of the manifest that this Pillow and its maker's judge differently."""


def embed(client: TestClient, *images: bytes) -> Any:
    return client.post("/embed", files=[("files", ("image", data)) for data in images])


def test_decoding_leaves_the_event_loop_alone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real, where = service.decoding.load_image, []

    def watched(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        where.append(threading.current_thread().name)
        return real(*arguments, **options)

    monkeypatch.setattr(service.decoding, "load_image", watched)
    assert embed(client, RED, png()[:50]).status_code == 200
    assert [name.startswith("decode") for name in where] == [True] * 2


def test_text_that_inflates_is_no_image(client: TestClient) -> None:
    """A PNG of a few kilobytes whose comment would be 200 MB."""
    body = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    answer = embed(client, RED[:33] + chunk + RED[33:], RED).json()
    assert answer["data"][0]["error"]["status"] == 422
    assert "embedding" in answer["data"][1]


@pytest.mark.skipif(not DATA, reason="PRG_TEST_DATA is not set")
def test_odd_images_harm_nothing(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    """Each odd file is a result or an error of its own; those beside it and the service do not mind."""
    client = start()
    folder = Path(DATA or "") / "odd-images"
    rows = [json.loads(line) for line in (folder / "MANIFEST.jsonl").read_text().splitlines()]
    alone = embed(client, RED).json()["data"][0]["embedding"]
    differing = []
    for begin in range(0, len(rows), 16):
        portion = rows[begin : begin + 16]
        odd = [(folder / row["path"]).read_bytes() for row in portion]
        response = embed(client, RED, *odd, RED)
        assert response.status_code == 200, response.text[:300]
        items = response.json()["data"]
        assert items[0]["embedding"] == items[-1]["embedding"] == alone
        for row, item in zip(portion, items[1:-1], strict=True):
            assert ("embedding" in item) != ("error" in item), row["path"]
            if "error" in item:
                assert item["error"]["status"] in (413, 415, 422), row["path"]
                assert item["error"]["detail"]
            pillow = row["pillow13"]
            if pillow.get("format") in FORMATS and (pillow["outcome"] == "ok") != ("embedding" in item):
                differing.append(row["path"])
        assert client.get("/health/live").status_code == 200
    capfd.readouterr()  # libtiff writes its warnings straight to the terminal
    assert len(rows) > 600
    assert len(differing) <= KNOWN_TO_DIFFER, differing
