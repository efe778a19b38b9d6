"""Traces by OpenTelemetry, where its SDK is installed and an OTLP endpoint is named; otherwise nothing.

OpenTelemetry's own OTEL_* variables say where spans go, which are kept, and how the service is called.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import structlog
from opentelemetry.context import Context, get_current
from opentelemetry.propagate import extract, inject
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span, use_span
from starlette.types import Scope

if TYPE_CHECKING:
    # Of the extra `otel`; the API above comes with FastAPI.
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
UNTRACED = ("/health", "/metrics")
METHODS = ("GET", "HEAD", "POST", "OPTIONS")
"""Others have one name, so that callers make no new ones."""
NOTHING: AbstractContextManager[None] = nullcontext()

_provider: "TracerProvider | None" = None
_tracer: Tracer | None = None


def start() -> None:
    """Trace from now on, where there is an endpoint and the SDK."""
    global _provider, _tracer
    if not any(map(os.environ.get, ENDPOINTS)) or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        sender = BatchSpanProcessor(OTLPSpanExporter())
    except ImportError:
        reason = (
            f"{ENDPOINTS[0]} is set, but not all of OpenTelemetry is here: pip install 'prg-service[otel]'"
        )
        structlog.get_logger("prg").warning("no traces", reason=reason)
        return
    own = Resource.create().merge(Resource({"service.name": "prg"}))
    # Not the global one: FastAPI would write spans of its own to that.
    _provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
    _provider.add_span_processor(sender)
    _tracer = _provider.get_tracer("prg")


def stop() -> None:
    """Send what is left, and trace no more."""
    global _provider, _tracer
    if _provider:
        _provider.shutdown()
    _provider = _tracer = None


@contextmanager
def request(scope: Scope, request_id: str) -> Iterator[Span | None]:
    """The span of a whole request, which continues the caller's trace; None for one that is not traced."""
    if _tracer is None or scope["path"].startswith(UNTRACED):
        yield None
        return
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    with _tracer.start_as_current_span(
        "HTTP", extract(headers), SpanKind.SERVER, {"prg.request_id": request_id}, record_exception=False
    ) as own:
        yield own


def answered(own: Span | None, method: str, route: str, status: int) -> None:
    """Say in a request's span what became of it."""
    if own is None:
        return
    known = method in METHODS
    own.update_name(f"{method if known else 'HTTP'} {route}")
    own.set_attribute("http.request.method", method if known else "_OTHER")
    own.set_attribute("http.route", route)
    own.set_attribute("http.response.status_code", status)
    if status >= 500:
        own.set_status(StatusCode.ERROR)


def for_log(own: Span | None) -> dict[str, str]:
    """The trace's id, as the log's lines about a request show it."""
    return {"trace_id": f"{own.get_span_context().trace_id:032x}"} if own else {}


def place() -> Context | None:
    """Where in a trace this runs; None outside of a request that is traced."""
    here = _tracer is not None and get_current_span().get_span_context().is_valid
    return get_current() if here else None


def span(name: str, **facts: str | int) -> AbstractContextManager[Span | None]:
    """A span of what runs inside it."""
    if _tracer is None or place() is None:
        return NOTHING
    return _tracer.start_as_current_span(name, attributes=_attributes(facts), record_exception=False)


def begin(name: str) -> Span | None:
    """A span that its holder ends; one that is never ended is never sent."""
    return _tracer.start_span(name) if _tracer and place() else None


@contextmanager
def shared(name: str, places: Iterable[Context | None], **facts: str | int) -> Iterator[None]:
    """A span of what runs inside it, in the trace of each request that it runs for; inside it is the first's."""
    tracer = _tracer
    begun = [tracer.start_span(name, at, attributes=_attributes(facts)) for at in places if tracer and at]
    try:
        with use_span(begun[0], record_exception=False) if begun else NOTHING:
            yield
    except Exception:
        for one in begun:
            one.set_status(StatusCode.ERROR)
        raise
    finally:
        for one in begun:
            one.end()


def carried(headers: Mapping[str, str]) -> dict[str, str]:
    """The trace as headers of a call to Triton: the current span, else what the caller sent."""
    if place() is None:
        return dict(headers)
    ours: dict[str, str] = {}
    inject(ours)
    return ours


def _attributes(facts: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"prg.{name}": value for name, value in facts.items()}
