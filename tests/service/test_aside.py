"""What is decoded in processes of its own: too slow, killed, or of a complex format; others do not wait for it."""

import asyncio
import io
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service import aside
from tests.service.conftest import Start, eventually
from tests.tiny import png

AVIF = io.BytesIO()
Image.new("RGB", (40, 32), "red").save(AVIF, "AVIF", quality=100)


def scans(count: int) -> bytes:
    """An empty progressive JPEG of 12 megapixels that has its last scan so many times, each some 100 bytes."""
    buffer = io.BytesIO()
    Image.new("L", (4000, 3000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def embed(client: TestClient, *images: bytes) -> list[dict[str, object]]:
    answer = client.post("/embed", files=[("files", ("image", data)) for data in images])
    data: list[dict[str, object]] = answer.json()["data"]
    return data


@pytest.fixture
def client(start: Start) -> TestClient:
    return start()


@pytest.mark.parametrize("start", ["embedded"], indirect=True)
class TestAside:
    def test_a_complex_format_is_answered_like_any(self, client: TestClient) -> None:
        avif, red = embed(client, AVIF.getvalue(), png())
        assert avif["embedding"] == pytest.approx(red["embedding"], abs=0.01)

    def test_what_takes_too_long_is_an_error_of_its_own(
        self, client: TestClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(aside, "SECONDS", 1.0)
        slow, red, avif = embed(client, scans(100_000), png(), AVIF.getvalue())
        assert slow["error"]["title"] == "Image not decodable"  # type: ignore[index]
        assert "embedding" in red
        assert "embedding" in avif

    def test_a_decoder_that_dies_takes_only_its_own_image(self, client: TestClient) -> None:
        assert client.portal
        sent = client.portal.start_task_soon(asyncio.to_thread, embed, client, scans(100_000), png())
        eventually(lambda: any(map(busy, workers())), 30)
        # Meanwhile others are answered.
        assert "embedding" in embed(client, png())[0]
        for worker in workers():
            os.kill(worker, signal.SIGKILL)
        slow, red = sent.result()
        assert slow["error"]["title"] == "Image not decodable"  # type: ignore[index]
        assert "embedding" in red
        assert "embedding" in embed(client, AVIF.getvalue())[0]


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def busy(pid: int) -> bool:
    """Whether a process is computing."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
