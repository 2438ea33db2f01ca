"""A round that two people rank in two real browsers, by keys alone, while the command is killed and given again."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cluster.rundir.lineage import digest
from reward_server.address import free_port
from reward_server.preferences.labeling import read_comparisons
from tests.browser import CHROMIUM, Browser, browser
from tests.end_to_end.test_rounds import HOUSE, write
from tests.tiny_models import tiny_causal_lm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.whole_machine,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium"),
]
K, ITEMS, QUALITIES = 4, 3, "5432"
LABEL = "[label]\noverlap = 2\nwords_per_minute = 0\nrepeat_share = 0\nadjudicate_below = 0\n"


@dataclass
class Person:
    """Somebody at a browser, who ranks by a hash of the text, so that equal texts tie."""

    tab: Browser
    name: str
    clicked: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """by prompt: ranks in the order of the completions' texts, sorted"""

    def sees(self) -> dict[str, Any]:
        """The assignment that is open."""
        headers = "{'X-Rayward': '1', 'Content-Type': 'application/json'}"
        asked = f"fetch('/api/next', {{method: 'POST', body: '{{}}', headers: {headers}}})"
        return self.tab.run(f"{asked}.then(answer => answer.json()).then(said => said.assignment)")

    def ranks(self, given: dict[str, Any]) -> list[int]:
        """1 to K of the completions in the order shown."""
        keys = [hashlib.sha256(f"{self.name} {text}".encode()).digest()[0] % 3 for text in given["responses"]]
        return [sorted(set(keys)).index(key) + 1 for key in keys]

    def decides(self, given: dict[str, Any]) -> list[str]:
        """The keys of the rankings; what was clicked is kept."""
        ranks = self.ranks(given)
        pairs = sorted(zip(given["responses"], ranks, strict=True))
        self.clicked[given["prompt"][-1]["content"]] = tuple(rank - 1 for _, rank in pairs)
        return [str(rank) for rank in ranks]

    def ranks_one(self) -> None:
        """One item, by keys alone."""
        given = self.sees()
        self.tab.press(*QUALITIES, "Enter", *self.decides(given), "Enter")
        self.saved()

    def saved(self) -> None:
        """Until all is saved, and the page takes keys again."""
        self.tab.wait("document.querySelector('#saving').textContent === 'Saved'", 60)
        self.tab.wait("!document.querySelector('#main').inert", 60)


class Command:
    """`rayward rounds` in a process, and what it has printed."""

    def __init__(self, words: list[Any], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "cluster.cli.main", *map(str, words)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines.extend(self.process.stdout)

    def says(self, pattern: str, deadline_s: float = 240.0) -> re.Match[str]:
        until = time.monotonic() + deadline_s
        while not (found := re.search(pattern, "".join(self.lines))):
            assert time.monotonic() < until, "".join(self.lines)
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.2)
        return found


