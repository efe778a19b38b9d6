"""Settings by environment variables, checked before anything starts."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from entry.images import Limits

Positive = Annotated[int, Field(ge=1)]
OTHER_VARIABLES = frozenset({"PRG_KEY", "PRG_METRICS_KEY_FILE", "PRG_PUBLISH", "PRG_TEST_DATA"})
"""No settings of the service: of `prg embed`, of the compose file, and of the tests."""

SHIPPED = Path(__file__).parent / "model_repository"
"""The default model's, which a wheel has and a checkout does not."""


def _repository() -> Path:
    here = Path("./model_repository")
    return SHIPPED if SHIPPED.exists() and not here.exists() else here


class SettingsError(ValueError):
    """A setting that can't be used; the message names the variable and what to do."""


class Settings(BaseSettings):
    """Every field is read from PRG_<NAME>."""

    model_config = SettingsConfigDict(
        env_prefix="PRG_", frozen=True, env_ignore_empty=True, use_attribute_docstrings=True
    )

    engine: Literal["embedded", "triton"] = "embedded"
    """Where models run: in this process, or in Triton servers."""
    triton_url: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:8001",)
    """Comma-separated host:port of the gRPC of one or several Tritons that serve the same models."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Of the embedded engine: cpu, cuda, cuda:1 and so on; auto: the GPU where there is one."""
    precision: Literal["entry", "bf16"] = "entry"
    """What the embedded engine's networks compute in: the entry's own precision, or bf16. Fingerprints then end in
    -bf16."""
    compile_cache: Path | None = None
    """Folder for models compiled for this processor, which the embedded engine makes in the background and then uses;
    who can write there runs code here. Unset: none are compiled."""
    model_repository: Path = Field(default_factory=_repository)
    """Folder of entries for the embedded engine; by default ./model_repository, or the shipped model without one."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every interface."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on."""
    models: str = ""
    """Comma-separated `name` or `name:version`; empty: all found."""
    default_model: str = ""
    """Empty: the only one, else the first by name."""
    max_images: Positive = 64
    """Images of one request."""
    max_image_bytes: Positive = 20 << 20
    """Bytes of one image's file."""
    max_body_bytes: Positive = 64 << 20
    """Bytes of one request."""
    max_pixels: Positive = 50_000_000
    """Pixels of one image, known from its header before it is decoded."""
    max_batch: Annotated[int, Field(ge=1, le=64)] = 32
    """Rows (images x levels) that the embedded engine computes together."""
    max_delay_ms: Annotated[float, Field(ge=0, le=1000)] = 3
    """How long a batch waits to become full."""
    queue_images: Positive = 512
    """Rows (images x levels) admitted and not yet answered; more are refused with 503."""
    max_connections: Positive = 2000
    """Open connections; of more, the one whose caller sends nothing for longest is closed."""
    request_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30
    """After this many seconds a request is answered with 504."""
    allow_urls: bool = False
    """Whether images may be named by URL; only public addresses are read."""
    drain_s: Annotated[float, Field(ge=0, le=600)] = 0
    """After SIGTERM, how long to go on serving while /health/ready says no: a balancer's time to notice."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated origins whose pages may call this service."""
    api_keys_file: Path | None = None
    """TOML with the keys; unset: the service is open."""

    @field_validator("cors_origins", "triton_url", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _parts(value) if isinstance(value, str) else value

    @field_validator("port", mode="before")
    @classmethod
    def _no_service_link(cls, value: object) -> object:
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                "Kubernetes sets it in every pod beside a Service called prg; put enableServiceLinks: false into the "
                "pod's spec, or give the Service another name"
            )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return value if value == ("*",) else tuple(map(_origin, value))

    @field_validator("triton_url")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or "/" in host:
                raise ValueError(f"{address!r} must be host:port of Triton's gRPC, such as triton:8001")
        if not value:
            raise ValueError("at least one host:port of Triton's gRPC is needed, such as triton:8001")
        return value

    @field_validator("models")
    @classmethod
    def _names(cls, value: str) -> str:
        parts = _parts(value)
        if value.strip() and not (parts and all(part.partition(":")[0] for part in parts)):
            raise ValueError("names no model; it is `name` or `name:version`, several by comma")
        return value

    @property
    def image_limits(self) -> Limits:
        """What one image may be."""
        return Limits(self.max_image_bytes, self.max_pixels)

    @property
    def chosen_models(self) -> dict[str, frozenset[str] | None] | None:
        """Names to serve, each with its versions (None: all of them); None: serve whatever is found."""
        if not self.models.strip():
            return None
        chosen: dict[str, frozenset[str] | None] = {}
        for item in _parts(self.models):
            name, _, version = item.partition(":")
            known = chosen.get(name, frozenset())
            chosen[name] = None if not version or known is None else known | {version}
        return chosen


def load_settings() -> Settings:
    """Settings from the environment. Raises SettingsError naming each variable that can't be used."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"PRG_{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise SettingsError("; ".join(lines)) from None


def unknown_variables(names: Iterable[str]) -> dict[str, str | None]:
    """Of these environment variables, those that begin like a setting and are none -> the one perhaps meant."""
    known = {field.upper() for field in Settings.model_fields}
    found: dict[str, str | None] = {}
    for name in names:
        own = name.upper().removeprefix("PRG_")
        if own != name.upper() and own not in known and name.upper() not in OTHER_VARIABLES:
            close = difflib.get_close_matches(own, known, 1)
            found[name] = f"PRG_{close[0]}" if close else None
    return found


def _origin(text: str) -> str:
    """An origin as browsers send it (RFC 6454): scheme://host, with :port where that is not the scheme's own.

    Raises ValueError for what no browser ever sends.
    """
    try:
        url = urlsplit(text.strip().lower())
        port = url.port
    except ValueError:
        raise ValueError(f"{text!r} is no origin such as https://app.example") from None
    good = url.scheme in ("http", "https") and url.hostname and re.fullmatch(r"[\w.:-]+", url.hostname)
    if not good or url.path not in ("", "/") or url.query or url.fragment or "@" in url.netloc:
        raise ValueError(
            f"{text!r} is no origin; one is scheme://host, such as https://app.example, or * alone for all"
        )
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else url.hostname
    return f"{url.scheme}://{host}" + (
        f":{port}" if port not in (None, {"http": 80, "https": 443}[url.scheme]) else ""
    )


def _parts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))
