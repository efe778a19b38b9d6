"""The two POST routes: every form of input, every option, every kind of bad input."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.routes.embed import prefers_npy
from service.schemas import ClassifyAnswer, EmbedAnswer
from tests.service.conftest import IMAGE, Start
from tests.tiny import LABELS, png

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{i}.png", data)) for i, data in enumerate(images)]


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def embedding(colour: tuple[int, int, int], t_end: float) -> list[float]:
    return [*(c / 255 for c in colour), t_end]


def problem(response: Any, status: int, title: str | None = None) -> str:
    """Check that a response is a problem of that status and title; returns its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert {"type", "title", "status", "detail"} <= body.keys()
    assert title in (None, body["title"])
    detail: str = body["detail"]
    return detail


def statuses(response: Any) -> list[int | None]:
    """Of each item's error; None where it has none."""
    return [item.get("error", {}).get("status") for item in response.json()["data"]]


def test_embed_answers_in_the_order_of_the_input(client: TestClient) -> None:
    answer = client.post("/embed", files=files(png(RED), png(GREEN), png(BLUE))).json()
    EmbedAnswer.model_validate(answer)
    assert (answer["model"], answer["model_version"], len(answer["fingerprint"])) == ("tiny", "1", 12)
    assert (answer["feature"], answer["t_end"], answer["dim"]) == ("embedding", 0.8, 4)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    for item, colour in zip(answer["data"], (RED, GREEN, BLUE), strict=True):
        assert item.keys() == {"index", "embedding"}
        assert item["embedding"] == pytest.approx(embedding(colour, 0.8))
    assert answer["usage"] == {"images": 3, "failed": 0}


def test_each_feature_is_its_own_and_a_prefix_of_the_embedding_is_one_too(client: TestClient) -> None:
    def vector(**options: Any) -> Any:
        answer = client.post("/embed", files=files(png(GREEN)), data=options).json()
        numbers = answer["data"][0]["embedding"]
        assert isinstance(numbers, str) or answer["dim"] == len(numbers)
        return numbers

    assert vector(feature="hidden") == pytest.approx([*embedding(GREEN, 0.8), 1])
    assert len(vector(feature="state")) == 768
    assert vector(dimensions=2) == pytest.approx([0, 1])
    assert vector(dimensions=3, t_end=0.5) == pytest.approx([0, 1, 0])
    assert vector(t_end=0.5, normalize=True) == pytest.approx(np.array([0, 1, 0, 0.5]) / np.sqrt(1.25))
    assert vector(t_end=0.5, normalize=True, dimensions=2) == pytest.approx([0, 1])
    assert vector(feature="state", t_end=0, normalize=True) == [0.0] * 768
    little_endian = np.frombuffer(base64.b64decode(vector(encoding_format="base64")), "<f4")
    assert little_endian == pytest.approx(embedding(GREEN, 0.8))


LEVELS = {"t_end": [0.5, 0.25, 1.0], "normalize": True}


@pytest.mark.parametrize(
    "request_",
    [
        {"files": files(png(RED), png(BLUE)), "data": LEVELS},
        {"files": files(png(RED), png(BLUE)), "params": LEVELS},
        {"files": files(png(RED), png(BLUE)), "data": {"t_end": LEVELS["t_end"]}, "params": LEVELS},
        {"json": {"inputs": [b64(png(RED)), b64(png(BLUE))], **LEVELS}},
        {"json": {"inputs": [b64(png(RED)), b64(png(BLUE))]}, "params": LEVELS},
    ],
)
def test_the_forms_of_input_agree_and_take_several_levels(
    client: TestClient, request_: dict[str, Any]
) -> None:
    answer = client.post("/embed", **request_).json()
    EmbedAnswer.model_validate(answer)
    assert answer["t_end"] == LEVELS["t_end"]
    for item, colour in zip(answer["data"], (RED, BLUE), strict=True):
        assert item.keys() == {"index", "embeddings"}
        for level, found in zip((0.5, 0.25, 1), item["embeddings"], strict=True):
            assert found["t_end"] == level
            expected = np.array(embedding(colour, level))
            assert found["embedding"] == pytest.approx(expected / np.linalg.norm(expected))


