"""Nothing is acknowledged before it is on the disk, and whatever kills the writer leaves whole events."""

import asyncio
import errno
import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from reward_server.labeling.export import exported
from reward_server.labeling.log import FILE, Log, State, read_events
from reward_server.preferences.records import NotWritten, RecordError
from tests.labeling import Desk, item, ranked


def labelled(folder: Path) -> Desk:
    """A log with an event of each kind."""
    desk = Desk(folder, [item("é\u2028", 2)], overlap=2)
    one = desk.take("p1")
    desk.draft(one, ranked(one, (0, 1)))
    desk.rank("p2")
    desk.undo("p2")
    desk.leave_out("p3", "never came")
    desk.leave_out("p3", None)
    desk.project.close()
    return desk


def test_every_offset_at_which_the_writer_can_be_killed_leaves_the_whole_events_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    events = labelled(tmp_path / "whole").events
    data = (tmp_path / "whole" / FILE).read_bytes()
    assert {event["kind"] for event in events} == {
        "item", "given", "draft", "submitted", "undone", "left_out", "taken_back"
    }  # fmt: skip
    path = tmp_path / FILE
    for offset in range(len(data) + 1):
        path.write_bytes(data[:offset])
        known = data[:offset].count(b"\n")
        assert read_events(path) == events[:known]
        log = Log(path)
        assert log.events == events[:known], offset
        log.append({"kind": "more"})
        log.close()
        assert path.read_bytes().startswith(data[:offset][: data[:offset].rfind(b"\n") + 1] + b'{"n": %d,' % known)
        assert [event["n"] for event in read_events(path)] == list(range(known + 1))


def test_a_log_that_is_opened_again_is_as_it_was_after_any_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    desk = labelled(tmp_path / "whole")
    events, lines = desk.events, (desk.folder / FILE).read_bytes().splitlines(keepends=True)
    state, desk.folder = State(), tmp_path / "again"
    desk.folder.mkdir()
    for number, event in enumerate(events, start=1):
        state.apply(event)
        (desk.folder / FILE).write_bytes(b"".join(lines[:number]) + lines[number - 1][:9])
        desk.open()
        assert vars(desk.project._state) == vars(state)
        desk.project.close()
        assert exported(desk.events, desk.config) == exported(events[:number], desk.config)


def test_what_was_cut_off_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / FILE).write_bytes(b'{"n": 0, "kind": "a"}\n{"n": 1, "ki')
    with caplog.at_level(logging.WARNING):
        Log(tmp_path / FILE).close()
    assert caplog.messages == [f"{tmp_path / FILE}: cut off 12 bytes of a line that was not complete"]
    assert (tmp_path / FILE).read_bytes() == b'{"n": 0, "kind": "a"}\n'


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"n": 7}', b"\xff", b""])
def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, line: bytes):
    path = tmp_path / FILE
    path.write_bytes(b'{"n": 0}\n' + line + b'\n{"n": 2}\n')
    for read in (read_events, Log):
        with pytest.raises(RecordError, match=rf"{FILE}:2: .*Remedy: put back the log"):
            read(path)


def test_an_event_that_cannot_follow_is_refused_with_its_place(tmp_path: Path):
    (tmp_path / FILE).write_text('{"n": 0, "time": 1, "kind": "undone", "assignment": "a1"}\n')
    with pytest.raises(RecordError, match=rf"{FILE}:1: .*a1.* no event that can follow"):
        Desk(tmp_path, [])
    with pytest.raises(RecordError, match="nobody has labelled anything yet"):
        read_events(tmp_path / "none.jsonl")


def test_only_its_owner_reads_a_log_and_only_one_process_writes_it(tmp_path: Path):
    path = tmp_path / "new" / FILE
    log = Log(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match=rf"{path} is open in another process"):
        Log(path)
    log.close()
    log.close()
    Log(path).close()
    with pytest.raises(NotWritten, match="is closed"):
        log.append({"kind": "late"})


def test_an_answer_is_acknowledged_when_the_disk_has_it_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    desk = Desk(tmp_path, [item("a")])
    one = desk.take("p1")
    sync, may, sizes = os.fsync, threading.Event(), list[int]()

    def slow(file: int) -> None:
        may.wait(10)
        sizes.append(os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)

    async def run() -> None:
        project, answer = desk.project, ranked(one, (0, 1, 2))
        draft = asyncio.create_task(project.draft("p1", one.id, 0, answer, 1.0, "k"))
        await asyncio.sleep(0)
        others = [
            asyncio.create_task(project.next("p1")),  # the other tab shows nothing that could be lost
            asyncio.create_task(project.draft("p1", one.id, 0, answer, 1.0, "k")),  # nor does a resend
        ]
        done, _ = await asyncio.wait([draft, *others], timeout=0.2)
        assert not done
        may.set()
        assert await draft == 1
        size = (tmp_path / FILE).stat().st_size
        assert max(sizes) == size, "saved with all that was acknowledged"
        await asyncio.gather(*others)

    asyncio.run(run())
    assert [event["kind"] for event in desk.events] == ["item", "given", "draft"]


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_disk_that_fails_ends_the_taking_and_a_resend_after_it_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    desk = Desk(tmp_path, [item("a")])
    one = desk.take("p1")
    answer = ranked(one, (0, 1, 2))

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def submit() -> None:
        asyncio.run(desk.project.submit("p1", one.id, 0, answer, 1.0, "k"))

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(NotWritten, match=r"log\.jsonl cannot be written \(Input/output error\)"):
            submit()
    for refused in (submit, lambda: desk.next("p1"), lambda: desk.undo("p1"), lambda: desk.leave_out("p1", "x")):
        with pytest.raises(NotWritten):
            refused()
    desk.reopen()
    submit()
    assert [event["key"] for event in desk.events if event["kind"] == "submitted"] == ["k"]
    assert len(exported(desk.events, desk.config).comparisons) == 1


def test_a_disk_that_hangs_is_no_acknowledgement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    desk, may = Desk(tmp_path, []), threading.Event()
    monkeypatch.setattr("reward_server.labeling.log.SAVE_S", 0.05)
    monkeypatch.setattr(os, "fsync", lambda file: may.wait(10))
    with pytest.raises(NotWritten, match=r"was not written in 0\.05 s"):
        desk.leave_out("p1", "x")
    may.set()
    with pytest.raises(NotWritten):
        desk.leave_out("p1", "x")


def test_what_comes_at_once_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log, sync, calls = Log(tmp_path / FILE), os.fsync, list[int]()

    def counting(file: int) -> None:
        calls.append(file)
        sync(file)

    monkeypatch.setattr(os, "fsync", counting)

    async def one(number: int) -> None:
        log.append({"kind": "x", "by": number})
        await log.saved()

    async def many() -> None:
        await asyncio.gather(*map(one, range(200)))

    asyncio.run(many())
    log.close()
    assert [event["by"] for event in read_events(tmp_path / FILE)] == list(range(200))
    assert len(calls) < 50
