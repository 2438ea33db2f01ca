import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_server.labeling.page.files import version
from tests.labeling_pages import Labeler, Served, ranking, serving, whole

POSTS = ("session", "next", "draft", "submit", "undo", "admin/leave_out")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, [ranking("one"), ranking("two")], ("Anna", "Ben")) as served:
        yield served


@pytest.fixture
def anna(page: Served) -> Labeler:
    return page.labeler()


def given(labeler: Labeler) -> dict[str, Any]:
    assignment = labeler.next()
    assert assignment is not None
    return assignment


def test_a_labeler_sees_the_texts_and_nothing_that_says_whose_they_are(anna: Labeler):
    assignment = given(anna)
    assert set(assignment) == {
        "id", "task", "use", "prompt", "responses", "answer", "version", "seconds", "submitted",
    }  # fmt: skip
    assert sorted(assignment["responses"]) == ["first", "fourth", "second", "third"]
    assert assignment["answer"] is None
    assert (assignment["version"], assignment["seconds"], assignment["submitted"]) == (0, 0, False)


def test_gold_looks_like_work(tmp_path: Path):
    gold = ranking("gold", use="gold", ranks=(0, 1, 2, 3))
    with serving(tmp_path, [ranking("one"), gold], gold_share=0.5) as served:
        anna = served.labeler()
        seen = [given(anna)]
        for _ in range(1):
            anna.change("submit", seen[-1], whole((1, 2, 3, 4))).raise_for_status()
            seen.append(given(anna))
    assert {event["use"] for event in served.events("given")} == {"work", "gold"}
    assert [assignment["use"] for assignment in seen] == ["work", "work"]


def test_the_settings_of_the_page(tmp_path: Path):
    guide = tmp_path / "guide.txt"
    guide.write_text("Prefer what is true.")
    with serving(tmp_path, [ranking("one")], flags="harm,too_long", guidelines=guide) as served:
        me = served.labeler().client.get("/api/me").json()
    assert me["settings"] == {
        "quality": True,
        "flags": [
            {"name": "harm", "words": "Encourages violence, abuse or self-harm"},
            {"name": "too_long", "words": "Too long"},
        ],
        "guidelines": "Prefer what is true.",
        "longest_text": 20_000,
    }
    assert (me["id"], me["name"], me["admin"], me["done"], me["wanted"]) == ("p1", "Anna", False, 0, 1)


def test_drafts_come_back_as_they_were_left_and_so_do_seconds(anna: Labeler, page: Served):
    assignment = given(anna)
    answer = whole((1, 1, None, 3)) | {"cannot": None, "text": None}
    assert anna.change("draft", assignment, answer).json() == {"version": 1}
    again = given(page.labeler())
    assert (again["id"], again["version"], again["answer"], again["seconds"]) == (assignment["id"], 1, answer, 9.5)


def test_a_change_that_is_sent_again_counts_once(anna: Labeler, page: Served):
    assignment = given(anna)
    for _ in range(3):
        assert anna.change("draft", assignment, whole((1, 2, 3, 4)), key="the-same-key").json() == {"version": 1}
    assignment["version"] = 1
    for _ in range(2):
        assert anna.change("submit", assignment, whole((1, 2, 3, 4)), key="another-key").json() == {"feedback": None}
    assert len(page.events("draft")) == len(page.events("submitted")) == 1


def test_what_another_tab_has_changed_is_sent_along(anna: Labeler, page: Served):
    assignment = given(anna)
    page.labeler().change("draft", assignment, whole((4, 3, 2, 1))).raise_for_status()
    stale = anna.change("draft", assignment, whole((1, 2, 3, 4)))
    assert stale.status_code == 409
    newest = stale.json()["assignment"]
    assert (newest["version"], newest["answer"]["ranks"], newest["submitted"]) == (1, [4, 3, 2, 1], False)
    assert newest["responses"] == assignment["responses"]
    page.labeler().change("submit", newest, whole((4, 3, 2, 1))).raise_for_status()
    assert anna.change("submit", newest, whole((1, 2, 3, 4))).json()["assignment"]["submitted"] is True


