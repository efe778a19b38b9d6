"""API keys: who may do what, and how many images a minute."""

import hashlib
import hmac
import json
import math
import secrets
import time
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

import structlog
from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import KEY_NEEDED, RATE_LIMIT, SCOPE_MISSING, TOO_MANY_IMAGES, Problem
from service.settings import SettingsError

Scope = Literal["infer", "metrics"]


class Key(BaseModel):
    """One row of the keys file. The key itself is nowhere, only its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], Field(min_length=1)]
    images_per_minute: Annotated[int, Field(ge=1)] | None = None
    expires: date | None = None
    """The day, in UTC, from which the key is refused."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: list[Key] = []


class Keys:
    """The keys of a file, and what each has left of its rate. Without a file the service is open."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._keys = read_keys(path) if path else []
        self._buckets: dict[str, tuple[float, float]] = {}

    def reload(self) -> None:
        """Read the file again; the old keys stay where it can't be used. Raises SettingsError."""
        if self.path:
            self._keys = read_keys(self.path)

    def check(self, request: Request, scope: Scope) -> Key | None:
        """The caller's key, None where the service is open. Raises Problem 401 or 403."""
        if self.path is None:
            return None
        key = self.find(request.headers.get("authorization", ""))
        if key is None:
            detail = "send a valid key as `Authorization: Bearer <key>`"
            raise Problem(KEY_NEEDED, detail, headers={"WWW-Authenticate": "Bearer"})
        if key.expires and datetime.now(UTC).date() >= key.expires:
            detail = f"the key {key.name!r} expired on {key.expires}; ask for a new one"
            raise Problem(KEY_NEEDED, detail, headers={"WWW-Authenticate": "Bearer"})
        # For the access log.
        structlog.contextvars.bind_contextvars(key=key.name)
        if scope not in key.scopes:
            raise Problem(SCOPE_MISSING, f"the key {key.name!r} lacks the scope {scope!r}")
        return key

    def find(self, authorization: str) -> Key | None:
        """The key in an Authorization header, expired or not; None for an unknown one, or where the service is open."""
        scheme, _, token = authorization.partition(" ")
        if not self._keys or scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        # All keys are compared, so that the time says nothing about which one was close.
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return found[-1] if found else None

    def spent(self, key: Key | None) -> Problem | None:
        """The 429 that any image of this key would get now; None where one may be sent."""
        if key is None or key.images_per_minute is None:
            return None
        wait_s = self._wait_s(key.name, key.images_per_minute, 1)
        return _too_fast(key, wait_s) if wait_s else None

    def take(self, key: Key | None, images: int) -> None:
        """Take so many images off the key's rate (a bucket that holds one minute). Raises Problem 429."""
        if key is None or key.images_per_minute is None:
            return
        if images > key.images_per_minute:
            raise Problem(TOO_MANY_IMAGES, f"{_allowed(key)}; send fewer at once")
        if wait_s := self._wait_s(key.name, key.images_per_minute, images):
            raise _too_fast(key, wait_s)
        left, since = self._buckets[key.name]
        self._buckets[key.name] = (left - images, since)

    def _wait_s(self, name: str, rate: int, images: int) -> int:
        """Fill the key's bucket up to now. Returns the seconds until it holds so many images, 0 where it does."""
        now = time.monotonic()
        left, since = self._buckets.get(name, (float(rate), now))
        left = min(float(rate), left + (now - since) * rate / 60)
        self._buckets[name] = (left, now)
        return math.ceil((images - left) * 60 / rate) if left < images else 0


def _too_fast(key: Key, wait_s: int) -> Problem:
    headers = {"Retry-After": str(wait_s)}
    return Problem(RATE_LIMIT, f"{_allowed(key)}; come back in {wait_s} s", headers=headers)


def _allowed(key: Key) -> str:
    return f"the key {key.name!r} may send {key.images_per_minute} images a minute"


def read_keys(path: Path) -> list[Key]:
    """The rows of a keys file. Raises SettingsError that names it."""
    try:
        rows = _File.model_validate(tomllib.loads(path.read_text("utf-8"))).key
        if len({row.name for row in rows}) != len(rows):
            raise ValueError("two keys have the same name")
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    except ValueError as error:
        reason = str(error)
    else:
        return rows
    raise SettingsError(f"PRG_API_KEYS_FILE: {path}: {reason}")


def new_key(name: str, scopes: Sequence[Scope] = ("infer",)) -> tuple[str, str]:
    """(key, its row for the keys file). The key is shown once and kept nowhere."""
    key = f"prg_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    # A JSON string is a TOML string.
    quoted = json.dumps(name, ensure_ascii=False)
    rate = "images_per_minute = 6000\n" if "infer" in scopes else ""
    return key, f'[[key]]\nname = {quoted}\nsha256 = "{digest}"\nscopes = {json.dumps([*scopes])}\n{rate}'


def needs(scope: Scope) -> Callable[[Request], Key | None]:
    """A dependency: the caller's key, with that scope."""

    async def check(request: Request) -> Key | None:
        keys: Keys = request.app.state.keys
        return keys.check(request, scope)

    return check  # type: ignore[return-value]


InferKey = Annotated[Key | None, Depends(needs("infer"))]
MetricsKey = Annotated[Key | None, Depends(needs("metrics"))]
