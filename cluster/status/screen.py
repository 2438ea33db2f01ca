"""How the status of a run looks in a terminal: a headline, its processes, who waits for whom, its curves and alerts."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from cluster.tracking.console import duration

_SPARKS = "▁▂▃▄▅▆▇█"
_CURVES = (
    *("score/mean", "gold/mean", "kl/mean", "response/length"),
    *("policy/entropy", "parity/mean_gap", "staleness/mean", "time/iteration"),
)
_STYLES = {"running": "green", "done": "green", "working": "green", "paused": "yellow", "starting": "yellow"}
_STYLES |= {"idle": "dim"}
"""Of states of runs and processes; any other is a fault."""
_LONG_S = 60.0  # a wait that asks for attention
_ROOMY = 100  # columns from which a table has wide gaps
_SHOWN = 3  # waits, alerts and deaths on a screen


def render(status: Mapping[str, Any], run: str, width: int) -> RenderableType:
    """The status as it is printed once, on so many columns."""
    parts: list[RenderableType] = [_headline(status, run), *_progress(status)]
    if status["processes"]:
        parts += [Text(), _processes(status["processes"], width), *_deaths(status["processes"])]
    if status["waits"]:
        parts += [Text(), *_waits(status["waits"], cut=False)]
    return Group(*parts)


def screen(status: Mapping[str, Any], run: str, width: int) -> RenderableType:
    """The same for a live screen, with the curves of the stage at work and the last alerts.

    The processes are the last, those that are not well before the others: a screen that is too low cuts them.
    """
    found = sorted(status["processes"], key=lambda one: one["state"] in _STYLES)
    blocks = [
        [_headline(status, run), *_bar(status, width), *_progress(status)],
        _waits(status["waits"][:_SHOWN], cut=True),
        _alerts(status),
        [table] if (table := _curves(status, width)).row_count else [],
        [*_deaths(found)[:_SHOWN], _processes(found, width)] if found else [],
    ]
    return Group(*(line for block in blocks if block for line in (*block, Text())))


def _headline(status: Mapping[str, Any], run: str) -> Text:
    """What is run, where, and how that stands."""
    state: str = status["state"]
    paused, age = status.get("paused") or {}, status["time"] - status.get("started", status["time"])
    what = {
        "running": f"running on {status['host']} (pid {status['pid']}) for {duration(age)}",
        "killed": "killed: its process is gone. Remedy: the same command with --resume",
        "silent": f"silent for {duration(status['silent_s'])}: its machine is gone, or it is stopped",
        "paused": f"paused for {duration(paused.get('seconds', 0.0))}: {paused.get('reason', '')}",
    }.get(state, state)
    return Text.assemble((f"rayward {status['command']}", "bold"), f"  {run}: ", (what, _style(state)))


def _progress(status: Mapping[str, Any]) -> list[Text]:
    """How far the stage at work is, and what is done at the moment."""
    phases, progress = status.get("phases") or [], status["progress"]
    under_way = [phases[-1]["phase"]] if phases and status["state"] == "running" else []
    if progress is None:
        return [Text(words) for words in under_way]
    under_way = [words for words in under_way if not re.fullmatch(r".*: \d+ iterations", words)]
    step, total = progress["step"], progress["total"]
    words = f"{progress['stage']}: {'iteration' if progress['stage'].startswith('ppo') else 'step'} {step}"
    words += f" of {total}" if total else ""
    if progress["step_s"] is not None:
        words += f", {duration(progress['step_s'])} each"
    if progress["left_s"]:
        words += f", about {duration(progress['left_s'])} left"
    return [_line("; now ".join([words, *under_way]))]


def _bar(status: Mapping[str, Any], width: int) -> list[RenderableType]:
    progress = status["progress"]
    if progress is None or not progress["total"]:
        return []
    grid = Table.grid()
    grid.add_row(ProgressBar(total=progress["total"], completed=progress["step"], width=width))
    return [grid]


def _style(state: str) -> str:
    return _STYLES.get(state.split()[0], "bold red")


def _processes(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """A row a process; what is too long for `width` columns is cut from its load."""
    stats = [one["vitals"] for one in rows if one["vitals"]]
    left_out = set() if any(one.get("gpu") is not None for one in stats) else {"GPU"}
    left_out |= set() if len({one["node"] for one in stats}) > 1 else {"on"}
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2 if width >= _ROOMY else 1, 0, 0))
    cells = [_cells(one) for one in rows]
    names = [name for name in cells[0] if name not in left_out]
    for name in names:
        justify = "right" if name in ("version", "memory", "cores", "GPU") else "left"
        table.add_column(name, justify=justify, no_wrap=name != "load")
    for row in cells:
        table.add_row(*(row[name] for name in names))
    return table


def _deaths(found: Sequence[Mapping[str, Any]]) -> list[Text]:
    return [Text(f"{one['name']} is dead: {one['died']}", "red") for one in found if one["died"]]


def _cells(one: Mapping[str, Any]) -> dict[str, str | Text]:
    """What each column says of a process."""
    stats, state = one["vitals"] or {}, one["state"]
    version, gpu = stats.get("facts", {}).get("version"), stats.get("gpu")
    silent = f" {_short(one['silent_s'])}" if state == "silent" else ""
    return {
        "process": one["name"],
        "state": Text(state + silent, _style(state)),
        "version": "" if version is None else f"{version:.0f}",
        "load": _line(load(one)),
        "memory": _bytes(stats["resident"]) if stats else "",
        "cores": "" if one["cores"] is None else f"{one['cores']:.1f}",
        "GPU": "" if gpu is None else _bytes(gpu),
        "on": stats.get("node", ""),
        "open call": f"{one['waiting'][0][0]} {_short(one['waiting'][0][1])}" if one["waiting"] else "",
    }


def load(one: Mapping[str, Any]) -> str:
    """What a process has to do, in words."""
    vitals = one["vitals"] or {}
    facts, rates = vitals.get("facts", {}), one["rates"]
    if "most" in facts:
        under_way = int(facts["running"] + facts["waiting"])
        if facts["paused"]:
            return f"{under_way} stand still"
        queue = f" + {facts['waiting']:.0f} waiting" if facts["waiting"] else ""
        return f"{facts['running']:.0f} of {facts['most']:.0f}{queue}, {rates.get('tokens', 0.0):.0f} tok/s"
    if "scored" in facts:
        return f"{facts['waiting']:.0f} posts, {rates.get('scored', 0.0):.0f} scores/s"
    if "out" in facts:
        return f"{facts['out']:.0f} samples out, {facts['ready']:.0f} ready"
    return f"{vitals['doing']} {_short(vitals['doing_s'])}" if vitals.get("doing") else ""


def _line(text: str, style: str = "", cut: bool = True) -> Text:
    return Text(text, style, overflow="ellipsis" if cut else "fold", no_wrap=cut)


def _waits(found: Sequence[Mapping[str, Any]], cut: bool) -> list[Text]:
    told = [(f"{wait['who']} waits for {wait['for']} ({_short(wait['seconds'])})", wait["seconds"]) for wait in found]
    return [_line(text, "yellow" if seconds >= _LONG_S else "", cut) for text, seconds in told]


def _alerts(status: Mapping[str, Any]) -> list[Text]:
    told = [(max(0.0, status["time"] - one["time"]), one["text"]) for one in status["alerts"][-_SHOWN:]]
    return [_line(f"{duration(ago)} before: {text}", "yellow") for ago, text in told]


def _stage(status: Mapping[str, Any]) -> str:
    stage = (status["progress"] or {}).get("stage", "")
    return stage if stage in status["curves"] else next(reversed(status["curves"]), "")


def _curves(status: Mapping[str, Any], width: int) -> Table:
    """The course of the stage at work, a line a metric."""
    table = Table("metric", Column(justify="right"), Column(no_wrap=True), box=None, pad_edge=False, show_header=False)
    table.padding = (0, 2, 0, 0)
    metrics = status["curves"].get(_stage(status), {})
    names = [*(n for n in _CURVES if n in metrics), *(n for n in metrics if n.endswith("/loss"))]
    room = width - max((len(name) for name in names), default=0) - 12
    for name in names:
        values = list(metrics[name].values())
        table.add_row(name, f"{values[-1]:.4g}", Text(sparkline(values, max(10, room)), "cyan"))
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters between its smallest and largest value; of more values, means of parts."""
    count = min(len(values), width)
    cuts = [len(values) * part // count for part in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in means)


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
