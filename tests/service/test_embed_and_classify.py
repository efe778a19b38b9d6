"""The two POST routes: every form of input, every option, every kind of bad input."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from service.routes.embed import prefers_npy
from service.schemas import ClassifyAnswer, EmbedAnswer
from tests.service.conftest import Start
from tests.tiny import LABELS, png, write_tiny_entry

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{i}.png", data)) for i, data in enumerate(images)]


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def embedding(colour: tuple[int, int, int], t_end: float) -> list[float]:
    return [*(c / 255 for c in colour), t_end]


def problem(response: Any, status: int) -> str:
    """Check that a response is a problem of that status; returns its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert {"type", "title", "status", "detail"} <= body.keys()
    detail: str = body["detail"]
    return detail


def test_embed_answers_in_the_order_of_the_input(client: TestClient) -> None:
    response = client.post("/embed", files=files(png(RED), png(GREEN), png(BLUE)))
    answer = response.json()
    EmbedAnswer.model_validate(answer)
    assert answer["model"] == "tiny"
    assert answer["model_version"] == "1"
    assert len(answer["fingerprint"]) == 12
    assert (answer["feature"], answer["t_end"], answer["dim"]) == ("embedding", 0.8, 4)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    for item, colour in zip(answer["data"], (RED, GREEN, BLUE), strict=True):
        assert item.keys() == {"index", "embedding"}
        assert item["embedding"] == pytest.approx(embedding(colour, 0.8))
    assert answer["usage"] == {"images": 3, "failed": 0}


def test_each_feature_is_its_own_and_a_prefix_of_the_embedding_is_one_too(client: TestClient) -> None:
    def vector(**options: Any) -> list[float]:
        answer = client.post("/embed", files=files(png(GREEN)), data=options).json()
        assert answer["dim"] == len(answer["data"][0]["embedding"])
        return answer["data"][0]["embedding"]

    assert vector(feature="hidden") == pytest.approx([*embedding(GREEN, 0.8), 1])
    assert len(vector(feature="state")) == 768
    assert vector(dimensions=2) == pytest.approx([0, 1])
    assert vector(dimensions=3, t_end=0.5) == pytest.approx([0, 1, 0])
    assert vector(t_end=0.5, normalize=True) == pytest.approx(np.array([0, 1, 0, 0.5]) / np.sqrt(1.25))
    assert vector(t_end=0.5, normalize=True, dimensions=2) == pytest.approx([0, 1])


def test_the_three_forms_of_input_agree(client: TestClient) -> None:
    options = {"t_end": 0.25, "feature": "state", "normalize": True}
    image = png(BLUE)
    answers = [
        client.post("/embed", files=files(image), data=options),
        client.post("/embed", content=image, headers={"content-type": "image/png"}, params=options),
        client.post("/embed", json={"inputs": [b64(image)], **options}),
        client.post("/embed", json={"inputs": [b64(image)]}, params=options),
        client.post("/embed", files=files(image), data={"t_end": 0.25}, params=options),
    ]
    assert [a.status_code for a in answers] == [200] * 5
    assert all(a.json() == answers[0].json() for a in answers)
    assert np.linalg.norm(answers[0].json()["data"][0]["embedding"]) == pytest.approx(1)


