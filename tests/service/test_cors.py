"""Pages of other origins."""

from fastapi.testclient import TestClient

from tests.service.conftest import IMAGE, Start


def test_a_page_of_an_allowed_origin_may_read_answers_and_our_headers(start: Start) -> None:
    client = start(cors_origins="http://page.example")
    headers = {"Origin": "http://page.example", "Accept": "application/x-npy"}
    answer = client.post("/embed", files=IMAGE, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "http://page.example"
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    own = {name for name in answer.headers if name.startswith("x-")} - {"x-content-type-options"}
    assert own <= exposed
    assert {"retry-after", "x-fingerprint"} <= exposed
    other = client.get("/health/live", headers={"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_without_the_setting_no_page_of_another_origin_may(client: TestClient) -> None:
    origin = {"Origin": "http://page.example"}
    asked = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answers = [client.post("/embed", files=IMAGE, headers=origin), client.options("/embed", headers=asked)]
    assert [answer.status_code for answer in answers] == [200, 405]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control-")]
