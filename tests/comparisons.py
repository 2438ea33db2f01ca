"""Ranked comparisons for tests of hypothesis."""

from hypothesis import strategies as st

from reward_server.preferences.labeling import Comparison
from reward_server.preferences.sheets import dense
from reward_server.schema import Message

# A data file refuses NUL and halves of surrogate pairs.
TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
TURNS = (("user",), ("system", "user"), ("user", "assistant", "user"))
SAID = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def ranked_comparisons(draw: st.DrawFn, items: int = 3) -> list[Comparison]:
    """Items that one to three labelers ranked each, with or without all that a labeling page tells."""
    found: list[Comparison] = []
    for number in range(draw(st.integers(1, items))):
        responses = tuple(draw(st.lists(TEXT, min_size=2, max_size=5)))
        count, use_case = len(responses), draw(st.none() | SAID)
        turns = [{"role": role, "content": draw(SAID)} for role in draw(st.sampled_from(TURNS))]
        prompt = tuple(map(Message.model_validate, turns))
        ended, control = tuple(draw(st.booleans()) for _ in responses), draw(st.none() | st.booleans())
        for labeler in draw(st.lists(st.sampled_from(["p1", "p2", "p3"]), min_size=1, unique=True)):
            found.append(
                Comparison(
                    id=f"item-{number}:{labeler}",
                    prompt=prompt,
                    responses=responses,
                    ended=ended,
                    ranks=dense(draw(st.tuples(*[st.integers(0, 8)] * count))),
                    labeler=labeler,
                    group=f"item-{number}",
                    seconds=draw(st.none() | st.floats(0, 1e6)),
                    control=control,
                    qualities=draw(st.none() | st.tuples(*[st.none() | st.integers(1, 7)] * count)),
                    flags=draw(st.none() | st.tuples(*[st.lists(SAID, max_size=2).map(tuple)] * count)),
                    guidelines=draw(st.none() | SAID),
                    page=draw(st.none() | SAID),
                    use_case=use_case,
                )
            )
    return found
