"""Python client of a running service: paths or bytes in, numpy out, without torch."""

import asyncio
import base64
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import httpx
import numpy as np

Image = str | Path | bytes
"""A file's path, or its content."""
T = TypeVar("T")
URL = "http://127.0.0.1:8000"
REQUEST_IMAGES = 32
REQUEST_BYTES = 24 << 20
RETRIES = 6
"""How often a request is sent again that was refused for load, or met no server."""
LONGEST_WAIT_S = 60.0


class ServiceError(RuntimeError):
    """An answer that is an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in the order of the images; a failed image is a row of NaN, and has an error."""

    vectors: np.ndarray  # float32 [N, D], or [N, levels, D] where t_end was a list
    errors: dict[int, str]
    model: str
    fingerprint: str
    """Of the weights: compare vectors only where it is equal."""


@dataclass(frozen=True)
class Prediction:
    """One class of one image."""

    label: str
    class_id: int
    probability: float
    logit: float


@dataclass(frozen=True)
class Classes:
    """Classes of each image, most probable first; a failed image has none, and an error."""

    predictions: list[list[Prediction]]
    errors: dict[int, str]
    model: str
    fingerprint: str


class EmbedOptions(TypedDict, total=False):
    """Options of `embed`, as POST /embed has them."""

    model: str
    model_version: str
    t_end: float | list[float]
    feature: Literal["state", "hidden"]
    normalize: bool


class ClassifyOptions(TypedDict, total=False):
    """Options of `classify`, as POST /classify has them."""

    model: str
    model_version: str
    t_end: float
    top_k: int


class Client:
    """Calls a service; waits and tries again where it is asked to (Retry-After) or meets no server.

    Images may be any number: they travel in several requests. Raises ServiceError for an answer that is an
    error, httpx.TransportError where no server answers, OSError for a file that can't be read.
    """

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = 60) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=timeout_s)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def embed(self, images: Iterable[Image], **options: Unpack[EmbedOptions]) -> Embeddings:
        """Embeddings of images."""
        return self._run(_embed(images, options))

    def classify(self, images: Iterable[Image], **options: Unpack[ClassifyOptions]) -> Classes:
        """Classes of images."""
        return self._run(_classify(images, options))

    def models(self) -> dict[str, Any]:
        """What GET /models answers."""
        return self._run(_models())

    def _run(self, flow: "_Flow[T]") -> T:
        answer: dict[str, Any] | None = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            answer = None
            if isinstance(step, float):
                time.sleep(step)
            else:
                try:
                    answer = {"response": self._http.request(step.method, step.path, **step.body())}
                except httpx.TransportError as error:
                    answer = {"error": error}


class AsyncClient:
    """The same, for asyncio."""

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = 60) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=timeout_s)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def embed(self, images: Iterable[Image], **options: Unpack[EmbedOptions]) -> Embeddings:
        """Embeddings of images."""
        return await self._run(_embed(images, options))

    async def classify(self, images: Iterable[Image], **options: Unpack[ClassifyOptions]) -> Classes:
        """Classes of images."""
        return await self._run(_classify(images, options))

    async def models(self) -> dict[str, Any]:
        """What GET /models answers."""
        return await self._run(_models())

    async def _run(self, flow: "_Flow[T]") -> T:
        answer: dict[str, Any] | None = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            answer = None
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                try:
                    answer = {"response": await self._http.request(step.method, step.path, **step.body())}
                except httpx.TransportError as error:
                    answer = {"error": error}


@dataclass(frozen=True)
class _Call:
    """A request to be made."""

    method: str
    path: str
    files: list[tuple[str, tuple[str, bytes]]] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        return {"files": self.files, "data": self.options} if self.files else {}


_Flow = Generator[_Call | float, Any, T]
"""What a method does, free of input and output: yields calls to make and seconds to wait, returns its result."""


def _embed(images: Iterable[Image], options: EmbedOptions) -> _Flow[Embeddings]:
    answers = yield from _post("/embed", images, {**options, "encoding_format": "base64"})
    items = [item for answer in answers for item in answer["data"]]
    t_end, dim = options.get("t_end"), answers[0]["dim"]
    shape = (len(items), len(t_end), dim) if isinstance(t_end, list) else (len(items), dim)
    vectors = np.full(shape, np.nan, np.float32)
    for row, item in enumerate(items):
        if "embedding" in item:
            vectors[row] = _decoded(item["embedding"])
        elif "embeddings" in item:
            vectors[row] = [_decoded(level["embedding"]) for level in item["embeddings"]]
    return Embeddings(vectors, _errors(items), answers[0]["model"], answers[0]["fingerprint"])


def _classify(images: Iterable[Image], options: ClassifyOptions) -> _Flow[Classes]:
    answers = yield from _post("/classify", images, {**options})
    items = [item for answer in answers for item in answer["data"]]
    predictions = [[Prediction(**p) for p in item.get("predictions", ())] for item in items]
    return Classes(predictions, _errors(items), answers[0]["model"], answers[0]["fingerprint"])


def _models() -> _Flow[dict[str, Any]]:
    return (yield from _call(_Call("GET", "/models")))


def _post(path: str, images: Iterable[Image], options: Mapping[str, Any]) -> _Flow[list[dict[str, Any]]]:
    """The answers to as many requests as the images need, all of the same weights."""
    answers: list[dict[str, Any]] = []
    for files in _portions(images):
        answer = yield from _call(_Call("POST", path, files, options))
        if answers and answer["fingerprint"] != answers[0]["fingerprint"]:
            raise ServiceError(409, "the model was replaced between two requests; ask again")
        answers.append(answer)
    if not answers:
        raise ValueError("no images")
    return answers


def _call(call: _Call) -> _Flow[dict[str, Any]]:
    """The answer to one request, asked again where that makes sense."""
    for attempt in range(RETRIES + 1):
        outcome = yield call
        response: httpx.Response | None = outcome.get("response")
        if response is not None and response.status_code not in (429, 503):
            return _read(response)
        if attempt < RETRIES:
            yield _wait_s(response, attempt)
    if response is None:
        raise outcome["error"]
    return _read(response)


def _read(response: httpx.Response) -> dict[str, Any]:
    """The body; one that has no good image is an answer too. Raises ServiceError."""
    try:
        body: dict[str, Any] = response.json()
    except ValueError:
        body = {}
    if response.is_success or "data" in body:
        return body
    raise ServiceError(response.status_code, body.get("detail") or response.text[:200])


def _wait_s(response: httpx.Response | None, attempt: int) -> float:
    """What the service asks for, else doubling from a quarter of a second."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(asked) if asked.isdecimal() else 0.25 * 2**attempt, LONGEST_WAIT_S)


def _portions(images: Iterable[Image]) -> Iterator[list[tuple[str, tuple[str, bytes]]]]:
    files: list[tuple[str, tuple[str, bytes]]] = []
    size = 0
    for image in images:
        name, content = (
            ("image", image) if isinstance(image, bytes) else (Path(image).name, Path(image).read_bytes())
        )
        if files and (len(files) == REQUEST_IMAGES or size + len(content) > REQUEST_BYTES):
            yield files
            files, size = [], 0
        files.append(("files", (name, content)))
        size += len(content)
    if files:
        yield files


def _errors(items: list[dict[str, Any]]) -> dict[int, str]:
    return {row: item["error"]["detail"] for row, item in enumerate(items) if "error" in item}


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