def test_base64_answers_are_little_endian_float32(client: TestClient) -> None:
    answer = client.post("/embed", files=files(png(GREEN)), params={"encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert vector == pytest.approx(embedding(GREEN, 0.8))


def test_a_vector_of_zeros_is_not_divided(client: TestClient) -> None:
    options = {"feature": "state", "t_end": 0, "normalize": True}
    answer = client.post("/embed", files=files(png(RED)), params=options).json()
    assert answer["data"][0]["embedding"] == [0.0] * 768


@pytest.mark.parametrize(
    "request_",
    [
        {"files": files(png(RED), png(BLUE)), "data": {"t_end": ["0.5", "0.25", "1"]}},
        {"files": files(png(RED), png(BLUE)), "params": {"t_end": ["0.5", "0.25", "1"]}},
        {"json": {"inputs": [b64(png(RED)), b64(png(BLUE))], "t_end": [0.5, 0.25, 1]}},
    ],
)
def test_several_levels_at_once(client: TestClient, request_: dict[str, Any]) -> None:
    answer = client.post("/embed", **request_).json()
    EmbedAnswer.model_validate(answer)
    assert answer["t_end"] == [0.5, 0.25, 1.0]
    for item, colour in zip(answer["data"], (RED, BLUE), strict=True):
        assert item.keys() == {"index", "embeddings"}
        for level, found in zip((0.5, 0.25, 1), item["embeddings"], strict=True):
            assert found["t_end"] == level
            assert found["embedding"] == pytest.approx(embedding(colour, level))


def test_a_list_of_one_level_has_the_form_of_a_list(client: TestClient) -> None:
    answer = client.post("/embed", json={"inputs": [b64(png())], "t_end": [0.5]}).json()
    assert answer["t_end"] == [0.5]
    assert list(answer["data"][0]) == ["index", "embeddings"]


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


def test_known_is_the_share_of_held_out_images_that_were_less_typical(client: TestClient) -> None:
    reds = [0, 51, 102, 255]
    answer = client.post("/classify", files=files(*(png((red, 0, 0)) for red in reds))).json()
    assert [item["known"] for item in answer["data"]] == pytest.approx([1, 0.8, 0.6, 0], abs=1e-6)


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (4, 4), (1000, 4)])
def test_top_k_is_clamped_to_the_classes(client: TestClient, top_k: int, count: int) -> None:
    answer = client.post("/classify", files=files(png()), params={"top_k": top_k}).json()
    assert len(answer["data"][0]["predictions"]) == count
    assert "logits" not in answer["data"][0]


def test_classify_at_another_trained_level(client: TestClient) -> None:
    answer = client.post("/classify", files=files(png()), params={"t_end": "0.50", "return_logits": 1}).json()
    assert answer["t_end"] == 0.5
    assert answer["data"][0]["logits"][3] == pytest.approx(5)
    # The calibration was made at the first level.
    assert "known" not in answer["data"][0]
    exact = np.exp(answer["data"][0]["logits"])
    assert answer["data"][0]["predictions"][0]["probability"] == pytest.approx(exact.max() / exact.sum())


def test_a_bad_image_spoils_no_other(client: TestClient) -> None:
    answer = client.post("/embed", files=files(png(RED), b"text", png(BLUE), png()[:50], b"")).json()
    EmbedAnswer.model_validate(answer)
    assert answer["usage"] == {"images": 5, "failed": 3}
    assert answer["data"][2]["embedding"] == pytest.approx(embedding(BLUE, 0.8))
    for index in (1, 3, 4):
        error = answer["data"][index]["error"]
        assert error.keys() == {"type", "title", "status", "detail"}
        assert error["status"] == 422


def test_errors_of_items_have_their_own_status(start: Start) -> None:
    client = start(max_pixels=2000, max_image_bytes=5000)
    noise = png() + bytes(5000)
    response = client.post(
        "/classify",
        json={"inputs": [b64(png()), b64(png(size=(50, 50))), b64(noise), {"b64": "***"}, b64(b"%PDF")]},
    )
    items = response.json()["data"]
    assert response.status_code == 200
    assert [item.get("error", {}).get("status") for item in items] == [None, 413, 413, 422, 415]


def test_all_bad_is_422_with_the_same_data(client: TestClient) -> None:
    response = client.post("/embed", files=files(b"text", b"more"))
    problem(response, 422)
    body = response.json()
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert all(item["error"]["status"] == 422 for item in body["data"])
    assert body["usage"] == {"images": 2, "failed": 2}


@pytest.mark.parametrize("text", ["{}\n{}", "{}", "{}="])
def test_base64_may_be_wrapped_and_unpadded(client: TestClient, text: str) -> None:
    encoded = base64.b64encode(png(RED)).decode().rstrip("=")
    half = len(encoded) // 2
    wrapped = encoded[:half] + "\r\n" + encoded[half:]
    assert client.post("/embed", json={"inputs": [{"b64": wrapped}]}).status_code == 200


