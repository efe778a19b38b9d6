"""/v1/embeddings: OpenAI's own package talks to it unchanged."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from service.auth import new_key
from service.settings import Settings
from tests import serving
from tests.service.conftest import Start
from tests.tiny import png, write_tiny_entry

RED = [1.0, 0.0, 0.0, 0.8]


def encoded(data: bytes = png()) -> str:
    return base64.b64encode(data).decode()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + encoded(data)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(address, key) of the service on a real port."""
    key, row = new_key("people")
    (tmp_path / "keys.toml").write_text(row)
    write_tiny_entry(tmp_path / "models")
    settings = Settings(model_repository=tmp_path / "models", api_keys_file=tmp_path / "keys.toml")
    with serving.served(settings) as address:
        yield f"http://{address}/v1", key


def test_the_openai_package(served: tuple[str, str]) -> None:
    address, key = served
    with openai.OpenAI(base_url=address, api_key=key, max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=[uri(png()), encoded(png((0, 0, 255)))])
        assert answer.model == "tiny"
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.data[0].embedding == pytest.approx(RED)
        assert answer.data[1].embedding == pytest.approx([0, 0, 1, 0.8])
        more = client.embeddings.create(
            model="tiny",
            input=encoded(),
            encoding_format="float",
            extra_body={"t_end": 0.5, "normalize": True},
        )
        assert more.data[0].embedding == pytest.approx(np.array([1, 0, 0, 0.5]) / np.sqrt(1.25))
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="other", input=encoded())
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match=r"input\[1\]"):
            client.embeddings.create(model="tiny", input=[encoded(), "no image"])
    with (
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.embeddings.create(model="tiny", input=encoded())


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        ({"input": []}, 400, "1 to 64"),
        ({"input": [encoded()] * 65}, 400, "1 to 64"),
        ({"input": [1, 2]}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"banana": 1}, 400, "banana"),
        ({"dimensions": 5}, 400, "dimensions"),
        ({"dimensions": 3, "feature": "hidden"}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"t_end": [0.5]}, 400, "t_end"),
        ({"t_end": 2}, 400, "t_end"),
        ({"feature": "pixels"}, 400, "feature"),
        ({"model": "other"}, 404, "other"),
        ({"model": None}, 400, "model"),
        ({"input": "data:text/plain;base64,abcd"}, 400, "not an image"),
    ],
)
def test_errors_have_openais_shape(
    client: TestClient, change: dict[str, Any], status: int, named: str
) -> None:
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": encoded(), **change})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert named in error["message"]


def test_what_is_not_there_under_v1_has_openais_shape(client: TestClient) -> None:
    for response, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/embeddings"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_models_own_dimensions_are_accepted(client: TestClient) -> None:
    asked = {"model": "tiny", "input": encoded(), "dimensions": 768, "feature": "state", "user": "me"}
    answer = client.post("/v1/embeddings", json=asked).json()
    assert len(answer["data"][0]["embedding"]) == 768
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_a_prefix_of_the_embedding(client: TestClient) -> None:
    asked = {"model": "tiny", "input": encoded(), "dimensions": 3, "t_end": 0.5, "normalize": True}
    answer = client.post("/v1/embeddings", json=asked).json()
    assert answer["data"][0]["embedding"] == pytest.approx([1, 0, 0])


def test_a_body_that_is_too_large_or_no_json(start: Start) -> None:
    client = start(max_body_bytes=1000)
    for body in (b"{", bytes(2000)):
        response = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
