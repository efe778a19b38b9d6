"""Metrics, logs and the request id."""

import logging
import random
import re
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entry.config import Fingerprints
from service import tracing
from service.errors import INTERNAL_ERROR, SERVICE_UNAVAILABLE, Problem
from service.headers import secured
from service.limits import HungUp

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
CLIENT_CLOSED = 499
INFERENCE_ROUTES = ("/embed", "/classify", "/v1/embeddings")
Rejection = Literal["queue full", "engine queue", "engine failure"]
REJECTIONS: tuple[Rejection, ...] = get_args(Rejection)

log = structlog.get_logger("prg")


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The caller's X-Request-ID, else a new one."""
    # random, not uuid4: os.urandom is a system call and lets go of the interpreter lock.
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.match(given) else f"{random.getrandbits(128):032x}"


class Metrics:
    """Everything that /metrics shows. Labels are route templates, models, keys and fixed words: few, always."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        self._requests = counter("prg_requests", "Requests answered", ["route", "status"])
        self._seconds = histogram("prg_request_seconds", "Whole time of a request", ["route"])
        self.in_flight = gauge("prg_requests_in_flight", "Requests that are not answered yet")
        self._images = counter("prg_images", "Images taken in", ["model", "outcome"])
        self._key_images = counter("prg_key_images", "Images taken in, by the name of the key", ["key"])
        self._rejected = counter("prg_rejections", "Requests refused with 503", ["reason"])
        self.decode_seconds = histogram("prg_decode_seconds", "Decoding and preprocessing of an image")
        self.queue_seconds = histogram("prg_queue_seconds", "Wait of a job for its first batch", ["model"])
        self.inference_seconds = histogram("prg_inference_seconds", "The model's time for a batch", ["model"])
        self.batch_images = histogram(
            "prg_batch_images", "Rows computed together", ["model"], buckets=BATCHES
        )
        self.queued_images = gauge("prg_queued_images", "Images x levels admitted, not answered")
        self.queue_limit = gauge("prg_queue_limit", "Images x levels that may be: PRG_QUEUE_IMAGES")
        self.engine_up = gauge("prg_engine_up", "1 where a Triton answers", ["address"])
        self.engine_failures = counter(
            "prg_engine_failures", "Calls that a Triton failed, retried or not", ["address"]
        )
        self._ready_models = gauge("prg_model_ready", "1 ready, 0 failed", ["model"])
        versions = ["model", "version", "encoder", "fingerprint"]
        self._info = gauge("prg_model_info", "1 for each version served", versions)
        self.ready = gauge("prg_ready", "1 where /health/ready is good")

        # A counter that first appears with its first event is no increase to Prometheus: alerts would miss it.
        for route in INFERENCE_ROUTES:
            for status in ("500", "503", "504"):
                self._requests.labels(route, status)
        for reason in REJECTIONS:
            self._rejected.labels(reason)

    def models(self, served: Mapping[str, tuple[bool, Mapping[str, Fingerprints]]]) -> None:
        """Show these models and no other: name -> (ready, fingerprints by version)."""
        self._ready_models.clear()
        self._info.clear()
        for name, (ready, fingerprints) in served.items():
            self._ready_models.labels(name).set(ready)
            for version, found in fingerprints.items():
                self._info.labels(name, version, found.encoder, found.model).set(1)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, route: str, status: int, count: int) -> None:
        """Count requests that were not read."""
        self._requests.labels(route, str(status)).inc(count)
        if status == SERVICE_UNAVAILABLE.status:
            self._rejected.labels("queue full").inc(count)

    def images(self, model: str, good: int, bad: int, key: str | None = None) -> None:
        """Count a request's images, and whose they are where there are keys."""
        if key is not None:
            self._key_images.labels(key).inc(good + bad)
        self._images.labels(model, "ok").inc(good)
        self._images.labels(model, "failed").inc(bad)

    def rejected(self, reason: Rejection) -> None:
        """Count a 503."""
        self._rejected.labels(reason).inc()


class Telemetry:
    """ASGI layer around everything: request id, security headers, access log, metrics, a 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(dict(scope["headers"]))
        status = CLIENT_CLOSED

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message.get("headers", ())
                message["headers"] = secured([*given, (b"x-request-id", request_id.encode())])
            await send(message)

        started = time.perf_counter()
        with (
            tracing.request(scope, request_id) as span,
            self.metrics.in_flight.track_inprogress(),
            structlog.contextvars.bound_contextvars(request_id=request_id, **tracing.for_log(span)),
        ):
            try:
                await self.app(scope, receive, tagged)
            # Nobody reads an answer.
            except (HungUp, ClientDisconnect):
                pass
            except Exception:
                log.exception("bug", path=scope["path"])
                # No answer has begun.
                if status == CLIENT_CLOSED:
                    response = Problem(INTERNAL_ERROR, INTERNAL_ERROR.when).response(scope["path"])
                    await response(scope, receive, tagged)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.answered(route, status, seconds)
            tracing.answered(span, scope["method"], route, status)
            quiet = route.startswith(("/health", "/metrics")) and status < 400
            (log.debug if quiet else log.info)(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                ms=round(seconds * 1e3, 1),
                client=(scope.get("client") or ("unknown",))[0],
            )


def configure_logs() -> None:
    """JSON lines on stdout; readable ones where that is a terminal."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper("iso", utc=True),
    ]
    last: list[Any] = (
        # By default a traceback shows each frame's variables, a caller's key among them.
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if sys.stdout.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(),
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    # It logs each URL that it reads, signatures in it and all.
    logging.getLogger("httpx").setLevel(logging.WARNING)