def test_a_body_may_be_the_image_and_a_list_may_be_of_one_level(client: TestClient) -> None:
    asked: dict[str, Any] = {"content": png(), "headers": {"content-type": "image/png"}}
    plain = client.post("/embed", params={"t_end": 0.5}, **asked).json()
    assert plain == client.post("/embed", files=IMAGE, params={"t_end": 0.5}).json()
    answer = client.post("/embed", json={"inputs": [b64(png())], "t_end": [0.5]}).json()
    assert answer["t_end"] == [0.5]
    assert list(answer["data"][0]) == ["index", "embeddings"]
    assert answer["data"][0]["embeddings"][0]["embedding"] == plain["data"][0]["embedding"]


def test_classify(client: TestClient) -> None:
    answer = client.post("/classify", files=files(png(GREEN)), data={"return_logits": "true"}).json()
    ClassifyAnswer.model_validate(answer)
    assert answer["t_end"] == 0.8
    item = answer["data"][0]
    assert [p["label"] for p in item["predictions"]][:2] == ["green", "late"]
    assert sorted(p["class_id"] for p in item["predictions"]) == [0, 1, 2, 3]
    assert sum(p["probability"] for p in item["predictions"]) == pytest.approx(1)
    assert item["logits"] == pytest.approx([0, 10, 0, 8], abs=1e-5)
    # softmax(logits / 2), and KNOWN is 0, above all held-out images
    assert item["predictions"][0]["probability"] == pytest.approx(1 / (1 + 2 * np.exp(-5) + np.exp(-1)))
    assert item["known"] == 1
    for p in item["predictions"]:
        assert p["label"] == LABELS[p["class_id"]]
        assert p["logit"] == item["logits"][p["class_id"]]
    for top_k, count in ((1, 1), (3, 3), (1000, 4)):
        answer = client.post("/classify", files=files(png()), params={"top_k": top_k}).json()
        assert len(answer["data"][0]["predictions"]) == count
        assert "logits" not in answer["data"][0]


def test_known_is_the_share_of_held_out_images_that_were_less_typical(client: TestClient) -> None:
    reds = [0, 51, 102, 255]
    answer = client.post("/classify", files=files(*(png((red, 0, 0)) for red in reds))).json()
    assert [item["known"] for item in answer["data"]] == pytest.approx([1, 0.8, 0.6, 0], abs=1e-6)


def test_classify_at_another_trained_level(client: TestClient) -> None:
    answer = client.post("/classify", files=files(png()), params={"t_end": "0.50", "return_logits": 1}).json()
    assert answer["t_end"] == 0.5
    assert answer["data"][0]["logits"][3] == pytest.approx(5)
    # The calibration was made at the first level.
    assert "known" not in answer["data"][0]
    exact = np.exp(answer["data"][0]["logits"])
    assert answer["data"][0]["predictions"][0]["probability"] == pytest.approx(exact.max() / exact.sum())


def test_a_bad_image_spoils_no_other_and_has_its_own_status(start: Start) -> None:
    client = start(max_pixels=2000, max_image_bytes=5000)
    bad = [b64(data) for data in (png(size=(50, 50)), png() + bytes(5000), b"%PDF", b"text", png()[:50], b"")]
    inputs = [b64(png(RED)), *bad, {"b64": "***"}, b64(png(BLUE))]
    response = client.post("/embed", json={"inputs": inputs})
    answer = response.json()
    EmbedAnswer.model_validate(answer)
    assert response.status_code == 200
    assert statuses(response) == [None, 413, 413, 415, 422, 422, 422, 422, None]
    assert answer["usage"] == {"images": 9, "failed": 7}
    for index, colour in ((0, RED), (8, BLUE)):
        assert answer["data"][index]["embedding"] == pytest.approx(embedding(colour, 0.8))
    for item in answer["data"][1:8]:
        assert item["error"].keys() == {"type", "title", "status", "detail"}


