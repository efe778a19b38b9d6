"""Metrics and request ids."""

import re

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import IMAGE
from tests.tiny import png


def test_metrics_count_by_route_and_parse(client: TestClient) -> None:
    for _ in range(3):
        client.post("/embed", files=[*IMAGE, ("files", ("b", b"text"))])
    client.get("/models/some-name")
    client.get("/a/path/of/my/own")
    client.post("/embed", files={"files": ("some-name.png", png())}, params={"model": "some-name"})
    client.request("SOME-NAME", "/embed", headers={"X-Request-ID": "some-name"})
    text = client.get("/metrics").text
    samples = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["prg_requests_total", "/embed", "200"] == 3
    assert samples["prg_requests_total", "/models/{name}", "404"] == 1
    assert samples["prg_requests_total", "404", "unmatched"] == 1
    assert samples["prg_requests_total", "/embed", "422"] == 1
    assert samples["prg_images_total", "ok", "tiny"] == 3
    assert samples["prg_images_total", "failed", "tiny"] == 3
    assert samples["prg_decode_seconds_count",] == 6
    assert samples["prg_model_ready", "tiny"] == 1
    assert samples["prg_queued_images",] == 0
    encoder, model = (client.post(r, files=IMAGE).json()["fingerprint"] for r in ("/embed", "/classify"))
    assert samples["prg_model_info", *sorted(("1", encoder, model, "tiny"))] == 1
    assert "some-name" not in text
    assert "my/own" not in text


def test_a_request_id_is_kept_or_made(client: TestClient) -> None:
    assert client.get("/health/live", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "\tq"):
        made = client.get("/health/live", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
