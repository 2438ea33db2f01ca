"""Rankings in the files of other programs, and back: Argilla, Label Studio, Potato (see tools.py), and Parquet.

Names of labelers become ids (p1, p2, ..) both ways: nothing that is written or returned has a name in it.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reward_server.preferences.labeling import Comparison, comparison_row, read_comparisons
from reward_server.preferences.records import RecordError, json_lines, read_rows, write_whole
from reward_server.preferences.sheets import response_letters
from reward_server.preferences.tools import TOOLS, Answer, ReadItem, Tool

FORMATS: tuple[str, ...] = (*TOOLS, "parquet")
_SEED = 0  # of the letters that stand for completions
_UNKNOWN = "p0"  # who ranked, where nobody says
_ID = re.compile(r"p[0-9]+(\+p[0-9]+)*")
_SHOWN = 20  # problems of a file that are listed


def item_id(comparison: Comparison) -> str:
    """The id of what was ranked: that of the comparison without the labeler ("7:p1" is item 7, ranked by p1)."""
    return comparison.id.removesuffix(f":{comparison.labeler}") if comparison.labeler else comparison.id


def write(form: str, path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write a file of one of FORMATS; it appears whole or not at all.

    Several comparisons of one item are its rankings; what has none is for people to rank there. Parquet has a row for
    each comparison, with all that it says; the others have the texts, the ranks and who gave them. A labeler is an id:
    a name becomes the next one, in the order of the comparisons; programs ("simulated:vader") keep theirs. Raises
    ValueError for another format, two texts of one id, two rankings of an item by one labeler, and more than 26
    completions; NotWritten.
    """
    tool = _tool(form)
    known = [one.labeler for one in comparisons if one.labeler]
    ids = _ids(known, (), {name for name in known if ":" in name})
    named = [_signed(one, ids) for one in comparisons]
    items, answers = _items(named), dict[str, dict[str, Answer]]()
    for one in named:
        by = answers.setdefault(item_id(one), {})
        if one.ranks is not None:
            answer = _answer(one, items[item_id(one)].letters)
            if answer.user in by:
                raise ValueError(f"{answer.user} ranked comparison {item_id(one)!r} twice; leave one of the two")
            by[answer.user] = answer
    path.parent.mkdir(parents=True, exist_ok=True)
    if tool is None:
        return write_whole(path, _parquet(named))
    rows = [row for name, by in answers.items() for row in tool.rows(name, items[name].shown(tool), [*by.values()])]
    lines = json_lines(rows)
    write_whole(path, "[\n" + lines.strip("\n").replace("\n", ",\n") + "\n]\n" if tool.one_list else lines)


