"""Traces, as a real receiver of OTLP gets them from the service, and from Triton behind it."""

import json
import os
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest as Exported,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.app import create_app
from service.settings import Settings
from tests.real_triton.server import TritonServer, find_server
from tests.service.conftest import IMAGE, eventually
from tests.tiny import write_tiny_entry

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


@dataclass
class Receiver:
    """A collector's place, and the spans that came, each with the name of the service that sent it."""

    url: str = ""
    spans: list[tuple[str, Span]] = field(default_factory=list)

    def of(self, trace: str) -> dict[str, Span]:
        """The service's spans of a trace by name."""
        return {span.name: span for who, span in self.spans if who == "prg" and span.trace_id.hex() == trace}


def from_json(body: bytes) -> Exported:
    """OTLP's own JSON, which Triton speaks: its ids are hexadecimal, where protobuf's JSON has base64."""

    def protobuf(pairs: list[tuple[str, object]]) -> dict[str, object]:
        ids = {"traceId", "spanId", "parentSpanId"}
        return {k: b64encode(bytes.fromhex(str(v))).decode() if k in ids else v for k, v in pairs}

    return json_format.ParseDict(json.loads(body, object_pairs_hook=protobuf), Exported())


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_json = self.headers["Content-Type"] == "application/json"
            for sent in (from_json(body) if is_json else Exported.FromString(body)).resource_spans:
                names = {a.key: a.value.string_value for a in sent.resource.attributes}
                for scope in sent.scope_spans:
                    found.spans += [(names["service.name"], span) for span in scope.spans]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def traced(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """The service that a test starts sends its spans there."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    return receiver


def embedded(tmp_path: Path, **settings: object) -> TestClient:
    write_tiny_entry(tmp_path / "models")
    return TestClient(create_app(Settings(model_repository=tmp_path / "models", **settings)))  # type: ignore[arg-type]


def facts(span: Span) -> dict[str, str | int]:
    values = {a.key: a.value for a in span.attributes}
    return {key: getattr(value, str(value.WhichOneof("value"))) for key, value in values.items()}


def test_a_request_is_one_trace_that_continues_its_callers(
    traced: Receiver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with embedded(tmp_path) as client:
        answer = client.post("/embed", files=IMAGE * 2, headers=CALLED)
        for path in ("/health/live", "/metrics"):
            client.get(path)
        client.request("SOME-NAME", "/embed", headers=CALLED | {"traceparent": f"00-{'ab' * 16}-{CALLER}-01"})
    spans = traced.of(TRACE)
    assert spans.keys() == {"POST /embed", "admission", "decode", "queue", "inference"}
    whole = spans.pop("POST /embed")
    assert (whole.parent_span_id.hex(), whole.kind) == (CALLER, Span.SPAN_KIND_SERVER)
    assert facts(whole) == {
        "http.request.method": "POST",
        "http.route": "/embed",
        "http.response.status_code": 200,
        "prg.request_id": answer.headers["x-request-id"],
    }
    assert {span.parent_span_id for span in spans.values()} == {whole.span_id}
    stages = sorted(spans.values(), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in stages] == ["admission", "decode", "queue", "inference"]
    ends = [whole.start_time_unix_nano, *(span.end_time_unix_nano for span in stages)]
    assert ends == sorted(ends)
    assert facts(spans["inference"]) == {"prg.model": "tiny", "prg.batch": 2}
    assert facts(spans["decode"]) == {"prg.images": 2}
    [other] = traced.of("ab" * 16).values()
    assert (other.name, facts(other)["http.request.method"]) == ("HTTP /embed", "_OTHER")
    assert len(traced.spans) == 6
    [line] = [line for line in capsys.readouterr().out.splitlines() if "route=/embed status=200" in line]
    assert f"trace_id={TRACE}" in line


def test_a_batch_stands_in_the_trace_of_each_of_its_requests(traced: Receiver, tmp_path: Path) -> None:
    traces = ["1" * 32, "2" * 32]
    with embedded(tmp_path, max_batch=2, max_delay_ms=1000) as client, ThreadPoolExecutor(2) as pool:

        def ask(trace: str) -> int:
            parent = {"traceparent": f"00-{trace}-{CALLER}-01"}
            return client.post("/classify", files=IMAGE, headers=parent).status_code

        eventually(lambda: client.get("/health/ready").status_code == 200)  # no canary is in their batch
        # Something else is in work, so that the first of the two waits for the second.
        with client.app.state.connections.admission.admit(1):
            assert list(pool.map(ask, traces)) == [200, 200]
    for trace in traces:
        assert facts(traced.of(trace)["inference"])["prg.batch"] == 2


def test_what_fails_is_an_error_of_its_span(
    traced: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded(tmp_path) as client:
        monkeypatch.setattr("entry.runner.Runner.run", None)
        assert client.post("/embed", files=IMAGE, headers=CALLED).status_code == 503
    wrong = {name for name, span in traced.of(TRACE).items() if span.status.code == Status.STATUS_CODE_ERROR}
    assert wrong == {"POST /embed", "inference"}


def test_a_caller_who_keeps_no_trace_gets_none(traced: Receiver, tmp_path: Path) -> None:
    with embedded(tmp_path) as client:
        client.post("/embed", files=IMAGE, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert traced.spans == []


@pytest.mark.slow
def test_tritons_span_is_a_child_of_ours(traced: Receiver, tmp_path: Path) -> None:
    if find_server() is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    write_tiny_entry(tmp_path / "models")
    server = TritonServer(tmp_path / "models", tmp_path)
    options = (
        "level=TIMESTAMPS",
        "rate=1",
        "mode=opentelemetry",
        f"opentelemetry,url={traced.url}/v1/traces",
    )
    server.options = tuple(f"--trace-config={option}" for option in options)
    server.start()

    def theirs() -> list[Span]:
        """Of these requests: a canary has a trace too."""
        calls = {span.span_id for who, span in traced.spans if (who, span.name) == ("prg", "inference")}
        return [span for who, span in traced.spans if who != "prg" and span.parent_span_id in calls]

    try:
        with TestClient(create_app(Settings(engine="triton", triton_url=(server.url,)))) as client:
            # Several, because Triton overlooks the parent of about one in five, though it was sent with each.
            for _ in range(8):
                assert client.post("/embed", files=IMAGE, headers=CALLED).status_code == 200
        eventually(lambda: theirs(), 30)
    finally:
        server.stop()
    assert traced.of(TRACE).keys() == {"POST /embed", "admission", "decode", "queue", "inference"}
    assert {found.trace_id.hex() for found in theirs()} == {TRACE}


def test_without_an_endpoint_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from service import app, tracing; tracing.start(); "
        "assert tracing.place() is None and tracing.begin('a') is None; "
        "sys.exit('opentelemetry.sdk' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
