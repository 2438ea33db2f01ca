"""Which prompts are kept, and in which set."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.schema import PromptsConfig
from cluster.pipeline.prompts.curation import EQUAL, LIMIT, PREFIX, curate, set_of
from cluster.pipeline.prompts.raw import RawPrompt
from reward_server.schema import Message


def all_for_ppo(**settings: int) -> PromptsConfig:
    shares = ("demonstration_share", "preference_share", "valid_share", "heldout_share")
    return PromptsConfig.model_validate(settings | dict.fromkeys(shares, 0.0))


def raw(line: int, text: str, user: str | None = None, id: str | None = None) -> RawPrompt:
    messages = (Message(role="user", content=text),)
    return RawPrompt(
        line=line,
        id=id or f"row-{line}",
        messages=messages,
        reference=None,
        user=user,
        use_case=None,
        kind="plain",
        group=None,
        text=text,
    )


def test_of_prompts_that_begin_alike_the_first_stays_and_the_others_name_it():
    config = all_for_ppo(prefix_chars=6)
    found = curate(
        [raw(1, "abcdefgh"), raw(2, "abcde"), raw(3, "abcdefXY"), raw(4, "abcde"), raw(5, "abcdef"), raw(6, "bcdefgh")],
        config,
    )
    assert [one.line for one in found.sets["prompts"]] == [1, 2, 6]
    assert [(one.line, one.reason, one.detail) for one in found.dropped] == [
        (3, PREFIX, "6 characters with 'row-1', line 1"),
        (4, EQUAL, "as 'row-2', line 2"),
        (5, PREFIX, "6 characters with 'row-1', line 1"),
    ]


def test_prompts_of_one_row_are_not_repeats_of_each_other_but_of_another_row_with_the_same_instruction():
    rows = [raw(1, "translate", id="a.1"), raw(1, "translate", id="a.2"), raw(2, "translate", id="b")]
    found = curate(rows, all_for_ppo())
    assert [one.id for one in found.sets["prompts"]] == ["a.1", "a.2"]
    assert [one.line for one in found.dropped] == [2]


@given(st.permutations(range(12)))
@settings(max_examples=20)
def test_how_many_stay_and_of_a_user_with_too_many_which_does_not_depend_on_the_order(order: list[int]):
    texts = [f"{'same beginning ' if n % 3 == 0 else n} {n}" for n in range(12)]
    config = all_for_ppo(prefix_chars=10, per_user=5)
    found = curate([raw(line, texts[n], "anna") for line, n in enumerate(order, start=1)], config)
    assert Counter(one.reason for one in found.dropped) == {PREFIX: 3, LIMIT: 4}
    alone = [n for n in range(12) if n % 3]
    kept = [
        curate([raw(line, texts[n], "anna") for line, n in enumerate(some, start=1)], config).sets["prompts"]
        for some in (alone, [n for n in order if n % 3])
    ]
    assert {one.text for one in kept[0]} == {one.text for one in kept[1]}


def test_a_repeat_does_not_count_towards_the_limit_of_its_user_and_rows_without_user_have_none():
    rows = [
        raw(1, "a", "u"),
        raw(2, "a", "u"),
        raw(3, "b", "u"),
        raw(4, "c", "u"),
        *(raw(n, str(n)) for n in (5, 6, 7)),
    ]
    found = curate(rows, all_for_ppo(per_user=2))
    assert Counter(one.reason for one in found.dropped) == {EQUAL: 1, LIMIT: 1}
    (limited,) = (one for one in found.dropped if one.reason == LIMIT)
    assert limited.detail == "one of 3 prompts of user 'u', of which 2 stay"
    assert {5, 6, 7} <= {one.line for one in found.sets["prompts"]}


@given(
    st.lists(
        st.tuples(st.text("ab", max_size=8), st.none() | st.sampled_from([f"u{n}" for n in range(30)])), min_size=1
    ),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_no_user_is_in_two_sets_none_has_too_many_and_nothing_is_lost(
    rows: list[tuple[str, str | None]], prefix: int, limit: int, seed: int
):
    config = PromptsConfig(prefix_chars=prefix, per_user=limit, seed=seed)
    of_each = {set_of(("user", f"x{n}"), config): f"x{n}" for n in range(200)}  # no set may be without a prompt
    assert of_each.keys() == config.shares.keys()
    rows = [*rows, *((f"{n} ", user) for n, user in enumerate(of_each.values()))]
    prompts = [raw(line, text, user) for line, (text, user) in enumerate(rows, start=1)]
    found = curate(prompts, config)
    kept = [one for some in found.sets.values() for one in some]
    assert Counter(one.id for one in kept) + Counter(one.prompt.id for one in found.dropped if one.prompt) == Counter(
        one.id for one in prompts
    )
    users = [{one.owner for one in some} for some in found.sets.values()]
    assert sum(map(len, users)) == len(set[tuple[str, str]]().union(*users))
    assert max(Counter(one.owner for one in kept).values()) <= limit
    assert len({one.text[:prefix] for one in kept}) == len(kept)


def test_the_shares_are_of_users_and_those_that_are_measured_on_stay_when_others_change():
    owners = [("user", f"u{n}") for n in range(4000)]
    config = PromptsConfig(demonstration_share=0.2, preference_share=0.3, valid_share=0.1, heldout_share=0.1)
    found = {owner: set_of(owner, config) for owner in owners}
    shares = Counter(found.values())
    wanted = {"prompts_heldout": 0.1, "prompts_valid": 0.1, "demonstrations": 0.2, "preference_prompts": 0.3}
    for name, share in (wanted | {"prompts": 0.3}).items():
        assert shares[name] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
    other = config.model_copy(update={"demonstration_share": 0.0, "preference_share": 0.6})
    for name in ("prompts_heldout", "prompts_valid"):
        assert {o for o in owners if set_of(o, other) == name} == {o for o in owners if found[o] == name}
    assert any(set_of(o, config.model_copy(update={"seed": 1})) != found[o] for o in owners)


def test_a_wanted_set_without_a_prompt_is_refused_with_what_can_be_done():
    with pytest.raises(ValueError, match=r"none of the 1 prompts of 1 users falls to .*prompts\.seed"):
        curate([raw(1, "a", "u")], PromptsConfig())
    with pytest.raises(ValueError, match="leave no user for PPO"):
        PromptsConfig(preference_share=0.75)