@pytest.mark.parametrize("t_end", [0.5, [0.5, 0.25, 1]])
def test_npy(client: TestClient, t_end: float | list[float]) -> None:
    asked = {"inputs": [b64(png(RED)), b64(png(BLUE))], "t_end": t_end}
    headers = {"accept": "application/x-npy"}
    response = client.post("/embed", json=asked, headers=headers)
    assert response.headers["content-type"] == "application/x-npy"
    assert len(response.headers["x-fingerprint"]) == 12
    found = np.load(io.BytesIO(response.content))
    assert found.dtype == np.dtype("<f4")
    levels = t_end if isinstance(t_end, list) else [t_end]
    expected = np.array([[embedding(colour, level) for level in levels] for colour in (RED, BLUE)])
    assert found == pytest.approx(expected if isinstance(t_end, list) else expected[:, 0])
    bad = client.post("/embed", json={"inputs": [b64(png()), b64(b"text")]}, headers=headers)
    problem(bad, 422)
    assert bad.json()["data"][1]["error"]["status"] == 422
    assert "embedding" in bad.json()["data"][0]


def data_uri(data: bytes, kind: str = "image/png") -> dict[str, str]:
    return {"data_uri": f"data:{kind};base64," + base64.b64encode(data).decode()}


def test_data_uris(client: TestClient) -> None:
    image = png(BLUE)
    plain = client.post("/embed", json={"inputs": [b64(image)]}).json()
    escaped = {"data_uri": data_uri(image)["data_uri"].replace("+", "%2B")}
    for form in (data_uri(image), data_uri(image, "IMAGE/PNG;name=a"), escaped):
        assert client.post("/embed", json={"inputs": [form]}).json() == plain
    bad = [
        "data:image/png,abc",
        "image/png;base64,abc",
        "data:image/png;base64,***",
        "data:text/html;base64,abcd",
        "",
    ]
    items = client.post(
        "/embed", json={"inputs": [b64(image), *({"data_uri": text} for text in bad)]}
    ).json()["data"]
    assert [item.get("error", {}).get("status") for item in items] == [None, 422, 422, 422, 415, 422]


@pytest.mark.parametrize(
    ("route", "options", "named"),
    [
        ("/embed", {"t_end": "1.5"}, ["t_end", "1.5", "from 0 (noise) to 1"]),
        ("/embed", {"t_end": "nan"}, ["t_end"]),
        ("/embed", {"t_end": ["0.1"] * 9}, ["t_end", "up to 8"]),
        ("/embed", {"t_end": ["0.1", "2"]}, ["t_end"]),
        ("/embed", {"feature": "pixels"}, ["feature", "'pixels'", "hidden or state"]),
        ("/embed", {"model": "other"}, ["'other'", "tiny"]),
        ("/embed", {"model": ""}, ["''", "tiny"]),
        ("/embed", {"model_version": "7"}, ["'7'", "there are: 1"]),
        ("/embed", {"normalize": "perhaps"}, ["normalize", "true or false"]),
        ("/embed", {"encoding_format": "hex"}, ["encoding_format", "base64"]),
        ("/embed", {"top_k": "3"}, ["'top_k'", "allowed: model, model_version, t_end, feature"]),
        ("/embed", {"banana": "3"}, ["'banana'"]),
        ("/embed", {"dimensions": "0"}, ["dimensions"]),
        ("/embed", {"dimensions": "5"}, ["dimensions", "1 to 4"]),
        ("/embed", {"dimensions": "2", "feature": "hidden"}, ["dimensions", "embedding"]),
        ("/embed", {"feature": ["state", "hidden"]}, ["feature", "twice"]),
        ("/classify", {"t_end": "0.3"}, ["t_end", "0.3", "0.8, 0.5"]),
        ("/classify", {"t_end": "1.5"}, ["t_end", "1.5", "0.8, 0.5"]),
        ("/classify", {"t_end": ["0.8", "0.5"]}, ["t_end"]),
        ("/classify", {"top_k": "0"}, ["top_k", "from 1"]),
        ("/classify", {"feature": "state"}, ["'feature'", "top_k"]),
    ],
)
def test_a_wrong_option_is_422_and_names_the_allowed(
    client: TestClient, route: str, options: dict[str, Any], named: list[str]
) -> None:
    in_query = problem(client.post(route, files=files(png()), params=options), 422)
    in_form = problem(client.post(route, files=files(png()), data=options), 422)
    for words in named:
        assert words in in_query
        assert words in in_form


