"""A real engine: what it samples, what it says of it, and new weights while it does."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from actors.config import GeneratorConfig
from actors.engine import Engine
from actors.generator import Generator, GeneratorError
from actors.trajectory import Completion
from actors.transfer import Manifest, TransferError
from benchmarks.one_gpu import REPEATS, decode_rates
from learner.config import ParityConfig, PublishConfig
from learner.weights.publish import Probe, Publisher, PublishError, StaleWeights
from learner.weights.sender import WeightSender
from tests.actors.conftest import ENGINE, STOP_IDS, Served
from tests.hf_learner import CorruptingSender, DyingSender, HfLearner, token_logprobs
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow

CLOSE = 1e-3  # nats; float32 on both sides, other kernels
QUERIES = [[1, 10 + i, 20 + i, 30] for i in range(32)]
PROBES = [Probe(ids=[1, *range(first, first + 40)]) for first in (50, 120, 200)]
EXACT = ParityConfig(mean_bound=CLOSE, max_bound=10 * CLOSE)


def sample(
    served: Served, queries: Sequence[Sequence[int]], tokens: int, temperature: float = 1.0, seed: int = 0
) -> list[Completion]:
    seeds = [seed + i for i in range(len(queries))]
    return served.runner.run(served.generator.generate(queries, seeds, tokens, temperature))


def gap(served: Served, completion: Completion, temperature: float = 1.0) -> float:
    """Largest difference between a response's behaviour log-probs and the Hugging Face model's."""
    ids = [*completion.query_ids, *completion.response_ids]
    expected = token_logprobs(served.model, ids, temperature)[-len(completion.response_ids) :]
    return (expected - torch.tensor(completion.logprobs)).abs().max().item()


def publisher(
    served: Served, deadline_s: float = 20.0, kv_cache: Literal["keep", "recompute"] = "keep", **sender: type
) -> Publisher:
    config = PublishConfig(deadline_s=deadline_s, bucket_mb=1, parity=EXACT, kv_cache=kv_cache)
    learner = HfLearner(served.model, config, **sender)
    return Publisher(learner, config, PROBES)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_behaviour_logprobs_are_of_the_distribution_sampled_from(served: Served, temperature: float) -> None:
    for completion in sample(served, QUERIES[:8], 24, temperature):
        assert gap(served, completion, temperature) < CLOSE


def test_a_response_ends_with_its_first_eos_or_at_its_length(served: Served) -> None:
    completions = sample(served, QUERIES, 120)
    for query, completion in zip(QUERIES, completions, strict=True):
        *body, last = completion.response_ids
        assert completion.query_ids == tuple(query)
        assert not set(body) & set(STOP_IDS)
        assert completion.ended == (last in STOP_IDS)
        assert completion.ended or len(completion.response_ids) == 120
    assert {c.response_ids[-1] for c in completions if c.ended} == set(STOP_IDS)


def test_an_eos_as_the_first_or_the_last_token_that_is_allowed_ends_a_response(served: Served) -> None:
    """A response that ends by itself after n tokens does so with room for n too, and is cut off with room for n - 1."""
    queries = [QUERIES[number % 32] for number in range(400)]
    completions = sample(served, queries, 8, temperature=2.0)  # hot, so that an EOS comes early
    lengths = {len(c.response_ids): number for number, c in enumerate(completions) if c.ended}
    assert 1 in lengths, "none of the responses is an EOS alone"
    for length, number in lengths.items():
        again, short = (sample(served, [queries[number]], n, 2.0, seed=number)[0] for n in (length, max(length - 1, 1)))
        assert (again.ended, again.response_ids) == (True, completions[number].response_ids)
        assert short.ended == (length == 1)


def test_the_benchmark_of_decoding_samples(served: Served) -> None:
    rates = served.runner.run(decode_rates(served.generator._engine, 4, prompt=8, tokens=64))
    assert len(rates) == REPEATS
    assert all(map(math.isfinite, rates))
    assert any(rates)


def test_the_text_is_the_response_without_its_eos(served: Served) -> None:
    completion = next(c for c in sample(served, QUERIES, 120) if c.response_ids[-1] == STOP_IDS[0])
    assert completion.text == tiny_tokenizer().decode(list(completion.response_ids[:-1]), skip_special_tokens=True)


def test_a_seed_gives_the_same_response_whoever_is_beside_it(served: Served) -> None:
    alone = served.runner.run(served.generator.generate([QUERIES[3]], [99], 40, 1.0))[0]
    crowd = served.runner.run(served.generator.generate([*QUERIES[:8], QUERIES[3]], [*range(8), 99], 40, 1.0))
    assert crowd[-1].response_ids == alone.response_ids
    assert crowd[3].response_ids != alone.response_ids


def test_teacher_forced_logprobs_are_the_models(served: Served) -> None:
    sequences = [probe.ids for probe in PROBES]
    answers = served.runner.run(served.generator.logprobs(sequences))
    for sequence, answer in zip(sequences, answers, strict=True):
        assert len(answer) == len(sequence) - 1
        assert answer == pytest.approx(token_logprobs(served.model, sequence).tolist(), abs=CLOSE)


def test_teacher_forced_logprobs_depend_on_neither_batch_nor_order(served: Served) -> None:
    sequences = [[*query, *range(40, 40 + 3 * number)] for number, query in enumerate(QUERIES[:16])]
    crowd = served.runner.run(served.generator.logprobs(sequences))
    backwards = served.runner.run(served.generator.logprobs(sequences[::-1]))[::-1]
    for sequence, one, other in zip(sequences, crowd, backwards, strict=True):
        (alone,) = served.runner.run(served.generator.logprobs([sequence]))
        assert one == pytest.approx(alone, abs=1e-4)
        assert other == pytest.approx(alone, abs=1e-4)


def test_an_echo_tells_the_likeliest_token_s_logprob_beside_each_own_one(served: Served) -> None:
    (said,) = sample(served, QUERIES[:1], 12, temperature=0.0)
    greedy = [*said.query_ids, *said.response_ids]
    sequences = [PROBES[0].ids, greedy]
    answers = served.runner.run(served.generator.echo(sequences))
    for sequence, (own, likeliest) in zip(sequences, answers, strict=True):
        with torch.no_grad():
            rows = served.model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)
        assert own[:-1] == pytest.approx(token_logprobs(served.model, sequence).tolist(), abs=CLOSE)
        assert likeliest == pytest.approx(rows.max(-1).values.tolist(), abs=CLOSE)
        assert own[-1] == likeliest[-1]
    (own, likeliest), begin = answers[1], len(said.query_ids) - 1
    assert own[begin:] == likeliest[begin:], "what was sampled greedily is the likeliest, to the bit"
    assert own[:begin] != likeliest[:begin]


@pytest.mark.parametrize(
    ("query", "tokens", "text"),
    [
        ([], 8, "query 1 is empty"),
        ([1] * 250, 8, "query 1 has 250 tokens and needs room for 8 more, but max_model_len is 256"),
        ([1, 320], 8, "query 1 holds token id 320, outside the vocabulary of 320"),
        ([1, -1], 8, "query 1 holds token id -1"),
    ],
)
def test_a_query_that_cannot_be_served_is_refused_and_the_engine_lives(
    served: Served, query: list[int], tokens: int, text: str
) -> None:
    with pytest.raises(ValueError, match=f"'generator-0': {text}"):
        served.runner.run(served.generator.generate([QUERIES[0], query], [1, 2], tokens, 1.0))
    assert len(sample(served, QUERIES[:1], 8)) == 1


def test_a_longest_sequence_fits_exactly(served: Served) -> None:
    (completion,) = sample(served, [[1] * 250], 6)
    assert 1 <= len(completion.response_ids) <= 6


def test_requests_in_flight_survive_updates_and_every_token_tells_its_version(served: Served) -> None:
    """Versions are published one after the other while twice as many requests run as the engine takes at once."""
    publish = publisher(served)
    states: dict[int, dict[str, torch.Tensor]] = {}

    def keep(version: int) -> None:
        states[version] = {name: weight.detach().clone() for name, weight in served.model.named_parameters()}

    async def update_while_sampling() -> list[Completion]:
        version = await served.generator.version()
        keep(version)
        sampling = asyncio.ensure_future(served.generator.generate(QUERIES * 2, range(64), 240, 1.0))
        await asyncio.sleep(0.2)
        stats = served.generator.stats()
        assert stats["version"] == version
        assert stats["running"] == stats["most"] < 64
        assert 0 < stats["waiting"] <= 64 - stats["most"]  # some may have ended
        while not sampling.done():
            publish.source.train()  # pyright: ignore[reportAttributeAccessIssue]
            version += 1
            keep(version)
            publication = await publish.publish([served.generator], version)
            assert publication.lost == {}
            assert publication.metrics["parity/max_gap"] < CLOSE
            await asyncio.sleep(0.2)
        return await sampling

    before = served.generator.stats()["tokens"]
    completions = served.runner.run(update_while_sampling())
    assert len(completions) == 64
    after = served.generator.stats()
    assert (after["running"], after["waiting"], after["paused"]) == (0, 0, 0)
    sampled = sum(len(completion.response_ids) for completion in completions)
    assert after["tokens"] - before == sampled + (len(states) - 1) * len(PROBES)  # a probe takes a token, too
    across = [completion for completion in completions if len(set(completion.versions)) > 1]
    assert across
    beyonds = []
    for completion in across:
        assert list(completion.versions) == sorted(completion.versions)
        first = completion.versions[0]
        count = completion.versions.count(first)
        served.model.load_state_dict(states[first], strict=False)
        ids = [*completion.query_ids, *completion.response_ids[: count + 1]]
        *expected, beyond = token_logprobs(served.model, ids)[-count - 1 :].tolist()
        assert completion.logprobs[:count] == pytest.approx(expected, abs=CLOSE)
        beyonds.append(abs(completion.logprobs[count] - beyond))
    assert sum(beyonds) / len(beyonds) > 100 * CLOSE  # the next token is of other weights
    latest = max(states)
    served.model.load_state_dict(states[latest], strict=False)
    assert served.runner.run(served.generator.version()) == latest
    for completion in sample(served, QUERIES[:8], 24):
        assert set(completion.versions) == {latest}
        assert gap(served, completion) < CLOSE


@pytest.mark.parametrize("kv_cache", ["keep", "recompute"])
def test_after_an_update_tokens_follow_from_the_new_weights_alone_if_the_cache_is_made_anew(
    served: Served, kv_cache: Literal["keep", "recompute"]
) -> None:
    """With new keys and values a later token has the new model's log-prob; with kept ones it has a mixture's."""
    publish = publisher(served, kv_cache=kv_cache)

    async def update_while_sampling() -> tuple[int, list[Completion]]:
        version = await served.generator.version() + 1
        publish.source.train()  # pyright: ignore[reportAttributeAccessIssue]
        sampling = asyncio.ensure_future(served.generator.generate(QUERIES[:8], range(8), 200, 1.0))
        await asyncio.sleep(0.1)
        assert (await publish.publish([served.generator], version)).lost == {}
        return version, await sampling

    version, completions = served.runner.run(update_while_sampling())
    gaps = []
    for completion in completions:
        later = completion.versions.count(version) - 1  # the first was drawn from what was computed before the pause
        if len(set(completion.versions)) > 1 and later > 0:
            ids = [*completion.query_ids, *completion.response_ids]
            expected = token_logprobs(served.model, ids)[-later:]
            gaps.append((expected - torch.tensor(completion.logprobs[-later:])).abs().max().item())
    assert gaps, "no response was under way"
    assert (max(gaps) < CLOSE) == (kv_cache == "recompute"), gaps


def test_many_updates_through_one_group(served: Served) -> None:
    publish = publisher(served)
    version = served.runner.run(served.generator.version())
    for _ in range(3):
        publish.source.train()  # pyright: ignore[reportAttributeAccessIssue]
        version += 1
        metrics = served.runner.run(publish.publish([served.generator], version)).metrics
        assert metrics["parity/max_gap"] < CLOSE
        assert served.runner.run(served.generator.version()) == version


@pytest.mark.parametrize(
    ("sender", "error", "text"),
    [
        (CorruptingSender, StaleWeights, "tensors of generator-0 are not the learner's"),
        (DyingSender, PublishError, "2 transfers failed"),
    ],
)
def test_a_broken_transfer_leaves_the_old_weights_in_use(
    served: Served, sender: type, error: type[Exception], text: str
) -> None:
    state = {name: weight.detach().clone() for name, weight in served.model.named_parameters()}
    version = served.runner.run(served.generator.version())
    broken = publisher(served, deadline_s=5, sender=sender)
    broken.source.train()  # pyright: ignore[reportAttributeAccessIssue]

    async def update() -> list[Completion]:
        in_flight = asyncio.ensure_future(served.generator.generate(QUERIES[:8], range(8), 100, 1.0))
        await asyncio.sleep(0.2)
        with pytest.raises(error, match=text):
            await broken.publish([served.generator], version + 1)
        return await in_flight

    completions = served.runner.run(update())
    served.model.load_state_dict(state, strict=False)
    assert served.runner.run(served.generator.version()) == version
    for completion in [*completions, *sample(served, QUERIES[:4], 24)]:
        assert set(completion.versions) == {version}
        assert gap(served, completion) < CLOSE
    assert served.runner.run(publisher(served).publish([served.generator], version + 1)).lost == {}


def test_a_frozen_weight_that_moved_is_caught_and_a_transfer_that_broke_is_followed_by_all_weights(
    served: Served, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, run = publisher(served), served.runner.run
    learner, model = publish.source, served.model
    assert isinstance(learner, HfLearner)
    request.addfinalizer(lambda: model.requires_grad_(True))
    layer = model.requires_grad_(False).get_submodule("model.layers.1").requires_grad_(True)
    every, part = (sum(4 * weight.numel() for weight in module.parameters()) for module in (model, layer))
    version = run(served.generator.version())

    def sent() -> float:
        nonlocal version
        learner.train()
        version += 1
        publication = run(publish.publish([served.generator], version))
        assert publication.metrics["parity/max_gap"] < CLOSE
        return publication.metrics["publish/bytes"]

    assert [sent(), sent()] == [every, part]
    frozen = model.get_parameter("model.layers.0.input_layernorm.weight")
    frozen += 1e-6  # far below what the probe could notice
    with pytest.raises(StaleWeights, match=r"1 of 20 tensors of generator-0 .* first 'model.layers.0.input_l"):
        sent()
    assert run(served.generator.version()) == version - 1
    assert [sent(), sent()] == [every, part]
    pack, breaking = WeightSender._pack, iter([True])

    def broken(*arguments: Any) -> torch.Tensor:
        if next(breaking, False):
            raise TransferError("the wire broke")
        return pack(*arguments)

    monkeypatch.setattr(WeightSender, "_pack", broken)
    assert [sent(), sent()] == [every, part]
    for completion in sample(served, QUERIES[:4], 24):
        assert gap(served, completion) < CLOSE


def test_to_receive_without_a_group_is_an_error_that_can_be_undone(served: Served) -> None:
    generator, run = served.generator, served.runner.run
    version = run(generator.version())
    run(generator._engine.workers("leave the transfer group", "shutdown_weight_transfer_engine"))
    run(generator.begin_update())
    manifest = Manifest.of([("w", torch.zeros(1))], bucket_bytes=64)
    with pytest.raises(GeneratorError, match=r"failed to receive weights.*has not joined a transfer group"):
        run(generator.receive(manifest))
    run(generator.abort_update())
    assert run(generator.version()) == version
    assert len(sample(served, QUERIES[:1], 8)) == 1
    run(generator.abort_update())  # without an update, only a sign of life


def test_weights_that_do_not_fit_end_the_generator(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is the one step that cannot be undone; what could be half replaced must not be sampled from."""
    generator, run = Generator(ENGINE, served.folder, "half"), served.runner.run

    async def refuse(self: Engine, what: str, method: str, *_: object, **__: object) -> list[object]:
        raise GeneratorError(f"cannot {what}")

    monkeypatch.setattr(Engine, "workers", refuse)
    with pytest.raises(GeneratorError, match="cannot load weights"):
        run(generator.finish_update(1))
    with pytest.raises(GeneratorError, match="its weights are half replaced, since cannot load weights"):
        run(generator.version())


def test_a_generator_that_was_not_started_or_was_stopped_says_so(served: Served) -> None:
    generator = Generator(ENGINE, served.folder, "idle")
    with pytest.raises(GeneratorError, match="'idle' cannot be used: it was not started"):
        served.runner.run(generator.version())
    served.runner.run(generator.stop())
    with pytest.raises(GeneratorError, match="'idle' cannot be used: it was stopped"):
        served.runner.run(generator.version())


def test_a_folder_that_is_no_model_fails_with_the_engines_words(served: Served, tmp_path) -> None:
    for file in served.folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    generator = Generator(GeneratorConfig(), tmp_path, "empty")
    with pytest.raises((GeneratorError, OSError, ValueError), match=str(tmp_path)):
        served.runner.run(generator.start())
