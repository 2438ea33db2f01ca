"""Functions of the user's own, named "module:function", and the numbers that they return."""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, cast


class UserFunctionError(RuntimeError):
    """A user's function failed, or returned something else than one finite number per response."""


def load_function(name: str) -> Callable[..., Iterable[Any]]:
    """Import the function that "module:function" names; raises ValueError with the reason when it cannot."""
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"{name!r} does not name a function; write it as module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import the module of {name!r}: {error}; is its folder on PYTHONPATH, and shipped with the run?"
        ) from error
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(
            f"cannot import the module of {name!r}: {type(error).__name__}: {error}; correct the module"
        ) from error
    function = getattr(module, function_name, None)
    if callable(function):
        return cast(Callable[..., Iterable[Any]], function)
    raise ValueError(f"module {module_name!r} has no function {function_name!r}, as {name!r} asks for")


def call_function(name: str, function: Callable[..., Iterable[Any]], count: int, *arguments: Any) -> list[float]:
    """Call a user's function, and check that it returns `count` finite numbers.

    Raises UserFunctionError, which names the function, when it fails or returns anything else.
    """
    try:
        results = list(function(*arguments))
    except (Exception, SystemExit) as error:  # a function that ends its process must not end the server's thread
        raise UserFunctionError(f"{name} failed on {count} responses: {type(error).__name__}: {error}") from error
    if len(results) != count:
        raise UserFunctionError(f"{name} returned {len(results)} numbers for {count} responses")
    return [_number(name, position, result) for position, result in enumerate(results)]


def _number(name: str, position: int, result: Any) -> float:
    try:
        number = float(result)
    except (TypeError, ValueError) as error:
        raise UserFunctionError(f"{name} returned {result!r} for response {position}, not a number") from error
    if not math.isfinite(number):
        raise UserFunctionError(f"{name} returned {number} for response {position}, not a finite number")
    return number
