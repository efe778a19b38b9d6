"""Metrics, logs and the request id."""

import logging
import re
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal, get_args

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import internal
from service.limits import HungUp

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
CLIENT_CLOSED = 499
INFERENCE_ROUTES = ("/embed", "/classify", "/v1/embeddings")
Rejection = Literal["queue full", "engine queue", "engine failure"]
REJECTIONS: tuple[Rejection, ...] = get_args(Rejection)

log = structlog.get_logger("prg")


class Metrics:
    """Everything that /metrics shows. Labels are route templates, models and fixed words: few, always."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self._requests = Counter("prg_requests", "Requests answered", ["route", "status"], registry=r)
        self._seconds = Histogram(
            "prg_request_seconds", "Whole time of a request", ["route"], buckets=SECONDS, registry=r
        )
        self.in_flight = Gauge("prg_requests_in_flight", "Requests that are not answered yet", registry=r)
        self._images = Counter("prg_images", "Images taken in", ["model", "outcome"], registry=r)
        self._rejected = Counter("prg_rejections", "Requests refused with 503", ["reason"], registry=r)
        self.decode_seconds = Histogram(
            "prg_decode_seconds", "Decoding and preprocessing of an image", buckets=SECONDS, registry=r
        )
        self.queue_seconds = Histogram(
            "prg_queue_seconds", "Wait of a job for its first batch", ["model"], buckets=SECONDS, registry=r
        )
        self.inference_seconds = Histogram(
            "prg_inference_seconds", "The model's time for a batch", ["model"], buckets=SECONDS, registry=r
        )
        self.batch_images = Histogram(
            "prg_batch_images", "Rows computed together", ["model"], buckets=BATCHES, registry=r
        )
        self.queued_images = Gauge("prg_queued_images", "Images x levels admitted, not answered", registry=r)
        self.engine_up = Gauge("prg_engine_up", "1 where a Triton answers", ["address"], registry=r)
        self.engine_failures = Counter(
            "prg_engine_failures", "Calls that a Triton failed, retried or not", ["address"], registry=r
        )
        self._ready_models = Gauge("prg_model_ready", "1 ready, 0 failed", ["model"], registry=r)
        self._info = Gauge(
            "prg_model_info", "1 for each version served", ["model", "version", "fingerprint"], registry=r
        )
        self.ready = Gauge("prg_ready", "1 where /health/ready is good", registry=r)

        # A counter that first appears with its first event is no increase to Prometheus: alerts would miss it.
        for route in INFERENCE_ROUTES:
            for status in ("500", "503", "504"):
                self._requests.labels(route, status)
        for reason in REJECTIONS:
            self._rejected.labels(reason)

    def models(self, served: Mapping[str, tuple[bool, Mapping[str, str]]]) -> None:
        """Show these models and no other: name -> (ready, fingerprint by version)."""
        self._ready_models.clear()
        self._info.clear()
        for name, (ready, fingerprints) in served.items():
            self._ready_models.labels(name).set(ready)
            for version, fingerprint in fingerprints.items():
                self._info.labels(name, version, fingerprint).set(1)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def images(self, model: str, good: int, bad: int) -> None:
        """Count a request's images."""
        self._images.labels(model, "ok").inc(good)
        self._images.labels(model, "failed").inc(bad)

    def rejected(self, reason: Rejection) -> None:
        """Count a 503."""
        self._rejected.labels(reason).inc()


class Telemetry:
    """ASGI layer around everything: request id, access log, metrics, and a 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.match(given) else uuid.uuid4().hex
        status = CLIENT_CLOSED

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        started = time.perf_counter()
        with (
            self.metrics.in_flight.track_inprogress(),
            structlog.contextvars.bound_contextvars(request_id=request_id),
        ):
            try:
                await self.app(scope, receive, tagged)
            except (HungUp, ClientDisconnect):
                pass  # nobody reads an answer
            except Exception:
                log.exception("bug", path=scope["path"])
                if status == CLIENT_CLOSED:  # no answer has begun
                    await internal().at(scope["path"])(scope, receive, tagged)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.answered(route, status, seconds)
            quiet = route.startswith(("/health", "/metrics")) and status < 400
            (log.debug if quiet else log.info)(
                "request", method=scope["method"], route=route, status=status, ms=round(seconds * 1e3, 1)
            )


def configure_logs() -> None:
    """JSON lines on stdout; readable ones where that is a terminal."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper("iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
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
