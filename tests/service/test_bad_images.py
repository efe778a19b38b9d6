"""What images do to other services: poison pills, blocked event loops, bombs. None of it happens here."""

import asyncio
import io
import json
import os
import threading
import tomllib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import service.decoding
from entry.images import FORMATS
from tests.service.conftest import Start
from tests.tiny import png

DATA = os.environ.get("PRG_TEST_DATA")
ROOT = Path(__file__).parents[2]
RED, BLUE = png(), png((0, 0, 255))
KNOWN_TO_DIFFER = 4
"""Files of the manifest that this Pillow and its maker's judge differently."""


def embed(client: TestClient, *images: bytes) -> Any:
    return client.post("/embed", files=[("files", ("image", data)) for data in images])


def jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_file_that_opens_but_does_not_decode_is_an_error_of_its_own(client: TestClient) -> None:
    """Image.open reads the header alone: the pixels of this one end half way. Those beside it keep their own."""
    cut = jpeg()[: len(jpeg()) // 2]
    assert Image.open(io.BytesIO(cut)).size == (64, 64)
    red, blue = (embed(client, image).json()["data"][0]["embedding"] for image in (RED, BLUE))
    assert red != blue
    first, bad, *others = embed(client, RED, cut, RED, BLUE).json()["data"]
    assert bad["error"]["title"] == "Image not decodable"
    assert [item["embedding"] for item in (first, *others)] == [red, red, blue]


def test_decoding_leaves_the_event_loop_alone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real, where = service.decoding.load_image, []

    def watched(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        where.append(threading.current_thread().name)
        return real(*arguments, **options)

    monkeypatch.setattr(service.decoding, "load_image", watched)
    assert embed(client, RED, BLUE, jpeg()).status_code == 200
    assert [name.startswith("decode") for name in where] == [True] * 3


def test_text_that_inflates_is_no_image(client: TestClient) -> None:
    """A PNG of a few kilobytes whose comment would be 200 MB."""
    body = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    answer = embed(client, RED[:33] + chunk + RED[33:], RED).json()
    assert answer["data"][0]["error"]["status"] == 422
    assert "embedding" in answer["data"][1]


def test_pillow_is_new_enough() -> None:
    """Older ones have holes in the formats that are taken."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [pillow] = [entry for entry in project["dependencies"] if entry.startswith("pillow")]
    assert tuple(map(int, pillow.removeprefix("pillow>=").split("."))) >= (12, 3)


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