def test_what_is_missing_is_said(anna: Labeler):
    refused = anna.change("submit", given(anna), whole((1, None, 2, None)))
    assert (refused.status_code, refused.json()["detail"]) == (422, "without a rank: output 2, 4")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seconds": -1}, "seconds: Input should be greater than or equal to 0"),
        ({"answer": whole((1, 2, 3, 10))}, "answer.ranks.3: Input should be less than or equal to 9"),
        ({"answer": whole((1, 2))}, "ratings has 2 entries for 4 outputs: give each one, or none at all"),
        ({"order": [0]}, "order: Extra inputs are not permitted"),
        ({"version": "x"}, "version: Input should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_what_cannot_be_an_answer_is_refused_with_its_place(anna: Labeler, changed: dict[str, Any], said: str):
    refused = anna.change("draft", given(anna), **{"answer": whole((1, 2, 3, 4)), **changed})
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith(said)


def test_an_item_of_somebody_else_is_not_there(anna: Labeler, page: Served):
    refused = page.labeler("Ben").change("submit", given(anna), whole((1, 2, 3, 4)))
    assert (refused.status_code, refused.json()["detail"]) == (404, "this item is not open to you")


def test_undo_reopens_the_last_answer_once_a_key(anna: Labeler):
    assert anna.client.post("/api/undo", json={"key": "first-key"}).json() == {"assignment": None}
    anna.rank((1, 2, 3, 3))
    for _ in range(2):
        reopened = anna.client.post("/api/undo", json={"key": "second-key"}).json()["assignment"]
        assert (reopened["id"], reopened["answer"]["ranks"]) == (anna.ids[0], [1, 2, 3, 3])
    assert given(anna)["id"] == anna.ids[0]


def test_training_is_explained_in_the_order_shown(tmp_path: Path):
    lesson = ranking("lesson", use="training", ranks=(0, 1, 1, 2), explanation="The first is true.")
    with serving(tmp_path, [ranking("one"), lesson]) as served:
        anna = served.labeler()
        assignment = given(anna)
        assert assignment["use"] == "training"
        right = {"first": 1, "second": 2, "third": 2, "fourth": 3}
        ranks = [right[text] for text in assignment["responses"]]
        feedback = anna.change("submit", assignment, whole(ranks)).json()["feedback"]
        assert feedback == {"correct": True, "ranks": ranks, "explanation": "The first is true."}
        assert given(anna)["use"] == "work"


def test_what_was_acknowledged_is_there_after_a_restart_and_tokens_go_on(tmp_path: Path):
    items = [ranking("one"), ranking("two")]
    with serving(tmp_path, items) as served:
        anna = served.labeler()
        anna.rank((2, 1, 3, 4))
        assignment = given(anna)
        anna.change("draft", assignment, whole((1, None, None, None))).raise_for_status()
    with serving(tmp_path, items) as again:
        again.tokens = served.tokens
        found = given(again.labeler())
        assert (found["id"], found["version"], found["answer"]["ranks"]) == (assignment["id"], 1, [1, None, None, None])
        assert again.labeler().client.get("/api/me").json()["done"] == 1
    assert {event["page"] for event in again.events("submitted")} == {version()}


def test_a_disk_that_takes_nothing_more_is_503_from_then_on(
    anna: Labeler, monkeypatch: pytest.MonkeyPatch, page: Served
):
    assignment = given(anna)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reward_server.labeling.log.os.fsync", full)
    refused = anna.change("draft", assignment, whole((1, 2, 3, 4)), key="the-same-key")
    assert refused.status_code == 503
    assert "No space left on device" in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) > 0
    monkeypatch.undo()
    assert anna.change("draft", assignment, whole((1, 2, 3, 4)), key="the-same-key").status_code == 503
    assert page.labeler().client.post("/api/next", json={}).status_code == 503


