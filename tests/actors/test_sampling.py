"""Sampling without a buffer: order, seeds, sharing among generators, and faults."""

import asyncio

import pytest

from actors.config import RolloutConfig
from actors.sampling import GeneratorFailed, PromptFailed, sample
from tests.fakes import ASSISTANT, USER, FakeEncoding, FakeFleet, FakeGenerator, prompts

CONFIG = RolloutConfig(prompts_per_wave=2, max_new_tokens=4)


def run(generators, count, samples=1, seed=0, config=CONFIG, **more):
    fleet = generators if isinstance(generators, FakeFleet) else FakeFleet(*generators)

    async def sampled():
        return await sample(fleet, prompts(count), FakeEncoding(), config, samples, seed, **more)

    return asyncio.run(sampled())


def test_responses_come_in_the_order_of_the_prompts():
    found = run([FakeGenerator()], 5, samples=3)
    assert [len(group) for group in found] == [3] * 5
    encoding = FakeEncoding()
    for group, prompt in zip(found, prompts(5), strict=True):
        assert {completion.query_ids for completion in group} == {tuple(encoding.prompt(prompt.messages))}


def test_a_generator_gets_as_many_prompts_at_once_as_configured():
    under_way = set()

    class Watched(FakeGenerator):
        async def generate(self, query_ids, seeds, max_new_tokens, temperature):
            under_way.add(seeds[0])
            most.append(len(under_way))
            await asyncio.sleep(0)
            under_way.remove(seeds[0])
            return await super().generate(query_ids, seeds, max_new_tokens, temperature)

    generator, most = Watched(), []
    run([generator], 5, samples=3)
    assert [len(call) for call in generator.calls] == [3] * 5
    assert max(most) == 2


def test_what_is_complete_is_taken_while_the_others_of_its_wave_are_sampled():
    slow = FakeEncoding().prompt(prompts(1)[0].messages)

    class Slow(FakeGenerator):
        async def generate(self, query_ids, seeds, max_new_tokens, temperature):
            while slow in query_ids and sum(done) < 3:
                await asyncio.sleep(0.001)
            return await super().generate(query_ids, seeds, max_new_tokens, temperature)

    done = []
    config = CONFIG.model_copy(update={"prompts_per_wave": 4})
    assert run([Slow()], 4, config=config, advance=done.append) == run([FakeGenerator()], 4)
    assert done == [3, 1]


def test_responses_do_not_depend_on_who_samples_them_or_in_what_portions():
    alone = run([FakeGenerator()], 7, samples=2)
    turns = iter(range(100))
    shared = run([FakeGenerator(turns=lambda: next(turns) % 5) for _ in range(3)], 7, samples=2)
    one_by_one = run([FakeGenerator()], 7, samples=2, config=CONFIG.model_copy(update={"prompts_per_wave": 1}))
    assert alone == shared == one_by_one
    assert run([FakeGenerator()], 7, samples=2, seed=1) != alone


def test_every_response_has_a_seed_of_its_own():
    generator = FakeGenerator()
    run([generator], 6, samples=4)
    assert len(set(generator.seeds)) == 24


def test_whichever_generator_is_free_takes_the_next_prompts():
    slow, quick = FakeGenerator(turns=lambda: 50), FakeGenerator()
    found = run([slow, quick], 12)
    assert (len(slow.calls), len(quick.calls)) == (2, 10)
    assert found == run([FakeGenerator()], 12)  # the slow one's prompts came first, its responses last


def test_progress_counts_every_prompt_once():
    done = []
    run([FakeGenerator(), FakeGenerator()], 5, advance=done.append)
    assert sorted(done) == [1, 2, 2]


def test_no_prompts_give_no_responses():
    assert run([FakeGenerator()], 0) == []


