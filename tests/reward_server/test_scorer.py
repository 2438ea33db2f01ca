import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from reward_server.encoding import ChatEncoding
from reward_server.model import (
    Normalisation,
    load_reward_model,
    set_normalisation,
)
from reward_server.schema import Message, ScoreRequest
from reward_server.scorer import (
    InputTooLong,
    NonFiniteScore,
    RewardModelSource,
    encode_request,
    raw_scores,
    token_batches,
)
from tests.tiny_models import save_reward_model, tiny_reward_model, tiny_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    prompt: tuple[Message, ...]
    response: str


def asking(text: str, response: str, ended: bool = True, name: str = "r") -> ScoreRequest:
    return ScoreRequest(id=name, prompt=(Message(role="user", content=text),), response=response, ended=ended)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rm")
    model = tiny_reward_model(path)
    set_normalisation(model, Normalisation(gain=2.0, bias=-1.0))
    save_reward_model(model, ChatEncoding.load(path), path)
    return path


def test_token_batches_put_similar_lengths_together_within_the_budget() -> None:
    assert token_batches([3, 9, 4, 8, 2], max_tokens=18) == [[1, 3], [2, 0, 4]]
    assert token_batches([3, 9, 4, 8, 2], max_tokens=21) == [[1, 3, 2], [0, 4]]
    assert token_batches([3, 9, 4, 8, 2], max_tokens=21, padded=True) == [[1, 3], [2, 0, 4]]
    assert token_batches([5, 5, 5], max_tokens=10) == [[0, 1], [2]]
    assert token_batches([30, 2, 2], max_tokens=10) == [[0], [1, 2]]
    assert token_batches([], max_tokens=10) == []


def test_token_batches_take_each_index_once_and_respect_the_budget() -> None:
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for padded in (False, True):
        batches = token_batches(lengths, 64, padded)
        assert sorted(index for batch in batches for index in batch) == list(range(200))
        for batch in batches:
            taken = [lengths[index] for index in batch]
            assert (len(taken) * max(taken) if padded else sum(taken)) <= 64


def test_scores_come_in_the_order_of_the_requests_and_do_not_depend_on_the_batching(folder: Path) -> None:
    requests = [asking(f"prompt {n}", "word " * (7 * n % 23), ended=n % 3 > 0, name=f"r{n}") for n in range(20)]
    together = RewardModelSource(folder, max_batch_tokens=100_000).score(requests)
    alone = RewardModelSource(folder, max_batch_tokens=1).score(requests)
    backwards = RewardModelSource(folder, max_batch_tokens=300).score(requests[::-1])[::-1]
    assert [reply.id for reply in together] == [request.id for request in requests]
    assert len({round(reply.score, 3) for reply in together}) > 15
    for first, second, third in zip(together, alone, backwards, strict=True):
        assert second.score == pytest.approx(first.score, abs=1e-4)
        assert third.score == pytest.approx(first.score, abs=1e-4)
        assert third.id == first.id


def test_the_score_is_the_normalised_head_at_the_last_token_of_query_and_response(folder: Path) -> None:
    model, encoding = load_reward_model(folder, torch.float32), ChatEncoding.load(folder)
    for ended in (True, False):
        request = asking("hello", "good world", ended)
        ids = encoding.prompt(request.prompt) + encoding.response("good world", ended)
        assert (ids[-1] == encoding.eos_id) == ended
        (raw,) = raw_scores(model, [ids], len(ids))
        (reply,) = RewardModelSource(folder).score([request])
        assert reply.parts["raw"] == pytest.approx(raw, abs=1e-5)
        assert reply.score == pytest.approx(2 * raw - 1, abs=1e-5)


def test_an_input_too_long_is_an_error_with_its_sizes_and_the_remedy() -> None:
    encoding = ChatEncoding(tiny_tokenizer())
    request = asking("hello", "good bad", name="p7/0")
    query, response = encoding.prompt(request.prompt), encoding.response("good bad", ended=True)
    size = len(query) + len(response)
    assert encode_request(encoding, request, max_tokens=size) == query + response
    with pytest.raises(InputTooLong) as caught:
        encode_request(encoding, request, max_tokens=size - 3)
    for part in (
        "'p7/0'",
        f"{len(query)} prompt",
        f"{len(response)} response",
        f"the {size - 3} that",
        "truncate_prompt",
    ):
        assert part in str(caught.value)


