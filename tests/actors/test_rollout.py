"""The rollout against the real buffer: what it asks for, what it puts, and what it does when something
fails."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.config import MissingEos, RolloutConfig
from actors.prompts import Prompt, PromptStream
from actors.rollout import rollout
from actors.sampling import Generator, GeneratorFailed, PromptFailed
from actors.trajectory import Completion, Trajectory
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger, audit
from reward_server.address import free_port
from reward_server.app import serve
from reward_server.client import RewardClient
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.sources import RuleSource
from tests.fakes import ASSISTANT, EOS, USER, FakeEncoding, FakeGenerator, FakeScorer, completion, prompts

DEADLINE_S = 5.0


@dataclass
class Run:
    """A learner that takes and advances, and as many rollouts as there are generators."""

    generators: Mapping[str, Generator]
    scorer: FakeScorer | RewardClient = field(default_factory=FakeScorer)
    prompts: list[Prompt] = field(default_factory=lambda: prompts(6))
    config: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts_per_wave=4, max_new_tokens=8))
    prompts_per_batch: int = 4
    staleness: int = 0
    deadline_s: float = DEADLINE_S
    ledger: Path | None = None
    seed: int = 11
    beside: bool = True
    batches: list[list[Trajectory]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = PromptStream(self.prompts, self.seed)
        self.buffer = Buffer(
            self.prompts_per_batch,
            self.config.samples_per_prompt,
            self.staleness,
            ledger=Ledger(self.ledger, self.stream),
            paused_s=lambda: self.scorer.paused_s,
        )
        self.leave = asyncio.Event()
        self.failed: list[GeneratorFailed] = []

    def rollouts(self) -> list[Coroutine[Any, Any, None]]:
        return [self._rollout(generator) for generator in self.generators.values()]

    async def _rollout(self, generator: Generator) -> None:
        """One that fails is left out, and the last one ends the run."""
        try:
            await rollout(
                generator,
                self.scorer,
                self.stream,
                self.buffer,
                FakeEncoding(),
                self.config,
                self.seed,
                self.leave,
                beside=self.beside,
            )
        except GeneratorFailed as error:
            self.failed.append(error)
            if len(self.failed) == len(self.generators):
                self.buffer.fail(error)

    async def train(self, iterations: int) -> list[list[Trajectory]]:
        working = [asyncio.create_task(rollout) for rollout in self.rollouts()]
        try:
            for version in range(1, iterations + 1):
                self.batches.append(await self.buffer.take(self.deadline_s))
                for generator in self.generators.values():
                    if isinstance(generator, FakeGenerator):
                        generator.version = version
                self.buffer.advance()
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        return self.batches


def test_samples_come_with_keys_prompts_scores_and_weights_version() -> None:
    scorer = FakeScorer()
    config = RolloutConfig(prompts_per_wave=2, samples_per_prompt=2, max_new_tokens=8)
    run = Run({"g": FakeGenerator()}, scorer, config=config, prompts_per_batch=2)
    first, second = asyncio.run(run.train(2))
    expected = [(run.stream[n][0].id, k) for n in range(2) for k in range(2)]
    assert [(t.key.prompt_id, t.key.k) for t in first] == expected
    assert {t.key.attempt for t in first} == {t.key.epoch for t in first} == {0}
    for t in first:
        prompt = next(prompt for prompt in run.prompts if prompt.id == t.key.prompt_id)
        assert t.prompt == prompt.messages
        assert t.completion.query_ids == (USER, ord(prompt.messages[0].content) - ord("a") + 4, ASSISTANT)
        assert t.score == t.parts["raw_score"] == len(t.completion.text)
        assert t.parts["letters"] == 1.0
    assert {t.oldest_version for t in first} == {0}
    assert {t.oldest_version for t in second} == {1}
    assert [len(requests) for requests in scorer.batches[:2]] == [4, 4], "what is complete together goes in one request"


def test_requests_for_scores_have_ids_of_their_own_and_tell_whether_the_response_ended() -> None:
    scorer = FakeScorer()
    run = Run({"g": FakeGenerator()}, scorer, config=RolloutConfig(max_new_tokens=3))
    asyncio.run(run.train(3))
    requests = [request for batch in scorer.batches for request in batch]
    assert len({request.id for request in requests}) == len(requests)
    ended = {len(t.completion.text) < 3: t.completion.ended for batch in run.batches for t in batch}
    assert ended == {True: True, False: False}


def test_a_cut_off_response_is_scored_by_the_rule_and_keeps_its_raw_score() -> None:
    config = RolloutConfig(max_new_tokens=2, missing_eos=MissingEos(rule="replace", value=-1.0))
    run = Run({"g": FakeGenerator()}, config=config)
    samples = [t for batch in asyncio.run(run.train(3)) for t in batch]
    assert {t.completion.ended for t in samples} == {True, False}
    for t in samples:
        letters = float(len(t.completion.text))
        assert t.score == (letters if t.completion.ended else -1.0)
        assert t.parts["raw_score"] == letters


def test_a_response_depends_on_its_ticket_not_on_who_sampled_it_or_in_which_wave() -> None:
    one = Run({"g": FakeGenerator()})
    many = Run(
        {name: FakeGenerator(turns=lambda: random.randint(0, 5)) for name in "abc"},
        config=RolloutConfig(prompts_per_wave=1, waves_in_flight=2, max_new_tokens=8),
    )
    assert asyncio.run(one.train(4)) == asyncio.run(many.train(4))


def test_every_sample_has_a_seed_of_its_own() -> None:
    generator = FakeGenerator()
    config = RolloutConfig(prompts_per_wave=4, samples_per_prompt=3, max_new_tokens=8)
    asyncio.run(Run({"g": generator}, config=config).train(4))
    assert len(set(generator.seeds)) == len(generator.seeds) >= 48


class Once:
    """A fault that strikes the first `times` calls."""

    def __init__(self, error: BaseException, times: int = 1) -> None:
        self.error = error
        self.left = times

    def __call__(self, _: object) -> BaseException | None:
        self.left -= 1
        return self.error if self.left >= 0 else None


def test_a_failed_wave_is_sampled_again_for_the_same_prompts_with_other_seeds(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    generator = FakeGenerator(fault=Once(ConnectionError("engine died"), times=4))
    run = Run({"g": generator}, ledger=path)
    (batch,) = asyncio.run(run.train(1))
    assert [t.key.prompt_id for t in batch] == [run.stream[n][0].id for n in range(4)]
    assert [t.key.attempt for t in batch] == [1, 1, 1, 1]
    assert generator.calls[:4] == generator.calls[4:8]
    assert not set(generator.seeds[:4]) & set(generator.seeds[4:8])
    found = audit(path)
    assert (found.trained, found.dropped["generation failed"]) == (4, 4)


class Slow(FakeGenerator):
    """Its first call is answered only when `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        if not self.calls:
            self.calls.append(query_ids)
            await self.go.wait()
        return await super().generate(query_ids, seeds, max_new_tokens, temperature)


def test_a_response_is_scored_and_put_while_others_of_its_wave_are_sampled() -> None:
    generator, scorer = Slow(), FakeScorer()

    async def train() -> tuple[list[int], list[list[Trajectory]]]:
        run = Run({"g": generator}, scorer)
        training = asyncio.create_task(run.train(1))
        while run.buffer.counts()["buffer/ready"] < 3:
            await asyncio.sleep(0)
        before = [len(requests) for requests in scorer.batches]
        generator.go.set()
        return before, await training

    before, batches = asyncio.run(train())
    assert before == [3]
    assert [len(requests) for requests in scorer.batches] == [3, 1]
    assert batches == asyncio.run(Run({"g": FakeGenerator()}).train(1)), "in the order of the tickets"


def test_where_the_scorer_borrows_the_generators_threads_a_wave_is_scored_when_all_of_it_is_complete() -> None:
    generator, scorer = Slow(), FakeScorer()

    async def train() -> None:
        training = asyncio.create_task(Run({"g": generator}, scorer, beside=False).train(1))
        await asyncio.sleep(0.05)
        assert (len(generator.calls), scorer.batches) == (4, [])
        generator.go.set()
        await training

    asyncio.run(train())
    assert [len(requests) for requests in scorer.batches][:1] == [4]


def test_what_is_complete_while_a_request_is_scored_goes_in_the_next() -> None:
    class Hurried(FakeGenerator):
        async def generate(
            self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
        ) -> list[Completion]:
            place = len(self.calls)
            self.calls.append(query_ids)
            while place and not scorer.batches:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02 * place)  # each too late to go with the one before
            if place == 3:
                scorer.working.set()
            return await super().generate(query_ids, seeds, max_new_tokens, temperature)

    class Waiting(FakeScorer):
        async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
            found = await super().score(requests)
            await self.working.wait()
            return found

    async def train() -> None:
        run = Run({"g": Hurried()}, scorer)
        training = asyncio.create_task(run.train(1))
        while not scorer.batches:
            scorer.working.set()
            await asyncio.sleep(0)
        scorer.working.clear()
        await training

    scorer = Waiting()
    asyncio.run(train())
    assert [len(requests) for requests in scorer.batches][:2] == [1, 3], "one request of a wave at a time"


def test_a_response_that_hangs_is_lost_at_its_deadline_and_costs_no_other(tmp_path: Path) -> None:
    path, scorer = tmp_path / "ledger.jsonl", FakeScorer()
    config = RolloutConfig(prompts_per_wave=4, max_new_tokens=8, wave_deadline_s=0.05)
    (batch,) = asyncio.run(Run({"g": Slow()}, scorer, config=config, ledger=path).train(1))
    assert [t.key.attempt for t in batch] == [1, 0, 0, 0]
    assert [len(requests) for requests in scorer.batches] == [3, 1], "no response is scored twice"
    found = audit(path)
    assert (found.trained, found.dropped["generation failed"], found.violations) == (4, 1, ())


def test_a_generator_lost_half_way_costs_only_what_was_not_complete(tmp_path: Path) -> None:
    path, lost, scorer = tmp_path / "ledger.jsonl", Slow(), FakeScorer()
    lost.fault = lambda _: GeneratorFailed("it was killed") if lost.go.is_set() else None

    async def train() -> list[Trajectory]:
        run = Run({"lost": lost, "g": FakeGenerator(turns=lambda: 10)}, scorer, ledger=path)
        training = asyncio.create_task(run.train(1))
        while run.buffer.counts()["buffer/ready"] < 3:
            await asyncio.sleep(0)
        lost.go.set()
        return (await training)[0]

    batch = asyncio.run(train())
    assert [t.key.attempt for t in batch] == [1, 0, 0, 0]
    assert [len(requests) for requests in scorer.batches] == [3, 1]
    found = audit(path)
    assert (found.trained, found.dropped["generator lost"], found.violations) == (4, 1, ())


def _train_and_fail(run: Run, iterations: int = 1) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 the callers look at the kind and the text
        asyncio.run(run.train(iterations))
    return caught.value


def test_the_only_generator_failing_again_and_again_stops_the_run_with_the_cause() -> None:
    run = Run({"g": FakeGenerator(fault=Once(ConnectionError("engine died"), times=100))})
    error = _train_and_fail(run)
    assert isinstance(error, GeneratorFailed)
    assert "2 waves in a row failed; the last, of 4 prompts" in str(error)
    assert "ConnectionError: engine died" in str(error)


def test_a_generator_that_fails_now_and_then_goes_on() -> None:
    generator = FakeGenerator()
    generator.fault = lambda _: OSError("hiccup") if len(generator.calls) % 8 in (1, 2, 3, 4) else None
    batches = asyncio.run(Run({"g": generator}).train(4))
    assert [{t.key.attempt for t in batch} for batch in batches] == [{1}] * 4


def test_a_broken_generator_is_left_out_and_the_others_do_its_work(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    broken = FakeGenerator(fault=Once(ConnectionError("engine died"), times=1000))
    generators = {"broken": broken, "slow": FakeGenerator(turns=lambda: 20)}
    run = Run(generators, ledger=path, config=RolloutConfig(prompts_per_wave=2, max_new_tokens=8))
    batches = asyncio.run(run.train(5))
    order = [t.key.prompt_id for batch in batches for t in batch]
    assert order == [run.stream[n][0].id for n in range(20)]
    assert len(broken.calls) == 4, "two waves of two prompts"
    assert audit(path).trained == 20


def test_a_prompt_that_breaks_every_wave_is_found_and_named() -> None:
    bad = [USER, 5, ASSISTANT]  # the prompt "b", whose id is p1
    spoilt = {name: FakeGenerator(fault=lambda queries: OSError("crash") if bad in queries else None) for name in "ab"}
    config = RolloutConfig(prompts_per_wave=4, max_new_tokens=8, max_attempts=3)
    run = Run(spoilt, config=config, prompts_per_batch=6)
    error = _train_and_fail(run)
    assert isinstance(error, PromptFailed)
    assert "prompt 'p1' could not be sampled in 3 attempts; the last: generation failed, OSError: crash" in str(error)
    assert any(generator.calls[-1] == [bad] for generator in spoilt.values()), "it was tried alone"


def test_an_over_long_prompt_stops_the_run_and_is_named() -> None:
    long = Prompt(id="long", messages=(Message(role="user", content="a" * 50),), reference=None)
    config = RolloutConfig(max_prompt_tokens=10, max_new_tokens=8)
    error = _train_and_fail(Run({"g": FakeGenerator()}, prompts=[*prompts(3), long], config=config))
    assert isinstance(error, ValueError)
    assert "prompt 'long' has 52 tokens, more than the 10 allowed" in str(error)


def test_what_no_generator_can_sample_ends_the_run_at_once_and_costs_no_generator() -> None:
    generator = FakeGenerator(fault=lambda queries: ValueError("query 1 holds token id 99"))
    error = _train_and_fail(Run({"g": generator}))
    assert isinstance(error, ValueError)
    assert re.fullmatch(r"prompt 'p\d' cannot be sampled: query 1 holds token id 99", str(error))
    assert len(generator.calls) == 4, "one wave"


def test_without_a_score_the_run_stops_with_the_scorers_own_error() -> None:
    unavailable = ConnectionError("no score for 60 s: connection refused")
    run = Run({"g": FakeGenerator()}, FakeScorer(fault=Once(unavailable, times=100)))
    assert _train_and_fail(run) is unavailable
    counts = run.buffer.counts()
    assert (counts["buffer/ready"], counts["buffer/in_flight"]) == (0, 0)


def test_while_the_scorer_is_paused_nothing_is_sampled_and_nothing_is_lost() -> None:
    generator, scorer = FakeGenerator(), FakeScorer()

    async def pause() -> tuple[int, list[list[Trajectory]]]:
        scorer.working.clear()
        run = Run({"g": generator}, scorer)
        training = asyncio.create_task(run.train(2))
        await asyncio.sleep(0.1)
        sampled = len(generator.calls)
        scorer.working.set()
        return sampled, await training

    sampled, batches = asyncio.run(pause())
    assert sampled == 0
    assert [{t.key.attempt for t in batch} for batch in batches] == [{0}, {0}]


def test_a_run_whose_reward_server_is_away_is_paused_beyond_the_batchs_deadline_and_loses_nothing() -> None:
    """With the real client and a real server, which starts late on the port that the client knows."""
    port = free_port("127.0.0.1")
    config = RolloutConfig(prompts_per_wave=2, max_new_tokens=8)
    generators = {"a": FakeGenerator(), "b": FakeGenerator()}

    async def late() -> list[list[Trajectory]]:
        scorer = RewardClient(f"http://127.0.0.1:{port}", retry_s=0.2, pause_s=60.0, ask_s=0.2)
        run = Run(generators, scorer, config=config, prompts_per_batch=8, deadline_s=0.6)
        training = asyncio.create_task(run.train(2))
        while scorer.paused is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        assert not training.done()
        assert [len(generator.calls) for generator in generators.values()] == [2, 2], "no new prompts in a pause"
        server = serve(RuleSource(None), port=port)
        try:
            return await asyncio.wait_for(training, 30)
        finally:
            assert scorer.paused is None
            await scorer.close()
            await asyncio.to_thread(server.close)

    batches = asyncio.run(late())
    assert [{t.key.attempt for t in batch} for batch in batches] == [{0}, {0}]
    assert all(t.score == len(t.completion.text.split()) for batch in batches for t in batch)


def test_replies_to_other_requests_are_refused() -> None:
    class Shuffling(FakeScorer):
        async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
            return (await super().score(requests))[::-1]

    error = _train_and_fail(Run({"g": FakeGenerator()}, Shuffling()))
    assert "4 responses were to be scored, the replies are to others" in str(error)


def test_a_response_without_a_token_is_sampled_again() -> None:
    class Stripping(FakeGenerator):
        async def generate(
            self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
        ) -> list[Completion]:
            first = not self.calls
            made = await super().generate(query_ids, seeds, max_new_tokens, temperature)
            return [completion(query_ids[0], [])] if first else made

    run = Run({"g": Stripping()})
    (batch,) = asyncio.run(run.train(1))
    assert [t.key.attempt for t in batch] == [1, 0, 0, 0]
    assert run.buffer.counts()["buffer/dropped/empty response"] == 1


def test_too_few_responses_are_a_failed_wave() -> None:
    class Forgetful(FakeGenerator):
        async def generate(
            self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
        ) -> list[Completion]:
            return (await super().generate(query_ids, seeds, max_new_tokens, temperature))[1:]

    error = _train_and_fail(Run({"g": Forgetful()}))
    assert "0 responses came back for 1 queries" in str(error)


def test_a_generator_that_missed_the_weights_is_not_trained_on() -> None:
    class Stuck:
        name = "stuck"

        def __init__(self) -> None:
            self.inner = FakeGenerator(version=0)

        async def generate(
            self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
        ) -> list[Completion]:
            return await self.inner.generate(query_ids, seeds, max_new_tokens, temperature)

    run = Run({"stuck": Stuck()})
    error = _train_and_fail(run, iterations=2)
    assert isinstance(error, GeneratorFailed)
    assert "was sampled with weights of versions 0 to 0; it may be trained with versions 1 to 1 only" in str(error)
    assert len(run.batches) == 1


def test_cancelling_gives_back_what_is_under_way_and_ends_at_once() -> None:
    async def run_and_stop() -> Mapping[str, float]:
        run = Run({"g": FakeGenerator(turns=lambda: 10**9)})
        (work,) = run.rollouts()
        task = asyncio.create_task(work)
        for _ in range(5):
            await asyncio.sleep(0)
        assert run.buffer.counts()["buffer/in_flight"] == 4
        task.cancel()
        await asyncio.wait({task}, timeout=DEADLINE_S)
        assert task.cancelled()
        return run.buffer.counts()

    counts = asyncio.run(run_and_stop())
    assert (counts["buffer/in_flight"], counts["buffer/dropped/stopped"]) == (0, 4)


@pytest.mark.parametrize("lanes", [1, 2])
def test_one_that_leaves_finishes_its_waves_and_takes_no_more(lanes: int) -> None:
    async def run_and_leave() -> Mapping[str, float]:
        config = RolloutConfig(prompts_per_wave=4, waves_in_flight=lanes, max_new_tokens=8)
        run = Run({"g": FakeGenerator(turns=lambda: 20)}, config=config, prompts_per_batch=4, staleness=5)
        (work,) = run.rollouts()
        task = asyncio.create_task(work)
        for _ in range(5):
            await asyncio.sleep(0)
        assert run.buffer.counts()["buffer/in_flight"] == 4 * lanes
        run.leave.set()
        await asyncio.wait_for(task, DEADLINE_S)
        return run.buffer.counts()

    counts = asyncio.run(run_and_leave())
    assert (counts["buffer/in_flight"], counts["buffer/ready"]) == (0, 4 * lanes)
    assert not [name for name in counts if "dropped" in name]


def test_one_that_waits_for_tickets_leaves_at_once() -> None:
    async def run_and_leave() -> Mapping[str, float]:
        run = Run({"g": FakeGenerator()})
        (work,) = run.rollouts()
        task = asyncio.create_task(work)
        while run.buffer.counts()["buffer/ready"] < 4:
            await asyncio.sleep(0)
        run.leave.set()
        await asyncio.wait_for(task, DEADLINE_S)
        return run.buffer.counts()

    assert asyncio.run(run_and_leave())["buffer/in_flight"] == 0


def test_a_generator_that_is_gone_loses_its_waves_once_and_the_prompts_go_on() -> None:
    gone = FakeGenerator(fault=Once(GeneratorFailed("it was killed"), times=100), turns=lambda: 1)
    run = Run({"gone": gone, "g": FakeGenerator(turns=lambda: 3)}, config=RolloutConfig(prompts_per_wave=2))
    (batch,) = asyncio.run(run.train(1))
    assert len(gone.calls) == 2, "one wave"
    assert sorted(t.key.attempt for t in batch) == [0, 0, 1, 1]
    assert run.buffer.counts()["buffer/dropped/generator lost"] == 2


def test_a_prompt_that_kills_every_generator_is_found_and_named() -> None:
    bad = [USER, 5, ASSISTANT]
    deadly = lambda queries: GeneratorFailed("it was killed") if bad in queries else None  # noqa: E731
    error = _train_and_fail(Run({name: FakeGenerator(fault=deadly) for name in "abcd"}, prompts_per_batch=6))
    assert isinstance(error, PromptFailed)
    assert "prompt 'p1' could not be sampled in 3 attempts; the last: generator lost, it was killed" in str(error)


def test_closing_the_buffer_ends_the_rollouts_in_peace() -> None:
    async def run_and_close() -> None:
        run = Run({"a": FakeGenerator(), "b": FakeGenerator()})
        working = asyncio.gather(*run.rollouts())
        await run.buffer.take(DEADLINE_S)
        run.buffer.close()
        await asyncio.wait_for(working, DEADLINE_S)

    asyncio.run(run_and_close())


@pytest.mark.parametrize("seed", range(25))
def test_random_faults_and_delays_lose_and_double_nothing(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    path = tmp_path / "ledger.jsonl"

    def fault(_: object) -> BaseException | None:
        return OSError("bad luck") if dice.random() < 0.15 else None

    generators = {f"g{i}": FakeGenerator(fault=fault, turns=lambda: dice.randint(0, 12)) for i in range(3)}
    config = RolloutConfig(
        prompts_per_wave=dice.randint(1, 5),
        waves_in_flight=dice.randint(1, 3),
        samples_per_prompt=dice.randint(1, 3),
        max_new_tokens=dice.randint(1, 6),
        max_attempts=1000,
    )
    staleness = dice.randint(0, 3)
    run = Run(generators, config=config, prompts_per_batch=dice.randint(1, 7), staleness=staleness, ledger=path)
    try:
        batches = asyncio.run(run.train(8))
    except GeneratorFailed:
        batches = run.batches  # all three had bad luck twice in a row
    trained = [t for batch in batches for t in batch]
    assert all(times == 1 for times in Counter(t.key for t in trained).values())
    samples = config.samples_per_prompt
    expected = [run.stream[n] for n in range(len(trained) // samples) for _ in range(samples)]
    assert [(t.key.prompt_id, t.key.epoch) for t in trained] == [(p.id, epoch) for p, epoch in expected]
    for version, batch in enumerate(batches):
        assert all(0 <= version - t.oldest_version <= staleness for t in batch)
        assert all(t.completion.response_ids[-1] == EOS or not t.completion.ended for t in batch)
    counts, found = run.buffer.counts(), audit(path)
    assert counts["buffer/trained"] == len(trained) == found.trained * samples
    assert counts["buffer/issued"] == found.issued * samples
    dropped = sum(value for name, value in counts.items() if name.startswith("buffer/dropped/"))
    assert dropped == sum(found.dropped.values()) * samples
    assert counts["buffer/in_flight"] == 0
    assert counts["buffer/issued"] == counts["buffer/trained"] + dropped + counts["buffer/ready"]