def test_an_admin_sees_all_and_leaves_out_for_a_reason(page: Served, anna: Labeler):
    anna.rank((1, 2, 3, 4))
    chief = page.labeler("Chief").client
    seen = chief.get("/api/admin").json()
    assert (seen["items"], seen["given"], seen["wanted"]) == (2, 1, 2)
    assert seen["names"] == {"p1": "Anna", "p2": "Ben"}
    assert [(one["labeler"], one["done"]) for one in seen["labelers"]] == [("p1", 1)]
    assert chief.post("/api/admin/leave_out", json={"labeler": "p1", "reason": "moved"}).status_code == 200
    assert chief.get("/api/admin").json()["labelers"][0]["left_out"] == "moved"
    assert anna.next() is None
    assert chief.post("/api/admin/leave_out", json={"labeler": "p1", "reason": None}).status_code == 200
    assert chief.get("/api/admin").json()["labelers"][0]["left_out"] is None
    for labeler, reason, status in (("p9", "x", 404), ("p3", "an admin", 404), ("p1", " ", 422)):
        refused = chief.post("/api/admin/leave_out", json={"labeler": labeler, "reason": reason})
        assert refused.status_code == status


def test_a_labeler_is_no_admin_and_an_admin_no_labeler(page: Served, anna: Labeler):
    assert anna.client.get("/api/admin").status_code == 403
    assert anna.client.post("/api/admin/leave_out", json={"labeler": "p2", "reason": "x"}).status_code == 403
    assert page.labeler("Chief").client.post("/api/next", json={}).status_code == 403


def test_nothing_of_the_api_is_open_to_who_has_not_signed_in(page: Served):
    with httpx.Client(base_url=page.url, headers={"X-Rayward": "1"}) as nobody:
        for path in ("me", "admin"):
            assert nobody.get(f"/api/{path}").status_code == 401
        for path in POSTS[1:]:
            assert nobody.post(f"/api/{path}", json={}).status_code == 401
        assert nobody.get("/openapi.json").status_code == nobody.get("/docs").status_code == 404


def test_every_answer_forbids_what_is_not_ours_and_no_answer_of_the_api_is_kept(page: Served, anna: Labeler):
    for path, status in (("/", 200), ("/admin", 200), ("/static/label.js", 200), ("/static/x", 404), ("/api/me", 200)):
        answer = anna.client.get(path)
        assert answer.status_code == status
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == ("no-cache" if status == 200 and path != "/api/me" else "no-store")
    with httpx.Client(base_url=page.url) as nobody:
        assert "content-security-policy" in nobody.get("/api/me").headers


def test_a_file_that_is_known_is_not_sent_again(anna: Labeler):
    first = anna.client.get("/static/label.css")
    again = anna.client.get("/static/label.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_body_is_bounded(tmp_path: Path):
    with serving(tmp_path, [ranking("one")], limits={"max_body_bytes": 2000}) as served:
        anna = served.labeler()
        refused = anna.change("draft", given(anna), whole((1, 2, 3, 4)) | {"cannot": "x" * 2000})
        assert refused.status_code == 413
        assert refused.json()["detail"] == "the body has more than 2000 bytes; split it"


def test_the_token_is_in_no_file_and_no_answer(page: Served, anna: Labeler):
    anna.rank((1, 2, 3, 4))
    token = page.tokens["Anna"]
    for path in page.folder.iterdir():
        assert token not in path.read_text(), path
        assert os.stat(path).st_mode & 0o077 == 0, path
    for path in ("/", "/api/me"):
        assert token not in anna.client.get(path).text


def test_the_audit_log_says_who_came_and_who_was_refused(page: Served, anna: Labeler):
    wrong = anna.client.post("/api/session", json={"token": "wrong-token"})
    assert wrong.status_code == 401
    anna.client.get("/api/admin")
    chief = page.labeler("Chief").client
    chief.post("/api/admin/leave_out", json={"labeler": "p1", "reason": "moved\x1b[2J"})
    lines = [json.loads(line) for line in (page.folder / "audit.jsonl").read_text().splitlines()]
    told = [(line["event"], line.get("by"), line.get("why")) for line in lines]
    assert told == [
        ("signed in", "p1", None),
        ("refused", None, "this link is not valid, or was revoked; ask for a new one"),
        ("refused", "p1", "this needs an admin's link"),
        ("signed in", "p3", None),
        ("left out", "p3", "moved\\x1b[2J"),
    ]
    assert {line["address"] for line in lines} == {"127.0.0.1"}