def test_a_prompt_is_truncated_from_its_left_only_when_asked_and_the_response_never() -> None:
    encoding = ChatEncoding(tiny_tokenizer())
    request = asking("hello", "good bad")
    query, response = encoding.prompt(request.prompt), encoding.response("good bad", ended=True)
    cut = encode_request(encoding, request, len(query) + len(response) - 3, truncate_prompt=True)
    assert cut == query[3:] + response
    assert encode_request(encoding, request, len(response) + 1, truncate_prompt=True) == query[-1:] + response
    with pytest.raises(InputTooLong, match="shorten the response"):
        encode_request(encoding, request, len(response), truncate_prompt=True)


def test_a_source_reads_no_further_than_the_models_positions(folder: Path) -> None:
    long = asking("hello", "x" * 300)
    with pytest.raises(InputTooLong, match="the 256 that the reward model reads"):
        RewardModelSource(folder).score([long])
    with pytest.raises(InputTooLong, match="the 20 that the reward model reads"):
        RewardModelSource(folder, max_tokens=20).score([asking("hello hello hello", "x" * 10)])


def test_a_model_without_normalisation_is_refused(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path)
    model.config.rayward_normalisation = None
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is not normalised"):
        RewardModelSource(tmp_path).load()


def test_a_raw_score_is_the_head_s_and_needs_no_normalisation(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path)
    (raw,) = RewardModelSource(tmp_path).score([asking("hello", "good")])
    for stored in (None, {"gain": 2.0, "bias": -1.0}):
        model.config.rayward_normalisation = stored
        model.save_pretrained(str(tmp_path))
        (found,) = RewardModelSource(tmp_path, raw=True).score([asking("hello", "good")])
        assert found.score == found.parts["raw"] == pytest.approx(raw.parts["raw"], abs=1e-5)


def test_a_tokenizer_of_another_model_is_detected(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="with id 320, but the model's vocabulary has 320"):
        RewardModelSource(tmp_path).load()


def test_a_broken_model_never_scores(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path)
    with torch.no_grad():
        model.get_parameter("score.weight")[0, 0] = math.nan
    model.save_pretrained(str(tmp_path))
    with pytest.raises(NonFiniteScore, match="gave nan for request 'r'"):
        RewardModelSource(tmp_path).score([asking("hello", "x")])


@pytest.mark.parametrize("unit_variance", [False, True])
def test_demonstrations_score_zero_on_average_after_normalisation(tmp_path: Path, unit_variance: bool) -> None:
    model, encoding = tiny_reward_model(tmp_path), ChatEncoding.load(tmp_path)
    demonstrations = [
        Demonstration(prompt=(Message(role="user", content=f"q {n}"),), response="good " * (n + 1)) for n in range(12)
    ]
    sequences = [[*encoding.prompt(d.prompt), *encoding.response(d.response, ended=True)] for d in demonstrations]
    stored = Normalisation.of(torch.tensor(raw_scores(model, sequences, 64)), unit_variance)
    set_normalisation(model, stored)
    save_reward_model(model, encoding, tmp_path)
    requests = [
        ScoreRequest(id=str(n), prompt=demonstration.prompt, response=demonstration.response, ended=True)
        for n, demonstration in enumerate(demonstrations)
    ]
    got = torch.tensor([reply.score for reply in RewardModelSource(tmp_path).score(requests)])
    assert got.mean().item() == pytest.approx(0, abs=1e-5)
    if unit_variance:
        assert got.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    else:
        assert stored.gain == 1.0
        assert got.std(correction=0).item() != pytest.approx(1, abs=1e-2)


def test_raw_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    model = load_reward_model(folder, torch.float32)
    sequences = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11], [5]]
    together = raw_scores(model, sequences, max_batch_tokens=1000)
    assert together == pytest.approx(raw_scores(model, sequences, max_batch_tokens=1), abs=1e-5)