@pytest.mark.parametrize("route", ["/embed", "/classify"])
def test_all_bad_is_422_with_the_same_data(client: TestClient, route: str) -> None:
    response = client.post(route, files=files(b"text", b"more"))
    problem(response, 422, "No usable image")
    body = response.json()
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert statuses(response) == [422, 422]
    assert body["usage"] == {"images": 2, "failed": 2}


def test_images_as_text(client: TestClient) -> None:
    encoded = b64(png(BLUE))["b64"]
    uri, bare = f"data:image/png;base64,{encoded}", encoded.rstrip("=")
    good = [
        *({"b64": text} for text in (encoded, bare, f"{bare}=", f"{encoded[:40]}\r\n{encoded[40:]}")),
        *({"data_uri": text} for text in (uri, f"data:IMAGE/PNG;name=a;base64,{encoded}")),
        {"data_uri": uri.replace("+", "%2B")},
    ]
    answer = client.post("/embed", json={"inputs": good}).json()["data"]
    assert [item["embedding"] for item in answer] == [answer[0]["embedding"]] * 7
    bad = ["data:image/png,abc", "image/png;base64,abc", "data:image/png;base64,***", ""]
    inputs = [*({"data_uri": text} for text in (*bad, "data:text/html;base64,abcd", uri)), {"b64": uri}]
    response = client.post("/embed", json={"inputs": inputs})
    assert statuses(response) == [422, 422, 422, 422, 415, None, 422]
    assert "data_uri" in response.json()["data"][-1]["error"]["detail"]


@pytest.mark.parametrize("t_end", [0.5, [0.5, 0.25, 1]])
def test_npy(client: TestClient, t_end: float | list[float]) -> None:
    asked = {"inputs": [b64(png(RED)), b64(png(BLUE))], "t_end": t_end}
    headers = {"accept": "application/x-npy"}
    response = client.post("/embed", json=asked, headers=headers)
    assert response.headers["content-type"] == "application/x-npy"
    assert len(response.headers["x-fingerprint"]) == 12
    found = np.load(io.BytesIO(response.content))
    assert found.dtype == np.dtype("<f4")
    json = client.post("/embed", json=asked).json()["data"]
    levels = [[level["embedding"] for level in item.get("embeddings", [item])] for item in json]
    assert found == pytest.approx(np.array(levels).reshape(found.shape))
    assert found.shape == ((2, 3, 4) if isinstance(t_end, list) else (2, 4))
    bad = client.post("/embed", json={"inputs": [b64(png()), b64(b"text")]}, headers=headers)
    problem(bad, 422)
    assert bad.json()["data"][1]["error"]["status"] == 422
    assert "embedding" in bad.json()["data"][0]


@pytest.mark.parametrize(
    ("route", "options", "named"),
    [
        ("/embed", {"t_end": "1.5"}, "t_end"),
        ("/embed", {"t_end": "nan"}, "t_end"),
        ("/embed", {"t_end": ["0.1"] * 9}, "t_end"),
        ("/embed", {"feature": "pixels"}, "feature pixels hidden state"),
        ("/embed", {"feature": ["state", "hidden"]}, "feature"),
        ("/embed", {"model": "other"}, "other tiny"),
        ("/embed", {"model": ""}, "tiny"),
        ("/embed", {"model_version": "7"}, "7 1"),
        ("/embed", {"normalize": "perhaps"}, "normalize true"),
        ("/embed", {"encoding_format": "hex"}, "encoding_format base64"),
        ("/embed", {"top_k": "3"}, "top_k model_version"),
        ("/embed", {"dimensions": "0"}, "dimensions"),
        ("/embed", {"dimensions": "5"}, "dimensions 4"),
        ("/embed", {"dimensions": "2", "feature": "hidden"}, "dimensions embedding"),
        ("/classify", {"t_end": "0.3"}, "t_end 0.8 0.5"),
        ("/classify", {"t_end": ["0.8", "0.5"]}, "t_end"),
        ("/classify", {"top_k": "0"}, "top_k"),
        ("/classify", {"feature": "state"}, "feature top_k"),
    ],
)
def test_a_wrong_option_is_422_and_names_the_allowed(
    client: TestClient, route: str, options: dict[str, Any], named: str
) -> None:
    for place in ("params", "data"):
        detail = problem(client.post(route, files=IMAGE, **{place: options}), 422)  # type: ignore[arg-type]
        assert all(word in detail for word in named.split())