@pytest.mark.parametrize(
    "options",
    [
        {"t_end": True},
        {"t_end": "0.5"},
        {"t_end": []},
        {"normalize": "yes"},
        {"model": 3},
        {"feature": ["state"]},
    ],
)
def test_json_options_have_json_types(client: TestClient, options: dict[str, Any]) -> None:
    problem(client.post("/embed", json={"inputs": [b64(png())], **options}), 422)


def test_the_same_option_twice_must_agree(client: TestClient) -> None:
    same = client.post("/embed", json={"inputs": [b64(png())], "t_end": 0.5}, params={"t_end": "0.50"})
    assert same.status_code == 200
    differing = client.post("/embed", json={"inputs": [b64(png())], "t_end": 0.5}, params={"t_end": "0.6"})
    assert "twice" in problem(differing, 422)
    body = json.dumps({"inputs": [b64(png())], "t_end": 0.5})[:-1]
    for more, status in ((', "t_end": 0.7}', 422), (', "t_end": 0.5}', 200)):
        response = client.post("/embed", content=body + more, headers={"content-type": "application/json"})
        assert response.status_code == status
    repeated = client.post(
        "/classify", files=files(png()), params={"t_end": ["0.5", "0.50"], "top_k": ["1", "1"]}
    )
    assert repeated.json()["t_end"] == 0.5


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"files": [("other", ("a.png", png()))]},
        {"data": {"t_end": "0.5"}},
        {"files": {"t_end": (None, "0.5")}},
        {"files": {"files": (None, "a.png")}},
        {"json": {"inputs": []}},
        {"json": {}},
        {"json": []},
        {"json": {"inputs": [{"b64": 3}]}},
        {"json": {"inputs": ["abc"]}},
        {"json": {"inputs": [{"path": "a.png"}]}},
        {"json": {"inputs": [{"b64": "", "url": ""}]}},
        {"content": b"{", "headers": {"content-type": "application/json"}},
        {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
        {"content": b'{"inputs": [NaN]}', "headers": {"content-type": "application/json"}},
        {
            "content": b"--x",
            "headers": {"content-type": "multipart/form-data; boundary=x; charset=undefined"},
        },
        {"content": b"no form", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"no form", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"", "headers": {"content-type": "image/png"}},
    ],
)
@pytest.mark.parametrize("route", ["/embed", "/classify"])
def test_a_request_without_images(client: TestClient, route: str, request_: dict[str, Any]) -> None:
    status = 415 if request_.get("data") else 422  # httpx sends data alone as a URL-encoded form
    problem(client.post(route, **request_), status)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "video/mp4"])
def test_other_content_types_are_415(client: TestClient, kind: str) -> None:
    assert "multipart/form-data" in problem(
        client.post("/embed", content=b"abc", headers={"content-type": kind}), 415
    )


@pytest.mark.parametrize("charset", ["undefined", "punycode", "no-such"])
def test_a_strange_charset_is_no_bug_of_ours(client: TestClient, charset: str) -> None:
    head = 'Content-Disposition: form-data; name="files"; filename="a.png"'
    body = f"--x\r\n{head}\r\n\r\n".encode() + png() + b"\r\n--x--\r\n"
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    assert client.post("/embed", content=body, headers={"content-type": kind}).status_code in (200, 422)