@pytest.fixture
def words(tmp_path) -> tuple[list[Any], dict[str, str]]:
    run = tmp_path / "run"
    tiny_causal_lm(run / "sft", hidden=128)
    asks = [{"id": f"p{i}", "prompt": f"hello world {i}", "use_case": "chat"} for i in range(16)]
    write(run / "data" / "preference_prompts.jsonl", asks[:ITEMS])
    write(run / "data" / "prompts.jsonl", asks)
    write(run / "data" / "prompts_heldout.jsonl", [row | {"prompt": f"is {row['id']} good?"} for row in asks])
    write(run / "data" / "demonstrations.jsonl", [row | {"response": "this is good"} for row in asks[:4]])
    write(run / "data" / "pretraining_valid.jsonl", [{"text": "the quick brown fox jumps over the lazy dog " * 4}])
    changed = {"completions_per_prompt = 3": f"completions_per_prompt = {K}", "taste:short": "simulated:vader"}
    house = HOUSE
    for before, after in (changed | {"iterations = 2": "iterations = 1"}).items():
        house = house.replace(before, after)
    (tmp_path / "house.toml").write_text(house + LABEL)
    given = ["--run", run, "--config", tmp_path / "house.toml", "--label.port", free_port("127.0.0.1")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return given, environment


def links(words: list[Any], environment: dict[str, str], *names: str) -> list[str]:
    found = []
    for name in names:
        command = [sys.executable, "-m", "cluster.cli.main", "label", *map(str, words), "--invite", name]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
        found += re.findall(r"^http\S+$", told, re.MULTILINE)
    return found


def share(one: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> tuple[float, int]:
    """(share, number) of pairs on which two people agree: 1/2 for a tie against an order."""
    credit = [
        1 - abs((a[i] > a[j]) - (a[i] < a[j]) - (b[i] > b[j]) + (b[i] < b[j])) / 2
        for a, b in ((one[name], other[name]) for name in one)
        for i, j in combinations(range(K), 2)
    ]
    return sum(credit) / len(credit), len(credit)


@pytest.mark.timeout(900)
def test_two_people_rank_a_round_in_browsers_and_the_reward_model_learns_exactly_that(words):
    given, environment = words
    run = Path(given[1])
    urls = links(*words, "Anna", "Ben")
    rounds = ["rounds", *given, "--rounds.labelers", "page", "--rounds.count", 1, "--rounds.prompts", ITEMS]
    with contextlib.ExitStack() as stack:
        command = Command(rounds, environment)
        stack.callback(lambda: command.process.kill())
        command.says(rf"waits for people: 0 of {2 * ITEMS} answers are there, at http://127\.0\.0\.1:\d+")
        people = [Person(stack.enter_context(browser()), name) for name in ("Anna", "Ben")]
        for person, url in zip(people, urls, strict=True):
            person.tab.open(url)
            person.tab.wait(f"document.querySelectorAll('.output').length === {K}")
            assert "#" not in person.tab.run("location.href")
            person.ranks_one()
        anna, ben = people
        half = anna.sees()
        keys = anna.decides(half)
        anna.tab.press(*QUALITIES, "Enter", *keys[:2])
        anna.saved()
        command.process.kill()  # SIGKILL, in the midst of an item
        command.process.wait(60)
        anna.tab.press(*keys[2:])
        anna.tab.wait("!document.querySelector('#offline').hidden", 60)
        command = Command(rounds, environment)
        command.says(r"waits for people: 2 of 6 answers are there")
        anna.tab.wait("document.querySelector('#offline').hidden", 60)
        anna.tab.press("Enter")
        anna.saved()
        for person, left in ((anna, ITEMS - 2), (ben, ITEMS - 1)):
            for _ in range(left):
                person.ranks_one()
        assert command.process.wait(400) == 0, "".join(command.lines)
    for person in people:
        assert not [told for told in person.tab.errors if "net::ERR_" not in told]  # of the minute without a server
        assert len(person.clicked) == ITEMS
    rows = read_comparisons(run / "round-1" / "data" / "comparisons.jsonl")
    assert len(rows) == 2 * ITEMS
    for row in rows:
        person = {"p1": anna, "p2": ben}[row.labeler or ""]
        pairs = sorted(zip(row.responses, row.ranks or (), strict=True))
        assert tuple(rank for _, rank in pairs) == person.clicked[row.prompt[-1].content]
        assert sorted(row.qualities or (), key=lambda one: one or 0) == [2, 3, 4, 5]
        assert row.use_case == "chat"
    events = [json.loads(line) for line in (run / "round-1" / "labeling" / "log.jsonl").open()]
    assert sum(event["kind"] == "submitted" for event in events) == 2 * ITEMS
    found = json.loads((run / "summary.json").read_text())["rounds"]["1"]
    assert (found["labelers_agree"], found["rankings"]) == (
        pytest.approx(share(anna.clicked, ben.clicked)[0]),
        "people (p1, p2)",
    )
    made = {row["path"]: row for row in map(json.loads, (run / "lineage.jsonl").open())}
    learnt = {one["path"]: one["sha256"] for one in made["round-1/reward"]["inputs"]}
    assert learnt["round-1/data/comparisons.jsonl"] == digest(run / "round-1" / "data" / "comparisons.jsonl")
    assert (run / "round-1" / "policy" / "config.json").is_file()
