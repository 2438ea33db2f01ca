"""What a client of OpenAI's completions is told, and what happens when a generator is lost or a request is wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.config import RolloutConfig
from actors.sampling import GeneratorFailed
from cluster.pipeline.evaluation.harness.endpoint import Endpoint, serving
from tests.fakes import FakeEncoding, FakeFleet, FakeGenerator, completion
from tests.tiny_models import tiny_tokenizer

ECHO = {"model": "m", "prompt": [[2, 4, 5], [2, 6]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
SAY = {"model": "m", "prompt": [[2, 4]], "max_tokens": 5, "temperature": 0.5, "seed": 7, "stop": ["z", "cd"]}


class Echo(FakeGenerator):
    """Says "abcd"; finds token id i as likely as exp(-i), and the likeliest exp(-1)."""

    async def echo(self, sequences: list[list[int]]) -> list[tuple[list[float], list[float]]]:
        if error := self.fault(sequences):
            raise error
        return [([-float(i) for i in (*ids[1:], 1)], [-1.0] * len(ids)) for ids in sequences]

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> Any:
        self.seeds += seeds
        return [completion(query, (4, 5, 6, 7)[:max_new_tokens], ended=False) for query in query_ids]


def posted(
    *bodies: dict[str, Any], fleet: FakeFleet | None = None, token: str | None = None, path: str = ""
) -> list[tuple[int, Any]]:
    """(status, body) of posts at the same time."""

    async def ask(endpoint: Endpoint) -> list[tuple[int, Any]]:
        given = {"Authorization": f"Bearer {endpoint.token if token is None else token}"}
        async with httpx.AsyncClient(headers=given, timeout=20, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post(endpoint.url + path, json=body) for body in bodies))
        return [(answer.status_code, answer.json()) for answer in answers]

    return served(ask, fleet or FakeFleet(Echo()))


def served(use: Callable[[Endpoint], Awaitable[Any]], fleet: FakeFleet) -> Any:
    async def run() -> Any:
        async with serving(fleet, FakeEncoding(), RolloutConfig(prompts_per_wave=2)) as endpoint:
            return await use(endpoint)

    return asyncio.run(run())


def test_an_echo_has_a_logprob_a_token_and_the_likeliest_beside_it():
    ((status, body),) = posted(ECHO)
    assert (status, body["model"]) == (200, "m")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    first = body["choices"][0]["logprobs"]
    assert first["token_logprobs"] == [None, -4.0, -5.0, -1.0]
    assert [top and max(top.values()) for top in first["top_logprobs"]] == [None, -1.0, -1.0, -1.0]


def test_a_text_is_cut_at_the_first_of_its_stops():
    generator = Echo()
    (_, cut), (_, whole) = posted(SAY, SAY | {"stop": ["d", "", "x"], "max_tokens": 3}, fleet=FakeFleet(generator))
    assert [(one["text"], one["finish_reason"]) for one in cut["choices"]] == [("ab", "stop")]
    assert [(one["text"], one["finish_reason"]) for one in whole["choices"]] == [("abc", "length")]
    assert generator.seeds == [7, 7]


@pytest.mark.slow
def test_the_harness_s_own_client_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    client = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    tiny_tokenizer(tmp_path)

    async def ask(endpoint: Endpoint) -> Any:
        monkeypatch.setenv("OPENAI_API_KEY", endpoint.token)
        settings = {"tokenizer": str(tmp_path), "tokenizer_backend": "huggingface", "max_length": 64, "max_retries": 1}
        model = client(model="m", base_url=endpoint.url, num_concurrent=2, **settings)
        generations = {"until": ["d"], "max_gen_toks": 4, "do_sample": False}
        texts = [instance("generate_until", {}, (text, generations), n) for n, text in enumerate(("the fox", "a dog"))]
        pair = [instance("loglikelihood", {}, ("the", " fox"), 0)]
        said = await asyncio.to_thread(model.generate_until, texts)
        return said, await asyncio.to_thread(model.loglikelihood, pair), model.tok_encode(" fox")

    said, [(total, greedy)], ids = served(ask, FakeFleet(Echo()))
    assert said == ["abc", "abc"]
    assert (total, greedy) == (-float(sum(ids)), False)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"prompt": "a text"}, 400, "prompt"),
        ({"top_p": 0.5}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"logprobs": 5}, 400, "logprobs"),
    ],
)
def test_a_post_that_would_not_be_answered_as_asked_is_refused(change: dict[str, Any], status: int, said: str):
    ((found, body),) = posted(ECHO | change)
    assert found == status
    assert said in body["error"]


def test_only_who_has_the_token_is_answered_and_only_here():
    assert posted(ECHO, token="other")[0][0] == 401
    assert posted(ECHO, path="/else")[0][0] == 404


def test_another_generator_answers_for_one_that_is_lost():
    lost = Echo(fault=lambda _: GeneratorFailed("gone"))
    ((status, body), (also, _)) = posted(ECHO, ECHO, fleet=FakeFleet(lost, spares=[Echo()]))
    assert (status, also) == (200, 200)
    assert body["choices"][1]["logprobs"]["token_logprobs"] == [None, -6.0, -1.0]


@pytest.mark.parametrize(
    ("error", "said"), [(GeneratorFailed("gone"), "gone"), (ValueError("too long for it"), "too long for it")]
)
def test_what_nobody_can_answer_is_told_to_who_asks_and_to_who_serves(error: Exception, said: str):
    async def ask(endpoint: Endpoint) -> None:
        given = {"Authorization": f"Bearer {endpoint.token}"}
        async with httpx.AsyncClient(headers=given, timeout=20, trust_env=False) as client:
            answer = await client.post(endpoint.url, json=ECHO)
        assert answer.status_code == 503
        assert said in answer.json()["error"]
        with pytest.raises(type(error), match=said):
            endpoint.desk.complete.result()

    served(ask, FakeFleet(Echo(fault=lambda _: error)))