def test_too_many_images(start: Start) -> None:
    client = start(max_images=2)
    assert client.post("/embed", files=files(png(), png())).status_code == 200
    assert "may have 2 images" in problem(client.post("/embed", files=files(png(), png(), png())), 422)
    assert "may have 2 images" in problem(client.post("/embed", json={"inputs": [b64(png())] * 3}), 422)


def test_too_large_a_body(start: Start) -> None:
    client = start(max_body_bytes=1000)
    assert "1,000 bytes" in problem(client.post("/embed", files=files(bytes(2000))), 413)

    def chunks() -> Any:
        for _ in range(20):
            yield bytes(100)

    response = client.post("/embed", content=chunks(), headers={"content-type": "image/png"})
    assert "1,000 bytes" in problem(response, 413)


def test_an_entry_without_a_head(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "plain", head=False)
    client = start(model_repository=tmp_path / "m")
    assert client.post("/embed", files=files(png())).status_code == 200
    assert "without a head" in problem(client.post("/classify", files=files(png())), 422)


def test_models_and_versions_are_chosen(start: Start, tmp_path: Path) -> None:
    write_tiny_entry(tmp_path / "m", "a")
    write_tiny_entry(tmp_path / "m", "b", versions=("1", "2"), size=16)
    client = start(model_repository=tmp_path / "m")

    def last(**options: str) -> tuple[str, str, float]:
        answer = client.post("/embed", files=files(png()), params=options).json()
        return answer["model"], answer["model_version"], round(answer["data"][0]["embedding"][3], 3)

    assert last() == ("a", "1", 0.8)
    assert last(model="b") == ("b", "2", 0.81)
    assert last(model="b", model_version="1") == ("b", "1", 0.8)


def test_wrong_headers(client: TestClient) -> None:
    for headers in ({"Request-Timeout": "soon"}, {"Request-Timeout": "-1"}, {"Priority": "urgent"}):
        problem(client.post("/embed", files=files(png()), headers=headers), 422)
    for headers in ({"Request-Timeout": "9.5"}, {"Priority": "bulk"}, {"Priority": "u=1, i"}):
        assert client.post("/embed", files=files(png()), headers=headers).status_code == 200


def test_paths_and_methods_that_are_not_there(client: TestClient) -> None:
    problem(client.get("/nothing"), 404)
    problem(client.get("/embed"), 405)
    problem(client.get("/models/other"), 404)


@pytest.mark.parametrize(
    ("accept", "npy"),
    [
        *(("application/x-npy", True), ("Application/X-NPY", True), ("application/x-npy, */*;q=0.5", True)),
        *(("application/json, application/x-npy", True), ("application/x-npy; v=1; q=0.5, text/html", True)),
        *(("application/x-npy;q=0", False), ("application/json, application/x-npy;q=0.1", False)),
        *(("*/*", False), ("application/*", False), ("application/x-npyz", False), ("", False)),
    ],
)
def test_accept_is_weighed(accept: str, npy: bool) -> None:
    assert prefers_npy(accept) == npy


def test_a_slash_too_many_is_nothing_here(client: TestClient) -> None:
    answer = client.post("/embed/", files=[("files", ("a.png", png()))], follow_redirects=False)
    assert (answer.status_code, answer.json()["title"]) == (404, "Not found")


@pytest.mark.parametrize("kind", ["application/json", "image/png", "multipart/form-data; boundary=B"])
def test_a_compressed_body_is_refused_by_name(client: TestClient, kind: str) -> None:
    headers = {"content-type": kind, "content-encoding": "gzip"}
    assert "Content-Encoding" in problem(client.post("/embed", content=b"x", headers=headers), 415)
    plain = client.post(
        "/embed", content=png(), headers={"content-type": "image/png", "content-encoding": "Identity"}
    )
    assert plain.status_code == 200


def test_a_data_uri_in_the_wrong_place_is_told_apart(client: TestClient) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    answer = client.post("/embed", json={"inputs": [{"b64": uri}, {"data_uri": uri}]})
    first, second = answer.json()["data"]
    assert "data_uri" in first["error"]["detail"]
    assert "embedding" in second