def read(form: str, path: Path, comparisons: Sequence[Comparison], taken: Collection[str] = ()) -> list[Comparison]:
    """Read the rankings of these comparisons, ranked or not, from a file of one of FORMATS.

    Potato's folder with a folder for each user is read as well. A labeler who is no id becomes the next one after those
    that are `taken` or in the comparisons, in the order of the file. Items that nobody ranked are left out. Raises
    RecordError that lists, with file:row and remedy: unknown items and completions, changed texts, items ranked in
    part, twice by a labeler, or not at all; and ValueError as `write` does.
    """
    tool, items = _tool(form), _items(comparisons)
    known = {*taken, *(one.labeler for one in comparisons if one.labeler)}
    found = _read_tool(tool, path, items) if tool else _read_parquet(path, items)
    if not found:
        raise RecordError(f"{path}: nobody ranked anything in it; export it again when people have")
    ids = _ids([one.labeler for one in found if one.labeler], known, {name for name in known if ":" in name})
    return [_signed(one, ids) for one in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One prompt with its completions."""

    comparison: Comparison
    """not ranked; its id is the item's"""
    letters: Mapping[str, int]
    """which completion each letter stands for"""

    def shown(self, tool: Tool) -> dict[str, Any]:
        """The texts as the tool has them."""
        return tool.shown(self.comparison, self.letters)

    def check(self, prompt: object, responses: object) -> None:
        """Raise ValueError unless these are its texts."""
        if (prompt, responses) != (self.comparison.prompt, self.comparison.responses):
            raise ValueError(f"comparison {self.comparison.id!r} has other texts than in another row; keep one of them")


def _tool(form: str) -> Tool | None:
    if form not in FORMATS:
        raise ValueError(f"{form!r} is no format; there are {', '.join(FORMATS)}")
    return TOOLS.get(form)


def _items(comparisons: Iterable[Comparison]) -> dict[str, _Item]:
    items: dict[str, _Item] = {}
    for one in comparisons:
        name = item_id(one)
        if name not in items:
            told = dict.fromkeys(("ranks", "labeler", "seconds", "qualities", "flags", "guidelines", "page"))
            bare = replace(one, id=name, **told)
            items[name] = _Item(comparison=bare, letters=response_letters(bare, _SEED))
        items[name].check(one.prompt, one.responses)
    return items


def _ids(labelers: Iterable[str], taken: Iterable[str], programs: Collection[str]) -> dict[str, str]:
    """Ids of those who have none: the numbers after the highest that is in use."""
    names = dict.fromkeys(labelers)
    used = [int(number) for one in (*taken, *names) if _ID.fullmatch(one) for number in re.findall("[0-9]+", one)]
    new = [name for name in names if not _ID.fullmatch(name) and name not in programs]
    return {name: f"p{number}" for number, name in enumerate(new, start=max(used, default=0) + 1)}


def _signed(comparison: Comparison, ids: Mapping[str, str]) -> Comparison:
    """The same with the labeler's id for the name, in its own id too."""
    labeler = ids.get(comparison.labeler or "")
    if labeler is None:
        return comparison
    name = item_id(comparison)
    return replace(comparison, id=name if comparison.id == name else f"{name}:{labeler}", labeler=labeler)


def _answer(comparison: Comparison, letters: Mapping[str, int]) -> Answer:
    ranks = comparison.ranks or ()
    tiers = [tuple(letter for letter, index in letters.items() if ranks[index] == rank) for rank in sorted(set(ranks))]
    return Answer(user=comparison.labeler or _UNKNOWN, tiers=tuple(tiers), seconds=comparison.seconds)


def _read_tool(tool: Tool, path: Path, items: Mapping[str, _Item]) -> list[Comparison]:
    files = sorted(path.glob("*/annotated_instances.jsonl")) if path.is_dir() else [path]
    if not files:
        raise RecordError(f"{path}: no folder in it has an annotated_instances.jsonl; name the file to read")
    found, wrong, seen = list[Comparison](), list[str](), dict[str, str]()
    for file in files:
        for number, row in read_rows(file):
            where = f"{file}:{number}"
            try:
                for one in _ranked(tool.read(row, file), tool, items):
                    if one.id in seen:
                        raise ValueError(f"the same labeler ranked item {item_id(one)!r} in {seen[one.id]}; leave one")
                    seen[one.id] = where
                    found.append(one)
            except ValueError as error:
                wrong.append(f"{where}: {error}")
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RecordError("\n".join(wrong[:_SHOWN]) + more)
    return found


def _ranked(row: ReadItem, tool: Tool, items: Mapping[str, _Item]) -> Iterator[Comparison]:
    """The rankings of a row. Raises ValueError."""
    item = _named(row.item, items)
    shown = item.shown(tool)
    if row.shown and (changed := [key for key, text in shown.items() if row.shown.get(key) != text]):
        raise ValueError(f"{changed[0]!r} of item {row.item!r} is missing or was changed; keep the texts as they were")
    for answer in row.answers:
        ranks = {letter: rank for rank, tier in enumerate(answer.tiers) for letter in tier}
        given = [letter for tier in answer.tiers for letter in tier]
        if odd := [letter for letter in given if letter not in item.letters or given.count(letter) > 1]:
            raise ValueError(
                f"{odd[0]!r:.60} is ranked in item {row.item!r}, whose completions are {', '.join(item.letters)}, "
                "each of them once; correct the ranking"
            )
        if len(given) < len(item.letters):
            raise ValueError(
                f"item {row.item!r} has {len(given)} of {len(item.letters)} completions ranked: rank all, or none"
            )
        places = sorted(item.letters, key=item.letters.__getitem__)
        yield replace(
            item.comparison,
            id=f"{row.item}:{answer.user}",
            ranks=tuple(ranks[letter] for letter in places),
            labeler=answer.user,
            seconds=answer.seconds,
        )


def _named(name: str, items: Mapping[str, _Item]) -> _Item:
    if name not in items:
        raise ValueError(f"item {name!r:.60} is none of the {len(items)} comparisons; remove the row, or give its file")
    return items[name]


def _read_parquet(path: Path, items: Mapping[str, _Item]) -> list[Comparison]:
    seen: set[tuple[str, str | None]] = set()

    def known(one: Comparison) -> Comparison:
        name = item_id(one)
        _named(name, items).check(one.prompt, one.responses)
        if (name, one.labeler) in seen:
            raise ValueError(f"the same labeler ranked item {name!r} in another row; leave one")
        seen.add((name, one.labeler))
        return one

    return [one for one in read_comparisons(path, use=known) if one.ranks is not None]


def _parquet(comparisons: Sequence[Comparison]) -> bytes:
    """A table with a row a comparison, its columns named as the keys of a comparison's JSON."""
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    columns = {
        "id": text,
        "prompt": pyarrow.list_(pyarrow.struct({"role": text, "content": text})),
        "completions": pyarrow.list_(pyarrow.struct({"text": text, "ended": pyarrow.bool_()})),
        "ranks": pyarrow.list_(number),
        "labeler": text,
        "group": text,
        "seconds": pyarrow.float64(),
        "control": pyarrow.bool_(),
        "qualities": pyarrow.list_(number),
        "flags": pyarrow.list_(pyarrow.list_(text)),
        "guidelines": text,
        "page": text,
        "use_case": text,
    }
    rows = [comparison_row(one) for one in comparisons]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(columns)), sink)
    return sink.getvalue().to_pybytes()
