"""`rayward serve` as people start it: alone, and as replicas on a real Ray Serve."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from cluster.pipeline.serve import check_token
from cluster.runtime.orphans import SESSION_MARK
from reward_server.address import free_port
from reward_server.bearer import TOKEN_VARIABLE
from reward_server.config import ServeConfig

ROOT = Path(__file__).parents[3]
TOKEN = "open-sesame-0123456789"


@contextlib.contextmanager
def served(tmp_path, *options, **environment):
    """The URL of a server that is up, and the process."""
    command = [
        sys.executable,
        "-m",
        "cluster.cli.main",
        "serve",
        "--run",
        str(tmp_path / "run"),
        "--tracking.mode",
        "disabled",
    ]
    command += ["--serve.port", str(free_port("127.0.0.1")), *options]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            if found := re.search(r"scores are served at (\S+)/score", line):
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield found[1], process
                break
        else:
            raise AssertionError("".join(seen))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def post(url, *texts, **headers):
    requests = [
        {"id": f"{time.time_ns()}-{n}", "prompt": [{"role": "user", "content": "hi"}], "response": text, "ended": True}
        for n, text in enumerate(texts)
    ]
    return httpx.post(f"{url}/score", json={"requests": requests}, headers=headers, timeout=30)


WORDS = ("--scoring.parts", '[{name = "words", kind = "length"}]')


@pytest.mark.slow
def test_one_copy_serves_a_rule_asks_for_the_token_and_stops_when_told(tmp_path):
    with served(tmp_path, *WORDS, RAYWARD_REWARD_TOKEN=TOKEN) as (url, process):
        assert post(url, "a b c").status_code == 401
        answer = post(url, "a b c", "", authorization=f"Bearer {TOKEN}")
        assert [reply["score"] for reply in answer.json()["replies"]] == [3.0, 0.0]
        assert httpx.get(f"{url}/health", headers={"authorization": f"Bearer {TOKEN}"}).json() == {"status": "ok"}
    assert process.returncode == 143
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_off_the_loopback_a_token_is_needed(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    check_token(ServeConfig())
    with pytest.raises(ValueError, match=r"'0\.0\.0\.0' can be reached by others and RAYWARD_REWARD_TOKEN is not set"):
        check_token(ServeConfig(host="0.0.0.0"))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    check_token(ServeConfig(host="0.0.0.0"))


def test_bounds_of_replicas_are_checked():
    with pytest.raises(ValueError, match=r"max_replicas = 1 is below serve\.replicas = 2"):
        ServeConfig(replicas=2, max_replicas=1)
    assert [ServeConfig(replicas=r, max_replicas=m).on_ray for r, m in ((1, None), (1, 1), (1, 2), (2, None))] == [
        *(False, False, True, True)
    ]


@pytest.mark.slow
def test_replicas_share_the_posts_and_nothing_is_left_afterwards(tmp_path):
    (tmp_path / "whose.py").write_text(
        "import os, time\n\ndef copy(prompts, responses):\n"
        "    time.sleep(0.2)\n    return [float(os.getpid())] * len(responses)\n"
    )
    parts = '[{name = "whose", kind = "function", target = "whose:copy"}]'
    with served(tmp_path, "--scoring.parts", parts, "--serve.replicas", "2", RAYWARD_REWARD_TOKEN=TOKEN) as (url, _):
        assert post(url, "x").status_code == 401
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(url, "x", "y", authorization=f"Bearer {TOKEN}")))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        pids = {reply["score"] for answer in answers for reply in answer.json()["replies"]}
        assert len(answers) == 8
        assert len(pids) == 2
        page = httpx.get(f"{url}/docs")
        assert '"spec": {"openapi"' in page.text
        assert len(httpx.get(f"{url}/docs/swagger-ui-bundle.js").content) > 100_000
        assert httpx.get(f"{url}/metrics").status_code == 401
        scrapes = [httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text for _ in range(24)]
        copies = {name for scrape in scrapes for name in re.findall(r'responses_total\{replica="([^"]+)"', scrape)}
        assert {float(name.rpartition(":")[2]) for name in copies} == pids, "each scrape is one copy's, and says whose"
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid:.0f}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.2)
    mine = str(tmp_path).encode()
    left = [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/environ")
        if (content := _content(path)) and SESSION_MARK.encode() in content and mine in content
    ]
    assert not left


@pytest.mark.slow
def test_copies_are_added_while_posts_queue_and_taken_away_afterwards(tmp_path):
    (tmp_path / "whose.py").write_text(
        "import os, time\n\ndef copy(prompts, responses):\n"
        "    time.sleep(0.3)\n    return [float(os.getpid())] * len(responses)\n"
    )
    options = ["--scoring.parts", '[{name = "whose", kind = "function", target = "whose:copy"}]']
    options += ["--serve.max_replicas", "2", "--serve.posts_per_replica", "1"]
    options += ["--serve.upscale_s", "1", "--serve.downscale_s", "3"]
    with served(tmp_path, *options) as (url, _):
        pids: set[float] = set()
        end, over = time.monotonic() + 90, threading.Event()

        def client():
            while not over.is_set():
                for reply in post(url, "x").json()["replies"]:
                    pids.add(reply["score"])

        assert post(url, "x").status_code == 200
        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            while len(pids) < 2:
                assert time.monotonic() < end, "no copy was added"
                time.sleep(0.2)
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        while sum(Path(f"/proc/{pid:.0f}").exists() for pid in pids) > 1:
            assert time.monotonic() < end, "no copy was taken away"
            time.sleep(0.2)
        assert post(url, "x").json()["replies"][0]["score"] in pids, "the one that is left answers"


def _content(path):
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""
