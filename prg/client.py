"""Python client of a running service: paths or bytes in, numpy out, without torch."""

import asyncio
import base64
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast

import httpx
import numpy as np

from prg.bounded import in_tasks, in_threads
from prg.errors import PrgError
from prg.uploads import Files, Images, portions

T = TypeVar("T")
Work = Callable[[tuple[int, Files]], Coroutine[Any, Any, None]]
"""On the files of a request, by its number."""
Http = TypeVar("Http", httpx.AsyncClient, httpx.Client)
URL = "http://127.0.0.1:8000"
CONCURRENCY = 4
"""Requests in flight at once: the service decodes some while its model computes others."""
RETRIES = 6
"""How often a request is sent again that was refused for load, or met no server."""
REFUSED_RETRIES = 3
"""Where no server listens: 1.75 seconds in all."""
LONGEST_WAIT_S = 60.0


class ServiceError(RuntimeError):
    """An answer that is an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class NoServiceError(PrgError):
    """No service answers at the address."""


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
    known: list[float | None]
    """Of each image the share of held-out images that were less typical; None where the model has no calibration."""
    errors: dict[int, str]
    model: str
    fingerprint: str


class EmbedOptions(TypedDict, total=False):
    """Options of `embed`, as POST /embed has them."""

    model: str
    model_version: str
    t_end: float | list[float]
    feature: Literal["embedding", "hidden", "state"]
    normalize: bool
    dimensions: int


class ClassifyOptions(TypedDict, total=False):
    """Options of `classify`, as POST /classify has them."""

    model: str
    model_version: str
    t_end: float
    top_k: int


class AsyncClient:
    """Calls a service; waits and tries again where it is asked to (Retry-After) or meets no server.

    Images may be any number: they travel in several requests, of which `concurrency` are in flight at once. The first
    that fails cancels the others. A file that can't be read is an error of its row.
    Proxies of the environment are used, but not for this machine. Raises ServiceError for an answer that is an error,
    NoServiceError where no service answers, PrgError for a url or a proxy that can't be used.
    """

    def __init__(
        self, url: str = URL, key: str | None = None, timeout_s: float = 60, concurrency: int = CONCURRENCY
    ) -> None:
        self._http = _connected(httpx.AsyncClient, url, key, timeout_s)
        self._concurrency = _at_least_one(concurrency)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def embed(self, images: Images, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Embeddings of images."""
        facts, items = await self._post("/embed", images, {**options, "encoding_format": "base64"})
        t_end, dim = options.get("t_end"), facts["dim"]
        shape = (len(items), len(t_end), dim) if isinstance(t_end, list) else (len(items), dim)
        vectors = np.full(shape, np.nan, np.float32)
        for row, item in enumerate(items):
            if "embedding" in item:
                vectors[row] = _decoded(item["embedding"])
            elif "embeddings" in item:
                vectors[row] = [_decoded(level["embedding"]) for level in item["embeddings"]]
        return Embeddings(vectors, _errors(items), facts["model"], facts["fingerprint"])

    async def classify(self, images: Images, **options: Unpack[ClassifyOptions]) -> Classes:
        """Classes of images."""
        facts, items = await self._post("/classify", images, {**options})
        predictions = [[Prediction(**p) for p in item.get("predictions", ())] for item in items]
        known = [item.get("known") for item in items]
        return Classes(predictions, known, _errors(items), facts["model"], facts["fingerprint"])

    async def models(self) -> dict[str, Any]:
        """What GET /models answers."""
        return _read(await self._request("GET", "/models"))

    async def _post(
        self, path: str, images: Images, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(an answer, the items of all) of as many requests as the images need, all of the same weights."""
        found = _Found()

        async def one(portion: tuple[int, Files]) -> None:
            number, files = portion
            found.add(number, await self._answer(path, files, options))

        await self._each(one, enumerate(portions(images, _levels(options), found.unreadable)))
        return found.together()

    async def _each(self, work: Work, pieces: Iterable[tuple[int, Files]]) -> None:
        await in_tasks(work, pieces, self._concurrency)

    async def _answer(
        self, path: str, files: Files, options: Mapping[str, Any]
    ) -> "dict[str, Any] | ServiceError":
        """The answer to one request; of one image larger than a request may be, the refusal."""
        try:
            return _read(await self._request("POST", path, files=files, data=options))
        except ServiceError as error:
            if error.status != 413 or len(files) > 1:
                raise
            return error

    async def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        """The answer to one request, asked again where that makes sense."""
        for attempt in range(RETRIES + 1):
            response, failure, last = None, None, attempt == RETRIES
            try:
                response = await self._send(method, path, **content)
                last = last or response.status_code not in (429, 503)
            except httpx.TransportError as error:
                failure = error
                last = last or (isinstance(error, httpx.ConnectError) and attempt == REFUSED_RETRIES)
            if last:
                break
            await self._sleep(_wait_s(response, attempt))
        if response is None:
            assert failure is not None
            raise NoServiceError(
                f"no service answers at {failure.request.url} ({failure}); start one with prg-serve, or name another "
                "address"
            ) from failure
        return response

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        return await self._http.request(method, path, **content)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Found:
    """What several requests were answered, put together in the order of the images; threads may share one."""

    def __init__(self) -> None:
        self.unreadable: dict[int, str] = {}
        self._items: dict[int, list[dict[str, Any]]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        """An answer, by the fingerprint of the weights."""
        self._refused: ServiceError | None = None

    def add(self, number: int, answer: dict[str, Any] | ServiceError) -> None:
        """The answer to the request of that number. Raises ServiceError where it is of other weights."""
        if isinstance(answer, ServiceError):
            self._refused = answer
            self._items[number] = [{"error": {"detail": str(answer)}}]
            return
        self._facts[answer["fingerprint"]] = answer
        if len(self._facts) > 1:
            raise ServiceError(409, "the model was replaced between two requests; ask again")
        self._items[number] = answer["data"]

    def together(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(an answer, the items of all)."""
        if not self._facts:
            raise self._refused or ValueError("no images")
        [facts] = self._facts.values()
        items = [item for number in sorted(self._items) for item in self._items[number]]
        for row, reason in self.unreadable.items():
            items[row] = {"error": {"detail": reason}}
        return facts, items


class _Blocking(AsyncClient):
    """One call that waits by blocking its threads, so that its coroutines never give control away."""

    def __init__(self, http: httpx.Client, concurrency: int) -> None:
        self._blocking = http
        self._concurrency = concurrency
        self._over = threading.Event()

    async def _each(self, work: Work, pieces: Iterable[tuple[int, Files]]) -> None:
        try:
            in_threads(lambda piece: _now(work(piece)), pieces, self._concurrency)
        finally:
            self._over.set()

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        return self._blocking.request(method, path, **content)

    async def _sleep(self, seconds: float) -> None:
        if self._over.wait(seconds):
            raise asyncio.CancelledError


class Client:
    """The same without asyncio; threads may share one."""

    def __init__(
        self, url: str = URL, key: str | None = None, timeout_s: float = 60, concurrency: int = CONCURRENCY
    ) -> None:
        self._http = _connected(httpx.Client, url, key, timeout_s)
        self._concurrency = _at_least_one(concurrency)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def embed(self, images: Images, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Embeddings of images."""
        return _now(self._call().embed(images, **options))

    def classify(self, images: Images, **options: Unpack[ClassifyOptions]) -> Classes:
        """Classes of images."""
        return _now(self._call().classify(images, **options))

    def models(self) -> dict[str, Any]:
        """What GET /models answers."""
        return _now(self._call().models())

    def _call(self) -> _Blocking:
        return _Blocking(self._http, self._concurrency)


def _now(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits for anything."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("a blocking client waited")


def _connected(kind: Callable[..., Http], url: str, key: str | None, timeout_s: float) -> Http:
    """An HTTP client of that kind. Raises PrgError."""
    try:
        address = httpx.URL(url.strip())
        host = address.host if address.scheme in ("http", "https") else ""
    except (httpx.InvalidURL, UnicodeError):
        host = ""
    if not host:
        raise PrgError(f"{url.rpartition('@')[2]!r} is no address of a service; one is {URL}")
    here = host in ("localhost", "::1") or host.startswith("127.")
    try:
        return kind(base_url=address, headers=_headers(key), timeout=timeout_s, trust_env=not here)
    except (ImportError, ValueError) as error:
        raise PrgError(
            f"a proxy of the environment can't be used ({error}); unset it, or add {host} to NO_PROXY"
        ) from None


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


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
    """What the service asks for (or a proxy before it, perhaps by date), else doubling from a quarter of a second."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    seconds = 0.25 * 2**attempt
    if asked.isdecimal():
        seconds = float(asked)
    elif asked:
        with contextlib.suppress(ValueError):  # neither seconds nor a date
            seconds = max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    return min(seconds, LONGEST_WAIT_S)


def _levels(options: Mapping[str, Any]) -> int:
    """How many rows an image is to the service."""
    t_end = options.get("t_end")
    return len(t_end) if isinstance(t_end, list) else 1


def _at_least_one(concurrency: int) -> int:
    if concurrency < 1:
        raise PrgError(f"concurrency = {concurrency}: must be at least 1")
    return concurrency


def _errors(items: list[dict[str, Any]]) -> dict[int, str]:
    return {row: item["error"]["detail"] for row, item in enumerate(items) if "error" in item}


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
