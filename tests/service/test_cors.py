"""Pages of other origins."""

from tests.service.conftest import Start
from tests.tiny import png

IMAGE = [("files", ("a.png", png()))]


def test_cors(start: Start) -> None:
    client = start(cors_origins="http://page.example")
    allowed = client.get("/health/live", headers={"Origin": "http://page.example"})
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    other = client.get("/health/live", headers={"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_page_elsewhere_may_read_our_headers(start: Start) -> None:
    client = start(cors_origins="http://page.example")
    headers = {"Origin": "http://page.example", "Accept": "application/x-npy"}
    answer = client.post("/embed", files=IMAGE, headers=headers)
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert {name for name in answer.headers if name.startswith("x-")} <= exposed
    assert {"retry-after", "x-fingerprint"} <= exposed
