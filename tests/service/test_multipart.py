"""Forms: every part that was sent, or an error; never fewer images or options."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.multipart import MultipartError, TooManyPartsError, parse_multipart
from tests.tiny import png

KIND = "multipart/form-data; boundary=B"
NAMED = b'Content-Disposition: form-data; name="files"; filename="a.png"'
IMAGE = b"--B\r\n" + NAMED + b"\r\n\r\n" + png() + b"\r\n"
WHOLE = IMAGE * 2 + b'--B\r\nContent-Disposition: form-data; name="t_end"\r\n\r\n0.5\r\n--B--\r\n'


def post(client: TestClient, body: bytes, route: str = "/embed") -> Any:
    return client.post(route, content=body, headers={"content-type": KIND})


@pytest.mark.parametrize("route", ["/embed", "/classify"])
def test_a_body_cut_anywhere_is_an_error(client: TestClient, route: str) -> None:
    ends = [*range(0, len(WHOLE), 7), len(WHOLE) - 5, len(WHOLE) - 4]
    assert {post(client, WHOLE[:end], route).status_code for end in ends} == {422}
    for end in (len(WHOLE) - 2, len(WHOLE)):  # the last line break may be missing
        with_level = post(client, WHOLE[:end], route).json()
        assert (len(with_level["data"]), with_level["t_end"]) == (2, 0.5)


@pytest.mark.parametrize("boundary", ["B", '"B"', "B; charset=utf-8"])
def test_parts_and_their_bytes(boundary: str) -> None:
    # Bytes that look like the beginning of a delimiter are an image's own.
    content = b"\r\n--\r\n--A\r\n--" + bytes(range(256)) + b"\r\n-"
    body = b"--B\r\n" + NAMED + b"\r\n\r\n" + content + b"\r\n--B--\r\nepilogue"
    [part] = parse_multipart(body, f"multipart/form-data; boundary={boundary}", 1)
    assert (part.name, part.content, part.is_text) == ("files", content, False)


def test_what_is_no_whole_form() -> None:
    with pytest.raises(TooManyPartsError):
        parse_multipart(WHOLE, KIND, 2)
    with pytest.raises(MultipartError):
        parse_multipart(WHOLE, "multipart/form-data", 9)
    [part] = parse_multipart(b"--B\r\nContent-Type: image/png\r\n\r\nx\r\n--B--", KIND, 1)
    with pytest.raises(MultipartError):
        assert part.name
    header = b"--B\r\nContent-Disposition: form-data; name=files"
    for body in (b"", b"no form", b"--B", b"--B\r\nno header\r\n\r\n", b"--B\r\n\r\nx\r\n--C--\r\n", header):
        with pytest.raises(MultipartError):
            parse_multipart(body, KIND, 9)


def test_an_image_needs_no_filename_but_to_be_one(client: TestClient) -> None:
    named = b'Content-Disposition: form-data; name="files"'
    for more in (b"; filename*=utf-8''%D1%84.jpg", b"\r\nContent-Type: image/png", b""):
        body = b"--B\r\n" + named + more + b"\r\n\r\n" + png() + b"\r\n--B--\r\n"
        assert post(client, body).status_code == 200
    answer = post(client, b"--B\r\n" + named + b"\r\n\r\na.jpg\r\n--B--")
    assert answer.json()["title"] == "No image"
    assert "-F files=@" in answer.json()["detail"]


def test_a_large_image_needs_no_temporary_folder(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    monkeypatch.setattr("tempfile._mkstemp_inner", full)
    monkeypatch.setattr("tempfile.mkstemp", full)
    large = b"--B\r\n" + NAMED + b"\r\n\r\n" + png() + bytes(3 << 20) + b"\r\n--B--\r\n"
    assert post(client, large).status_code == 200
