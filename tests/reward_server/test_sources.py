import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from reward_server.app import serve
from reward_server.client import RewardRefused
from reward_server.config import GateConfig, PartConfig, SourceConfig
from reward_server.functions import UserFunctionError
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.scorer import RewardModelSource
from reward_server.sources import FunctionSource, MixSource, RemoteSource, RuleSource, build_source
from tests.tiny_models import tiny_reward_model

REQUESTS = [
    ScoreRequest(id="a", prompt=(Message(role="user", content="hi"),), response="four", ended=True),
    ScoreRequest(id="b", prompt=(Message(role="user", content="hello"),), response="ninechars", ended=False),
]


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "example_rewards.py").write_text(
        "def length(prompts, responses):\n"
        "    return [len(response) for response in responses]\n"
        "def prompt_length(prompts, responses):\n"
        "    return [len(prompt[-1]['content']) for prompt in prompts]\n"
        "def short(prompts, responses):\n"
        "    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_function_sees_prompts_as_dicts_and_responses_as_texts() -> None:
    replies = FunctionSource("example_rewards:length").score(REQUESTS)
    assert replies == [ScoreReply(id="a", score=4.0), ScoreReply(id="b", score=9.0)]
    assert [reply.score for reply in FunctionSource("example_rewards:prompt_length").score(REQUESTS)] == [
        2.0,
        5.0,
    ]


def test_a_function_that_returns_too_few_is_named() -> None:
    with pytest.raises(UserFunctionError, match="example_rewards:short returned 1 numbers for 2"):
        FunctionSource("example_rewards:short").score(REQUESTS)


def function(name: str, **settings: Any) -> PartConfig:
    return PartConfig(name=name, kind="function", target="example_rewards:length", **settings)


def scores_of(*parts: PartConfig) -> list[float]:
    return [reply.score for reply in build_source(SourceConfig(parts=parts)).score(REQUESTS)]


def test_a_pattern_that_backtracks_is_refused_with_its_response_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reward_server.sources._SEARCH_S", 0.2)
    source, began = RuleSource(r"(a|aa)+$"), time.monotonic()
    ticks = []
    thread = threading.Thread(target=lambda: ticks.extend(time.sleep(0.005) or n for n in range(4)))
    thread.start()
    with pytest.raises(ValueError, match=r"pattern '\(a\|aa\)\+\$' is not done with the 61 characters of response 'a'"):
        source.score([REQUESTS[0].model_copy(update={"response": "a" * 60 + "!"})])
    assert len(ticks) == 4, "other threads of the replica go on meanwhile"
    assert time.monotonic() - began < 5
    assert source.score([REQUESTS[0].model_copy(update={"response": "a" * 60})])[0].score == 1.0


def test_rules_count_words_and_find_patterns() -> None:
    words = [
        ScoreRequest(id=str(n), prompt=REQUESTS[0].prompt, response=text, ended=True)
        for n, text in enumerate(["two words", "", "see https://x.org\nnow"])
    ]
    length = build_source(SourceConfig(parts=(PartConfig(name="n", kind="length"),)))
    link = build_source(SourceConfig(parts=(PartConfig(name="link", kind="regex", target=r"https?://"),)))
    assert [reply.score for reply in length.score(words)] == [2.0, 0.0, 3.0]
    assert [reply.score for reply in link.score(words)] == [0.0, 0.0, 1.0]


def test_a_response_that_does_not_pass_a_gate_scores_what_the_gate_says() -> None:
    short = PartConfig(name="n", kind="regex", target="nine", gate=GateConfig(at_most=0, otherwise=-3))
    assert scores_of(function("length"), short) == [4.0, -3.0]
    assert scores_of(short, function("length", weight=2)) == [8.0, -3.0]
    long = function("long", gate=GateConfig(at_least=5, otherwise=-7))
    assert scores_of(function("length"), long, short) == [-7.0, -3.0]
    both = PartConfig(name="b", kind="length", gate=GateConfig(at_least=1, at_most=1, otherwise=-5))
    assert scores_of(function("length"), both) == [4.0, 9.0]


def test_the_first_gate_that_fails_decides_and_all_parts_are_told() -> None:
    first = function("first", gate=GateConfig(at_least=10, otherwise=-1))
    second = function("second", gate=GateConfig(at_least=10, otherwise=-2))
    replies = build_source(SourceConfig(parts=(function("length"), first, second))).score(REQUESTS)
    assert [reply.score for reply in replies] == [-1.0, -1.0]
    assert replies[0].parts == {"length": 4.0, "first": 4.0, "second": 4.0}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "regex"}, "is a regex without a target"),
        ({"kind": "regex", "target": "("}, "is no pattern"),
        ({"kind": "length", "target": "5"}, "takes no target"),
        ({"kind": "length", "raw": True}, "whose scores are raw anyway"),
        ({"kind": "length", "gate": {}}, "a gate without a bound lets everything pass"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PartConfig(name="x", **settings)


def test_gates_alone_have_nothing_to_sum() -> None:
    with pytest.raises(ValidationError, match="are all gates"):
        SourceConfig(parts=(function("x", gate=GateConfig(at_least=1)),))


def test_a_mix_is_the_weighted_sum_and_keeps_the_parts() -> None:
    mix = MixSource(
        [
            (function("length", weight=0.5), FunctionSource("example_rewards:length")),
            (function("prompt", weight=-2.0), FunctionSource("example_rewards:prompt_length")),
        ]
    )
    assert mix.score(REQUESTS) == [
        ScoreReply(id="a", score=0.5 * 4 - 2 * 2, parts={"length": 4.0, "prompt": 2.0}),
        ScoreReply(id="b", score=0.5 * 9 - 2 * 5, parts={"length": 9.0, "prompt": 5.0}),
    ]


def test_the_default_is_the_runs_own_reward_model(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path / "rm")
    source = build_source(SourceConfig(dtype="float32"), tmp_path / "rm")
    assert isinstance(source, RewardModelSource)
    assert [reply.id for reply in source.score(REQUESTS)] == ["a", "b"]
    with pytest.raises(ValueError, match="the run's own reward model, but there is none"):
        build_source(SourceConfig())


def test_a_configured_mix_of_all_kinds(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path / "rm")
    with_parts = SourceConfig(
        dtype="float32",
        parts=(
            PartConfig(weight=2.0),
            PartConfig(name="length", kind="function", target="example_rewards:length", weight=0.1),
        ),
    )
    (raw, _) = build_source(SourceConfig(dtype="float32"), tmp_path / "rm").score(REQUESTS)
    server = serve(build_source(with_parts, tmp_path / "rm"))
    try:
        remote = SourceConfig(parts=(PartConfig(name="far", kind="url", target=server.url),))
        source = build_source(remote)
        assert isinstance(source, RemoteSource)
        first, second = source.score(REQUESTS)
    finally:
        server.close()
    assert first.score == pytest.approx(2 * raw.score + 0.4, abs=1e-4)
    assert first.parts["length"] == 4.0
    assert first.parts["reward_model"] == pytest.approx(raw.score, abs=1e-4)
    assert first.parts["reward_model/raw"] == pytest.approx(raw.score, abs=1e-4)
    assert (first.id, second.id) == ("a", "b")


def test_a_mistake_in_the_configuration_is_found_when_it_is_read_or_built() -> None:
    with pytest.raises(ValidationError, match="is a function without a target"):
        PartConfig(name="x", kind="function")
    with pytest.raises(ValidationError, match="each part a name of its own"):
        SourceConfig(parts=(PartConfig(), PartConfig()))
    with pytest.raises(ValidationError):
        PartConfig(weight=float("nan"))
    bad = SourceConfig(parts=(PartConfig(name="x", kind="function", target="example_rewards:none"),))
    with pytest.raises(ValueError, match="has no function 'none'"):
        build_source(bad)


def test_a_url_is_sent_the_token_that_is_meant_for_it_and_never_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str | None] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.headers.get("Authorization"))
            self.send_error(401)

    monkeypatch.setenv("RAYWARD_REWARD_TOKEN", "our-own-secret")
    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    far: dict[str, Any] = {"name": "far", "kind": "url", "target": f"http://127.0.0.1:{server.server_port}"}
    try:
        for variable in (None, "FAR_TOKEN"):
            part = PartConfig(**far, token_variable=variable)
            if variable:
                with pytest.raises(ValueError, match=r"FAR_TOKEN, which scoring\.parts"):
                    build_source(SourceConfig(parts=(part,)))
                monkeypatch.setenv(variable, "their-secret")
            with pytest.raises(RewardRefused, match="HTTP 401"):
                build_source(SourceConfig(parts=(part,))).score(REQUESTS)
    finally:
        server.shutdown()
        server.server_close()
    assert sent == [None, "Bearer their-secret"]
    for wrong in ({**far, "token_variable": "RAYWARD_REWARD_TOKEN"}, {**far, "token_variable": "PATH"}):
        with pytest.raises(ValidationError, match="cannot have token_variable"):
            PartConfig(**wrong)
    with pytest.raises(ValidationError, match="only a url has one"):
        PartConfig(token_variable="FAR_TOKEN")


def test_sources_elsewhere_give_up_before_the_replica_that_asks_them_counts_as_hung() -> None:
    parts = tuple(PartConfig(name=str(n), kind="url", target="http://127.0.0.1:1") for n in range(5))
    for retry_s, each in ((600.0, 30.0), (12.0, 2.0)):
        mix = build_source(SourceConfig(parts=parts, retry_s=retry_s))
        assert isinstance(mix, MixSource)
        assert [source.retry_s for _, source in mix.sources if isinstance(source, RemoteSource)] == [each] * 5