def test_a_generator_that_fails_twice_in_a_row_is_given_no_more_and_its_error_is_told():
    broken = FakeGenerator(fault=lambda queries: RuntimeError("out of memory"))
    with pytest.raises(GeneratorFailed, match=r"2 waves in a row failed.* RuntimeError: out of memory"):
        run([broken], 6)
    assert len(broken.calls) == 4, "two waves of two prompts"


def test_the_prompts_of_a_generator_that_fails_are_given_to_the_others():
    broken = FakeGenerator(fault=lambda queries: RuntimeError("out of memory"), turns=lambda: 30)
    working = FakeGenerator()
    done = []
    found = run([broken, working], 6, advance=done.append)
    assert found == run([FakeGenerator()], 6)
    assert (len(broken.calls), sum(done)) == (4, 6)


def test_one_that_fails_last_leaves_its_prompts_to_one_that_had_finished():
    late = FakeGenerator(fault=lambda queries: GeneratorFailed("gone"), turns=lambda: 500)
    assert run([late, FakeGenerator()], 4) == run([FakeGenerator()], 4)


def test_a_replacement_takes_over_where_the_last_one_was_lost():
    lost, spare = FakeGenerator(), FakeGenerator()
    lost.fault = lambda queries: GeneratorFailed("gone") if len(lost.calls) == 4 else None
    done = []
    assert run(FakeFleet(lost, spares=[spare]), 6, advance=done.append) == run([FakeGenerator()], 6)
    assert (len(lost.calls), len(spare.calls), sum(done)) == (4, 3, 6), "what was sampled is not sampled again"


@pytest.mark.parametrize("kind", [GeneratorFailed, OSError])
def test_a_prompt_that_breaks_every_generator_is_tried_alone_at_last_and_named(kind):
    bad = [USER, 7, ASSISTANT]  # the prompt "d", whose id is p3
    spoilt = [FakeGenerator(fault=lambda queries: kind("crash") if bad in queries else None) for _ in range(9)]
    with pytest.raises(PromptFailed, match=r"^prompt 'p3' could not be sampled in 3 attempts; the last: .*crash"):
        run(FakeFleet(*spoilt[:2], spares=spoilt[2:]), 6)
    tries = [(generator, call) for generator in spoilt for call in generator.calls if bad in call]
    assert len(tries) == 3
    last, _ = tries[-1]
    assert last.calls[-1] == [bad], "it was tried alone"


def test_what_no_generator_can_sample_is_raised_at_once_with_the_prompts():
    generator = FakeGenerator(fault=lambda queries: ValueError("query 1 is empty"))
    with pytest.raises(ValueError, match=r"^prompt 'p0' cannot be sampled: query 1 is empty"):
        run([generator], 6)
    assert len(generator.calls) == 2, "one wave"


def test_a_timeout_of_the_generators_own_keeps_its_text():
    broken = FakeGenerator(fault=lambda queries: TimeoutError("the engine sleeps"))
    with pytest.raises(GeneratorFailed, match="TimeoutError: the engine sleeps"):
        run([broken], 2)


def test_a_chunk_that_takes_too_long_names_its_prompts_and_the_limit():
    class Stuck(FakeGenerator):
        async def generate(self, query_ids, seeds, max_new_tokens, temperature):
            await asyncio.sleep(60)
            return []

    config = CONFIG.model_copy(update={"wave_deadline_s": 0.01})
    with pytest.raises(
        GeneratorFailed, match=r"TimeoutError: the responses to prompt 'p1' .* within 0.01 s; .*wave_deadline_s"
    ):
        run([Stuck()], 2, config=config)


def test_a_response_too_few_is_not_given_to_the_wrong_prompt():
    class Lossy(FakeGenerator):
        async def generate(self, query_ids, seeds, max_new_tokens, temperature):
            return (await super().generate(query_ids, seeds, max_new_tokens, temperature))[:-1]

    with pytest.raises(GeneratorFailed, match="1 responses came back for 2 queries"):
        run([Lossy()], 2, samples=2)
