from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.people import People
from tests.labeling_pages import Labeler, Served, ranking, serving, whole

POSTS = ("session", "next", "draft", "submit", "undo", "admin/leave_out")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, [ranking("one")]) as served:
        yield served


@pytest.fixture
def anna(page: Served) -> Labeler:
    return page.labeler()


def sign_in(url: str, token: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/api/session", json={"token": token}, headers={"X-Rayward": "1", **headers})


def test_the_cookie_is_for_this_site_and_for_no_script(page: Served):
    cookie = sign_in(page.url, page.tokens["Anna"]).headers["set-cookie"].lower()
    parts = {part.strip() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", "max-age=2592000"} <= parts
    assert "secure" not in parts


def test_behind_a_proxy_with_tls_it_is_secure_and_the_proxy_says_who_asks(tmp_path: Path):
    with serving(tmp_path, [ranking("one")], url="https://label.example.org") as served:
        outside = {"Host": "label.example.org", "Origin": "https://label.example.org", "X-Forwarded-For": "203.0.113.9"}
        answer = sign_in(served.url, served.tokens["Anna"], **outside)
        assert answer.status_code == 204
        assert "secure" in answer.headers["set-cookie"].lower()
        assert '"203.0.113.9"' in (tmp_path / "audit.jsonl").read_text()


def test_without_a_proxy_nobody_says_to_be_somebody_else(page: Served):
    sign_in(page.url, page.tokens["Anna"], **{"X-Forwarded-For": "203.0.113.9"})
    assert '"127.0.0.1"' in (page.folder / "audit.jsonl").read_text()


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "headers",
    [
        {"X-Rayward": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_sites_page_cannot_post(page: Served, path: str, headers: dict[str, str]):
    client = page.labeler("Chief" if path.startswith("admin") else "Anna").client
    refused = client.post(f"/api/{path}", json={}, headers=headers)
    assert refused.status_code == 403
    assert {event["kind"] for event in read_events(page.folder / FILE)} <= {"item"}


def test_our_own_page_can(page: Served, anna: Labeler):
    headers = {"Origin": page.url, "Sec-Fetch-Site": "same-origin"}
    assert anna.client.post("/api/next", json={}, headers=headers).status_code == 200


def test_only_json_is_read(page: Served, anna: Labeler):
    refused = anna.client.post("/api/session", content='{"token": "x"}', headers={"Content-Type": "text/plain"})
    assert refused.status_code == 415


def test_another_name_for_the_loopback_is_refused(page: Served):
    for path in ("/", "/api/me", "/static/label.js"):
        refused = httpx.get(page.url + path, headers={"Host": "evil.example:80"})
        assert refused.status_code == 421
    assert httpx.get(page.url, headers={"Host": "localhost"}).status_code == 200


def test_wrong_tokens_are_slowed_down_and_nobody_who_is_signed_in(tmp_path: Path):
    with serving(tmp_path, [ranking("one")], limits={"sign_ins_per_minute": 3}) as served:
        anna = served.labeler()
        assert [sign_in(served.url, f"wrong-{n}").status_code for n in range(5)] == [401, 401, 401, 429, 429]
        held = sign_in(served.url, served.tokens["Anna"])
        assert held.status_code == 429
        assert 1 <= int(held.headers["retry-after"]) <= 60
        assert anna.next() is not None
        guess = httpx.get(f"{served.url}/api/me", headers={"Cookie": "rayward=guessed"})
        assert guess.status_code == 429
    assert (tmp_path / "audit.jsonl").read_text().count('"refused"') == 3


def test_requests_of_a_labeler_are_bounded_and_not_those_of_another(tmp_path: Path):
    with serving(tmp_path, [ranking("one")], ("Anna", "Ben"), overlap=2, limits={"requests_per_minute": 4}) as served:
        anna, ben = served.labeler(), served.labeler("Ben")
        assert [anna.client.get("/api/me").status_code for _ in range(6)] == [200] * 4 + [429] * 2
        assert int(anna.client.get("/api/me").headers["retry-after"]) > 0
        assert ben.next() is not None


def test_who_is_revoked_is_out_with_the_next_request(page: Served, anna: Labeler):
    assignment = anna.next()
    assert assignment is not None
    People(page.folder / "people.json").revoke("Anna")
    assert anna.change("draft", assignment, whole((1, 2, 3, 4))).status_code == 401


def test_signing_out_takes_the_cookie_away(anna: Labeler):
    assert anna.client.delete("/api/session").status_code == 204
    assert anna.client.get("/api/me").status_code == 401


def test_who_is_invited_meanwhile_gets_in(page: Served):
    _, token = People(page.folder / "people.json").invite("Cleo")
    assert sign_in(page.url, token).status_code == 204
