import sys
from pathlib import Path

import pytest

from reward_server.functions import UserFunctionError, call_function, load_function


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("VALUE = 3\ndef length(texts):\n    return [len(t) for t in texts]\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("module")
def test_a_function_is_found_by_module_and_name() -> None:
    function = load_function("rewards_of_mine:length")
    assert call_function("rewards_of_mine:length", function, 2, ["a", "bcd"]) == [1.0, 3.0]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rewards_of_mine", "write it as module:function"),
        (":length", "write it as module:function"),
        ("no_such_module:f", "cannot import the module of 'no_such_module:f'"),
        ("rewards_of_mine:width", "has no function 'width'"),
        ("rewards_of_mine:VALUE", "has no function 'VALUE'"),
    ],
)
def test_a_function_that_is_not_there_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_function(name)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([1.0], "returned 1 numbers for 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 numbers for 2 responses"),
        ([1.0, float("nan")], "returned nan for response 1"),
        ([float("inf"), 1.0], "returned inf for response 0"),
        ([1.0, None], "returned None for response 1, not a number"),
        (None, "failed on 2 responses: TypeError"),
    ],
)
def test_what_is_not_one_finite_number_a_response_is_an_error_that_names_the_function(
    result: object, reason: str
) -> None:
    with pytest.raises(UserFunctionError, match=f"^my:f {reason}"):
        call_function("my:f", lambda: result, 2)  # pyright: ignore[reportArgumentType]


def test_a_failing_function_is_named_with_its_error() -> None:
    def broken(texts: list[str]) -> list[float]:
        raise KeyError(texts[0])

    with pytest.raises(UserFunctionError, match=r"^my:f failed on 1 responses: KeyError: 'x'"):
        call_function("my:f", broken, 1, ["x"])


def test_a_function_that_ends_its_process_is_a_function_that_fails() -> None:
    """Else it would end the thread that all requests are computed in, and they would wait for ever."""
    with pytest.raises(UserFunctionError, match=r"^my:f failed on 1 responses: SystemExit: 3"):
        call_function("my:f", sys.exit, 1, 3)