def test_json_options_have_json_types(client: TestClient) -> None:
    wrong = ({"t_end": True}, {"t_end": "0.5"}, {"t_end": []}, {"normalize": "yes"}, {"feature": ["state"]})
    for option in ({"model": 3}, *wrong):
        problem(client.post("/embed", json={"inputs": [b64(png())], **option}), 422, "Wrong option")


def test_the_same_option_twice_must_agree(client: TestClient) -> None:
    asked = {"inputs": [b64(png())], "t_end": 0.5}
    assert client.post("/embed", json=asked, params={"t_end": "0.50"}).status_code == 200
    problem(client.post("/embed", json=asked, params={"t_end": "0.6"}), 422, "Contradicting options")
    for level, status in ((0.7, 422), (0.5, 200)):
        body = json.dumps(asked)[:-1] + f', "t_end": {level}}}'
        response = client.post("/embed", content=body, headers={"content-type": "application/json"})
        assert response.status_code == status
    repeated = {"t_end": ["0.5", "0.50"], "top_k": ["1", "1"]}
    assert client.post("/classify", files=IMAGE, params=repeated).json()["t_end"] == 0.5


def sent(kind: str, content: bytes) -> dict[str, Any]:
    return {"content": content, "headers": {"content-type": kind}}


def test_a_request_without_images_or_with_too_many(client: TestClient) -> None:
    image, a_json, form = b64(png()), "application/json", "multipart/form-data"
    for title, requests in {
        "No image": ({"files": {"t_end": (None, "0.5")}}, {"files": {"files": (None, "a.png")}}, {}),
        "No usable image": (sent("image/png", b""),),
        "Too many images": ({"json": {"inputs": [image] * 65}},),
        "Malformed body": (
            *(
                {"json": {"inputs": [item]}}
                for item in ("abc", {"b64": 3}, {"path": ""}, {"b64": "", "url": ""})
            ),
            *(sent(a_json, body) for body in (b"{}", b"{", b"[" * 100_000, b'{"inputs": [NaN]}')),
            *(sent(form + more, b"--x") for more in ("; boundary=x; charset=undefined", "; boundary=x", "")),
        ),
    }.items():
        for request in requests:
            problem(client.post("/embed", **request), 422, title)


def test_other_content_types_and_encodings_are_415(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "video/mp4"):
        problem(client.post("/embed", **sent(kind, b"abc")), 415, "Content type not accepted")
    for kind in ("application/json", "image/png", "multipart/form-data; boundary=B"):
        headers = {"content-type": kind, "content-encoding": "gzip"}
        answer = client.post("/embed", content=b"x", headers=headers)
        problem(answer, 415, "Content encoding not accepted")
    headers = {"content-type": "image/png", "content-encoding": "Identity"}
    assert client.post("/embed", content=png(), headers=headers).status_code == 200


def test_headers(client: TestClient) -> None:
    right = ("Request-Timeout", "9.5"), ("Priority", "bulk"), ("Priority", "u=1, i")
    wrong = ("Request-Timeout", "soon"), ("Request-Timeout", "-1"), ("Priority", "urgent")
    for status, headers in ((200, right), (422, wrong)):
        for name, value in headers:
            assert client.post("/embed", files=IMAGE, headers={name: value}).status_code == status, value


def test_accept_is_weighed() -> None:
    npy = "application/x-npy"
    for accept in (
        npy,
        npy.upper(),
        f"{npy}, */*;q=0.5",
        f"application/json, {npy}",
        f"{npy}; v=1; q=0.5, text/html",
    ):
        assert prefers_npy(accept), accept
    for accept in (f"{npy};q=0", f"application/json, {npy};q=0.1", "*/*", "application/*", f"{npy}z", ""):
        assert not prefers_npy(accept), accept
