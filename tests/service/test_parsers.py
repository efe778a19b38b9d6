"""What parses a request, on anything at all: a result, or an error of its own kind; and what was sent comes back."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from entry.errors import ImageError
from service.app import create_app
from service.errors import Problem
from service.intake import Given, parse_options, read_base64, read_data_uri
from service.multipart import MultipartError, parse_multipart
from service.routes.embed import NPY_HEADERS, as_npy, prefers_npy
from service.schemas import ClassifyOptions, EmbedOptions
from service.settings import Settings
from tests.tiny import png, write_tiny_entry

MAX_BYTES = 1000
WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=20)
BOUNDARY = b"B-1"
# Pieces that look like delimiters, beside any bytes.
CONTENT = st.lists(st.sampled_from([b"\r\n", b"--", b"B-", b"\r\n--B", b"\r"]) | st.binary(max_size=20)).map(
    b"".join
)
PARTS = st.lists(st.tuples(WORDS, st.none() | WORDS, CONTENT), max_size=4)
OPTIONS = (*EmbedOptions.model_fields, *ClassifyOptions.model_fields)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
NAMES = st.sampled_from(("inputs", "input", "b64", "data_uri", "url", *OPTIONS)) | st.text(max_size=5)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4)
)
TEXT = st.sampled_from(("true", "0.5", "nan", "1e999", "-0", "1", "embedding", "")) | st.text(max_size=20)


def attempt(errors: type[Exception], call: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives or raises, where it raises one of these."""
    try:
        return call(*arguments)
    except errors as error:
        return error


def form(parts: list[tuple[str, str | None, bytes]]) -> bytes:
    """multipart/form-data."""
    lines = []
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        head = f'Content-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        lines.append(b"--" + BOUNDARY + b"\r\n" + head.encode() + content + b"\r\n")
    return b"".join(lines) + b"--" + BOUNDARY + b"--\r\n"


def parsed(body: bytes, content_type: str = "multipart/form-data; boundary=B-1") -> list[Any]:
    return [(part.name, part.content) for part in parse_multipart(body, content_type, 10)]


@given(PARTS.filter(lambda parts: all(b"\r\n--" + BOUNDARY not in b"\r\n" + c for *_, c in parts)))
def test_a_form_comes_back(parts: list[tuple[str, str | None, bytes]]) -> None:
    if parts:
        assert parsed(form(parts)) == [(name, content) for name, _, content in parts]


@given(PARTS, st.integers(0, 10_000), st.integers(0, 20), st.binary(max_size=20))
def test_a_damaged_form_is_parts_or_an_error(parts: Any, at: int, gone: int, put: bytes) -> None:
    body = form(parts)
    at %= len(body)
    found = attempt(MultipartError, parsed, body[:at] + put + body[at + gone :])
    assert isinstance(found, MultipartError) or len(found) <= 10


@given(st.binary(max_size=100), st.text(st.characters(max_codepoint=255), max_size=40))
def test_anything_is_parts_or_an_error(body: bytes, boundary: str) -> None:
    for content_type in (boundary, f"multipart/form-data; boundary={boundary}"):
        assert isinstance(attempt(MultipartError, parsed, body, content_type), (list, MultipartError))


@given(st.binary(max_size=300), st.booleans(), st.integers(1, 80))
def test_base64_comes_back(data: bytes, padded: bool, width: int) -> None:
    text = base64.b64encode(data).decode()
    text = text if padded else text.rstrip("=")
    lines = "\r\n".join(text[i : i + width] for i in range(0, len(text), width))
    assert read_base64(lines, MAX_BYTES) == data
    for sent in (text, quote(text)):
        assert read_data_uri(f"DATA:image/png;charset=x;base64,{sent}", MAX_BYTES) == data


@given(st.text(max_size=100))
def test_any_text_is_an_image_or_its_error(text: str) -> None:
    for read, sent in (
        (read_base64, text),
        (read_data_uri, text),
        (read_data_uri, f"data:image/png;base64,{text}"),
    ):
        found = attempt(ImageError, read, sent, MAX_BYTES)
        assert isinstance(found, bytes) or found.status in (413, 415, 422)


@given(st.lists(st.tuples(st.sampled_from(OPTIONS) | st.text(max_size=5), TEXT), max_size=4))
def test_any_options_of_text_are_options_or_a_problem(pairs: list[tuple[str, str]]) -> None:
    for kind in (EmbedOptions, ClassifyOptions):
        found = attempt(Problem, parse_options, kind, [Given(pairs, True, "the query")])
        if isinstance(found, Problem):
            assert found.kind.status == 422
        else:
            assert found.model_fields_set == {name for name, _ in pairs}


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=5)), WORDS)
def test_an_npy_comes_back(values: np.ndarray, word: str) -> None:
    facts = dict.fromkeys(NPY_HEADERS.values(), word.encode("ascii", "ignore").decode())
    response = as_npy(values, facts)
    assert np.array_equal(np.load(io.BytesIO(bytes(response.body))), values, equal_nan=True)
    assert {name: response.headers[name] for name in NPY_HEADERS} == {
        n: facts[f] for n, f in NPY_HEADERS.items()
    }


@given(st.text(max_size=60) | st.from_regex(r"([a-z*]+/[a-z*]+(;q=[01](\.\d+)?)?,? ?)*", fullmatch=True))
def test_any_accept_header_says_yes_or_no(accept: str) -> None:
    assert prefers_npy(accept) in (True, False)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    repository = tmp_path_factory.mktemp("models")
    write_tiny_entry(repository)
    with TestClient(create_app(Settings(model_repository=repository))) as client:
        yield client


IMAGE = base64.b64encode(png(size=(8, 8))).decode()
BODIES = JSON | st.dictionaries(NAMES, JSON, max_size=3).map(lambda more: {"inputs": [{"b64": IMAGE}]} | more)


@given(BODIES)
def test_any_json_is_answered_or_refused(api: TestClient, body: Any) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    for path in ("/embed", "/classify", "/v1/embeddings"):
        answer = api.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404, 422), answer.text
        assert answer.json()


@given(
    st.binary(max_size=200),
    st.sampled_from(("application/json", "multipart/form-data; boundary=B", "image/x")),
)
def test_any_bytes_are_refused(api: TestClient, body: bytes, kind: str) -> None:
    for path in ("/embed", "/v1/embeddings"):
        answer = api.post(path, content=body, headers={"content-type": kind})
        assert answer.status_code in (400, 422), answer.text
