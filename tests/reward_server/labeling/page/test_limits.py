from hypothesis import given
from hypothesis import strategies as st

from reward_server.labeling.page.limits import Rate


def test_there_is_room_again_when_the_first_of_a_minute_is_over():
    now = [100.0]
    rate = Rate(2, lambda: now[0])
    rate.count("a")
    now[0] += 10
    assert rate.wait_s("a") == 0
    rate.count("a")
    assert rate.wait_s("a") == 50
    assert rate.wait_s("b") == 0
    now[0] += 50
    assert rate.wait_s("a") == 0


def test_a_million_addresses_take_no_more_room_than_ten_thousand():
    rate = Rate(1, lambda: 0.0)
    for number in range(30_000):
        rate.count(str(number))
    assert rate.wait_s("0") == 0
    assert rate.wait_s("29999") == 60
    assert len(rate._times) == 10_000


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 5))
def test_no_minute_has_more_than_allowed_where_the_wait_is_kept(pauses: list[float], most: int):
    now, taken = [0.0], list[float]()
    rate = Rate(most, lambda: now[0])
    for pause in pauses:
        now[0] += pause
        if rate.wait_s("a") == 0:
            rate.count("a")
            taken.append(now[0])
    assert all(later - first >= 60 for first, later in zip(taken, taken[most:], strict=False))
