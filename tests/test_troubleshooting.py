"""docs/troubleshooting.md quotes what the code says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = "\n".join(re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines()


@cache
def texts() -> tuple[str, ...]:
    """Every text in the code; a NUL stands for what is put into it."""
    found = []
    for package in ("reward_server", "actors", "learner", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


@pytest.mark.parametrize("quote", [quote for quote in QUOTES if quote])
def test_an_error_of_the_page_is_one_that_the_code_raises(quote: str) -> None:
    pattern = re.compile(r"[\s\S]*".join(re.escape(part) for part in quote.split("…")))
    assert any(pattern.search(text) for text in texts()), quote


def test_a_quote_that_the_code_does_not_hold_is_noticed() -> None:
    pattern = re.compile("there is no such key, friend")
    assert not any(pattern.search(text) for text in texts())
    assert len(QUOTES) > 30
