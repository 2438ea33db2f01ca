"""Who may label: tokens are shown once and stored hashed, and the file can change while others read it."""

import hmac
import json
import stat
from pathlib import Path

import pytest

from reward_server.labeling.people import People
from reward_server.preferences.records import RecordError


def test_a_token_opens_what_its_person_may_and_is_stored_hashed(tmp_path: Path):
    people = People(tmp_path / "new" / "people.json")
    anna, token = people.invite("Anna")
    boss, admins = people.invite("Bo", admin=True)
    assert (anna, boss) == ("p1", "p2")
    assert len(token) >= 43
    assert token != admins
    found = people.who(token)
    assert found is not None
    assert (found.id, found.name, found.admin) == ("p1", "Anna", False)
    assert (admin := people.who(admins))
    assert admin.admin
    assert [person.id for person in people.labelers] == ["p1"]
    text = (tmp_path / "new" / "people.json").read_text()
    assert token not in text
    assert admins not in text
    assert "token" not in repr(found)
    assert stat.S_IMODE((tmp_path / "new" / "people.json").stat().st_mode) == 0o600
    assert not [file for file in (tmp_path / "new").iterdir() if file.name != "people.json"]


@pytest.mark.parametrize("token", ["", "x", "é", "\ud800", "0" * 64])
def test_any_other_token_opens_nothing(tmp_path: Path, token: str):
    people = People(tmp_path / "people.json")
    assert people.who(token) is None
    people.invite("Anna")
    people.revoke("Anna")
    assert people.who(token) is None


def test_every_person_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    people = People(tmp_path / "people.json")
    tokens = [people.invite(name)[1] for name in ("a", "b", "c")]
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for token in (*tokens, "wrong"):
        compared.clear()
        people.who(token)
        assert len(compared) == 3


def test_who_is_invited_or_revoked_by_another_process_is_seen_at_once(tmp_path: Path):
    serving, command = People(tmp_path / "people.json"), People(tmp_path / "people.json")
    _, token = command.invite("Anna")
    assert serving.who(token)
    command.revoke("p1")
    assert serving.who(token) is None
    own, renewed = command.invite("Anna")
    assert own == "p1", "the same person, with all that was done before"
    assert serving.who(token) is None
    assert serving.who(renewed)


def test_what_cannot_be_is_refused_with_what_there_is(tmp_path: Path):
    people = People(tmp_path / "people.json")
    people.invite("Anna")
    with pytest.raises(ValueError, match="'Anna' is invited already, as p1"):
        people.invite(" Anna ")
    for name in ("", " ", "p7", "a\nb", "x" * 101):
        with pytest.raises(ValueError, match="is no name"):
            people.invite(name)
    with pytest.raises(ValueError, match=r"'Bo' is not invited: there are Anna \(p1\)"):
        people.revoke("Bo")
    assert people.revoke("p1").name == "Anna"
    with pytest.raises(ValueError, match="'p1' is not invited: there are none"):
        people.revoke("p1")


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"people": [{"id": "x", "name": "A"}]})])
def test_a_file_that_was_broken_is_refused_with_its_place(tmp_path: Path, text: str):
    (tmp_path / "people.json").write_text(text)
    with pytest.raises(RecordError, match=r"people\.json: .*Remedy"):
        People(tmp_path / "people.json").who("x")
