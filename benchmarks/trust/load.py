"""Callers that send one image after the other and check each answer against its own image and the weights it names."""

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import httpx

from tests.tiny import png, tiny_digest

Kind = Literal["right", "wrong", "refused", "failed", "lost", "unconnected"]
"""Refused: 503 or 429 with a Retry-After. Failed: any other status that is no answer. Lost: the connection ended
before the answer. Unconnected: there was no connection."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    request_id: str
    begun: float
    ended: float
    kind: Kind
    said: str
    """The version that answered, or what was wrong."""


@dataclass
class Seen:
    """What the callers saw."""

    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, *kinds: Kind) -> int:
        """How many are of these kinds."""
        return sum(outcome.kind in kinds for outcome in self.outcomes)

    def versions(self) -> Counter[str]:
        """Answers by the version that they name."""
        return Counter(outcome.said for outcome in self.outcomes if outcome.kind == "right")

    def bad(self) -> list[Outcome]:
        """All that were not answered right."""
        return [outcome for outcome in self.outcomes if outcome.kind != "right"]

    def summary(self) -> str:
        """Counts by kind, with an example of each but the right ones."""
        found = Counter(outcome.kind for outcome in self.outcomes)
        parts = [f"{found.pop('right', 0):,} right"]
        for kind, count in found.items():
            example = next(outcome.said for outcome in self.outcomes if outcome.kind == kind)
            parts.append(f"{count:,} {kind} ({example})")
        return ", ".join(parts)


def random_colour() -> Colour:
    """Says which image it was."""
    return random.randrange(256), random.randrange(256), random.randrange(256)


def judge(response: httpx.Response, colour: Colour) -> tuple[Kind, str]:
    """Whether an answer is right for one image of that colour, by the weights that it names."""
    if response.status_code == 200:
        body = response.json()
        version, found = body["model_version"], body["data"][0].get("embedding", [])
        if is_right(found, colour, version) and body["fingerprint"] == tiny_digest(version)[:12]:
            return "right", version
        return "wrong", f"{colour} was answered {body['data'][0]} by version {version}"
    body = response.json() if "json" in response.headers.get("content-type", "") else {}
    said = f"{response.status_code}: {body.get('detail') or response.text}"[:100]
    if response.status_code in (429, 503) and int(response.headers.get("retry-after", 0)) >= 1:
        return "refused", said
    return "failed", said


def is_right(embedding: list[float], colour: Colour, version: str) -> bool:
    """Whether the tiny model of that version says this of that colour."""
    bias = (int(version) - 1) / 100
    expected = (*(c / 255 + bias for c in colour), 0.8 + bias)
    return len(embedding) == 4 and all(abs(a - b) < 1e-5 for a, b in zip(embedding, expected, strict=True))


async def ask(http: httpx.AsyncClient) -> Outcome:
    """One image of a colour of its own."""
    colour, request_id = random_colour(), uuid.uuid4().hex
    headers = {"content-type": "image/png", "x-request-id": request_id}
    begun = time.monotonic()
    kind: Kind
    try:
        kind, said = judge(await http.post("/embed", content=png(colour, (8, 8)), headers=headers), colour)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        kind, said = "unconnected", repr(error)
    except httpx.HTTPError as error:
        kind, said = "lost", repr(error)
    return Outcome(request_id, begun, time.monotonic(), kind, said)


def client(url: str, keep_alive: bool = True) -> httpx.AsyncClient:
    """A client without limits of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
    return httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False)


@contextlib.asynccontextmanager
async def load(
    url: str, callers: int = 8, pause_s: float = 0.02, open_to: asyncio.Event | None = None
) -> AsyncIterator[Seen]:
    """Callers for as long as the context lasts; where `open_to` is given, they wait while it is not set."""
    seen, stop = Seen(), asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            if open_to is not None and not open_to.is_set():
                await asyncio.sleep(pause_s)
                continue
            seen.outcomes.append(await ask(http))
            await asyncio.sleep(pause_s * random.random() * 2)

    async with client(url) as http:
        tasks = [asyncio.create_task(caller()) for _ in range(callers)]
        try:
            yield seen
        finally:
            stop.set()
            await asyncio.gather(*tasks)
