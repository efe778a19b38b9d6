"""Pages of other origins."""

from tests.service.conftest import IMAGE, Start


def test_a_page_of_an_allowed_origin_may_read_answers_and_our_headers(start: Start) -> None:
    client = start(cors_origins="http://page.example")
    headers = {"Origin": "http://page.example", "Accept": "application/x-npy"}
    answer = client.post("/embed", files=IMAGE, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "http://page.example"
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert {name for name in answer.headers if name.startswith("x-")} <= exposed
    assert {"retry-after", "x-fingerprint"} <= exposed
    other = client.get("/health/live", headers={"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in other.headers
