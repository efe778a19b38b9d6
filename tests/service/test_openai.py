"""/v1/embeddings: OpenAI's own package talks to it unchanged."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from service.auth import new_key
from service.settings import Settings
from tests import serving
from tests.service.conftest import Start
from tests.tiny import png, write_tiny_entry


def encoded(data: bytes = png()) -> str:
    return base64.b64encode(data).decode()


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
        answer = client.embeddings.create(
            model="tiny", input=[f"data:image/png;base64,{encoded()}", encoded(png((0, 0, 255)))]
        )
        assert answer.model == "tiny"
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.data[0].embedding == pytest.approx([1, 0, 0, 0.8])
        assert answer.data[1].embedding == pytest.approx([0, 0, 1, 0.8])
        ours = {"t_end": 0.5, "normalize": True}
        more = client.embeddings.create(
            model="tiny", input=encoded(), encoding_format="float", extra_body=ours
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


def test_errors_have_openais_shape(start: Start) -> None:
    client = start()
    for change, named in (
        ({"input": [1, 2]}, "input"),
        ({"input": None}, "input"),
        ({"input": "data:text/plain;base64,abcd"}, "text/plain"),
        ({"feature": "pixels"}, "feature"),
        ({"dimensions": 3, "feature": "hidden"}, "dimensions"),
        ({"t_end": [0.5]}, "t_end"),
        ({"banana": 1}, "banana"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ("{", "JSON"),
    ):
        asked = {"model": "tiny", "input": encoded()}
        body = change if isinstance(change, str) else json.dumps(asked | change)
        response = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert named in error["message"]


def test_dimensions_are_those_of_the_feature_or_a_prefix_of_the_embedding(client: TestClient) -> None:
    asked = {"model": "tiny", "input": encoded(), "user": "me"}
    answer = client.post("/v1/embeddings", json=asked | {"dimensions": 768, "feature": "state"}).json()
    assert len(answer["data"][0]["embedding"]) == 768
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    prefix = {"dimensions": 3, "t_end": 0.5, "normalize": True}
    answer = client.post("/v1/embeddings", json=asked | prefix).json()
    assert answer["data"][0]["embedding"] == pytest.approx([1, 0, 0])
