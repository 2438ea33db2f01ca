"""The report of a run: an HTML page that needs nothing else, a picture for a README, a terminal summary.

Titles and leads of the page's sections are in its template, report.html.

Everything is read from the plain files of the run directory (see `cluster.rundir.files`). `summary.json` holds
the final figures; every part of it is optional:

    model     name of the base model
    labeler   the caption of the labeler, e.g. "simulated labeler (VADER)"
    rankings  who ranked the comparisons, where people did, e.g. "people (anna, ben)"
    seconds   all together
    sft       {"loss_first", "loss_last", "valid_before", "valid_after"}, nats a token
    reward    {"accuracy", "accuracy_ci": [low, high], "prompt_accuracy", "prompt_accuracy_ci", "longer_wins",
              "pairs", "score_std", "calibration": [bins]}
    ppo       by stage ("ppo", "ppo-noptx", ..): {"gold_before", "gold_after", "score_before", "score_after",
              "kl" (nats a response), "pretraining_loss_before", "pretraining_loss_after" (nats a token),
              "iterations"}
    rounds    by number ("1", ..): {"win_rate_sft", "win_rate_previous": {"rate", "ci", "wins", "losses", "ties"},
              "gold", "gold_ci", "gold_sft", "kl", "accuracy", "accuracy_ci", "rankings", "labelers_agree",
              "labelers_agree_ci"}

Means of gold and score are taken from the held-out samples in evaluations/ where these have them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cluster.report.plot import png, svg
from cluster.report.plots import arms, interval, labels, overview, plots, round_table
from cluster.rundir.files import Change, Run, Sample, number, read_run, visible
from cluster.tracking.console import Console

_FIRST, _EXTREMES, _TERMINAL = 8, 2, 3  # samples: first by id, of each extreme, in the terminal
_LONGEST = 700  # characters of a sample that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One of the figures at the top."""

    arm: str
    """the PPO run it belongs to; empty for the others"""
    name: str
    """what it is"""
    value: str
    """the figure, with its unit"""
    detail: str
    """what to compare it with"""
    verdict: bool
    """it rests on the labeler's verdicts, which has to be said beside it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One held-out prompt with the responses of every model."""

    why: str
    """how it was chosen, said at the first of a group; empty at the others"""
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each message"""
    responses: tuple[tuple[str, Sample | None], ...]
    """(model, its sample)"""


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and RUN/report.png and return the first. Raises ValueError when it is no run."""
    run = read_run(run_dir)
    if shown := overview(run):
        caption = f"{_subject(run)}. Verdicts: {run.labeler}." if run.arms else _subject(run)
        (run_dir / "report.png").write_bytes(png(shown, caption))
    results = list(_results(run))
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template.filters |= {"visible": lambda value: visible(str(value)), "svg": svg}
    template.filters["tone"] = lambda gold: _tone(run, gold)
    page = template.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).render(
        run=run,
        title=_subject(run),
        date=str(run.environment.get("date", ""))[:10],
        duration=_duration(_seconds(run)),
        results=results,
        arms=list(dict.fromkeys(result.arm for result in results if result.arm)),
        mixed=len({name.split()[0] for _, name, _ in arms(run)}) > 1,
        plots=plots(run),
        exchanges=exchanges(run),
        longest=_LONGEST,
        facts=list(_facts(run)),
        folders=list(_folders(run)),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def show_report(run_dir: Path, console: Console, json: bool = False) -> None:
    """Write the report of a run directory, and its summary into the terminal."""
    path = write_report(run_dir)
    if json:
        console.line(dumps({"report": str(path), "summary": read_run(run_dir).summary}, indent=2))
        return
    console.show(summary(run_dir))
    console.line(f"The report is in {path}")


def summary(run_dir: Path) -> RenderableType:
    """The same in short for a terminal. Raises ValueError when it is no run."""
    run = read_run(run_dir)
    results = list(_results(run))
    named = len({result.arm for result in results if result.arm}) > 1
    table = Table.grid(padding=(0, 3))
    for result in results:
        name = f"{result.name}, {result.arm}" if named and result.arm else result.name
        note = f"{result.detail} · {run.labeler}" if result.verdict else result.detail
        table.add_row(Text(name), Text(result.value, style="bold"), Text(note, style="dim"))
    parts: list[RenderableType] = [Rule(Text(_subject(run), style="bold"), align="left"), Padding(table, (1, 2))]
    if chosen := exchanges(run)[:_TERMINAL]:
        parts.append(Text(f"  The first prompts by id; the number is gold, by the {run.labeler}", style="dim"))
    for exchange in chosen:
        table = Table.grid(padding=(0, 2))
        table.add_row("", "", Text(exchange.prompt[-1][1] if exchange.prompt else "", style="italic"))
        for name, sample in exchange.responses:
            gold = "" if sample is None or sample.gold is None else f"{sample.gold:+.2f}"
            table.add_row(Text(name, style="dim"), Text(gold), Text(sample.response if sample else "not sampled"))
        parts.append(Padding(table, (1, 2, 0, 2)))
    return Group(*parts)


def exchanges(run: Run) -> list[Exchange]:
    """Prompts to show: the first by id, which nobody chose, then those of the highest and the lowest gold."""
    models = [(name, {sample.id: sample for sample in run.evaluations[label]}) for label, name, _ in labels(run)]
    if not models:
        return []
    trained = next((arm for arm in run.arms if arm in run.evaluations), None)
    last = {sample.id: sample for sample in run.evaluations[trained]} if trained else models[-1][1]
    ids = list(last)
    judged = sorted((key for key in ids[_FIRST:] if last[key].gold is not None), key=lambda key: -(last[key].gold or 0))
    high, low = judged[:_EXTREMES], judged[_EXTREMES:][-_EXTREMES:]
    chosen = {
        f"The first {len(ids[:_FIRST])} prompts by id": ids[:_FIRST],
        f"Highest gold after training among the other {len(ids[_FIRST:])}": high,
        "Lowest gold after training among them": low,
    }
    return [
        Exchange(
            why="" if index else why,
            prompt=last[key].prompt,
            responses=tuple((name, samples.get(key)) for name, samples in models),
        )
        for why, keys in chosen.items()
        for index, key in enumerate(keys)
    ]


def _subject(run: Run) -> str:
    model = run.summary.get("model")
    steps = [name for name, done in (
        ("pretraining", "pretraining" in run.metrics),
        ("SFT", "sft" in run.metrics or run.figures("sft")),
        ("reward model", "reward" in run.metrics or run.figures("reward") or run.calibration),
    ) if done]  # fmt: skip
    steps += dict.fromkeys(name for _, name, _ in arms(run))
    told = " and ".join(filter(None, (", ".join(steps[:-1]), *steps[-1:]))) or "a run"
    return visible(f"{model}: {told}" if model else f"{told[0].upper()}{told[1:]}")


def _results(run: Run) -> Iterator[Result]:
    for arm, name, _ in arms(run):
        make = partial(Result, arm=name)
        if gold := run.change(arm, "gold"):
            yield make(name="Gold", value=_moved(gold), detail=_gain(gold), verdict=True)
        if score := run.change(arm, "score"):
            yield make(name="Score of the reward model", value=_moved(score), detail=_gain(score), verdict=False)
        if (kl := number(run.figures("ppo", arm).get("kl"))) is not None:
            yield make(name="KL to the SFT model", value=f"{kl:.1f} nats", detail="a response", verdict=False)
        if tax := run.change(arm, "pretraining_loss"):
            detail = f"{_moved(tax)} nats a token of pretraining text"
            yield make(name="Alignment tax", value=f"{tax.difference:+.3f}", detail=detail, verdict=False)
    make = partial(Result, arm="")
    for index, row in round_table(run).items():
        yield from _round_results(run, index, row)
    reward = run.figures("reward") | run.calibration
    if (accuracy := number(reward.get("accuracy"))) is not None:
        detail = f"held-out pairs{_ci(reward.get('accuracy_ci'))}"
        if (alike := number(reward.get("prompt_accuracy"))) is not None:
            detail += f"; mean of prompts: {alike:.3f}"
        if (longer := number(reward.get("longer_wins"))) is not None:
            detail += f"; longer wins: {longer:.3f}"
        detail += f" · {run.rankings}"
        yield make(name="Reward-model accuracy", value=f"{accuracy:.3f}", detail=detail, verdict=False)
    for stage, name, what in (("pretraining", "Pretraining loss", "text"), ("sft", "SFT loss", "demonstrations")):
        table = run.figures(stage)
        before, after = number(table.get("valid_before")), number(table.get("valid_after"))
        if before is not None and after is not None:
            value = _moved(Change(before=before, after=after))
            yield make(name=name, value=value, detail=f"nats a token of held-out {what}", verdict=False)
    if seconds := _seconds(run):
        yield make(name="Time", value=_duration(seconds), detail="all phases", verdict=False)


def _round_results(run: Run, index: int, row: Mapping[str, Any]) -> Iterator[Result]:
    for key, name in (("win_rate_sft", "the SFT model"), ("win_rate_previous", f"round {index - 1}")):
        found = row.get(key)
        if isinstance(found, dict) and (rate := number(found.get("rate"))) is not None:
            detail = f"against {name}{_ci(found.get('ci'))}"
            yield Result(arm="", name=f"Win rate of round {index}", value=f"{rate:.2f}", detail=detail, verdict=True)


def _moved(change: Change) -> str:
    return f"{change.before:.2f} → {change.after:.2f}"


def _gain(change: Change) -> str:
    prompts = f", {change.count} held-out prompts" if change.interval else ""
    return f"{change.difference:+.2f}{_ci(list(change.interval or ()), '+')}{prompts}"


def _ci(value: object, sign: str = "") -> str:
    bounds = interval(value)
    return f", 95% CI {bounds[0]:{sign}.2f} to {bounds[1]:{sign}.2f}" if bounds else ""


def _seconds(run: Run) -> float:
    return number(run.summary.get("seconds")) or sum(phase.seconds for phase in run.phases)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _tone(run: Run, gold: float) -> str:
    """The class of a gold score's colour, bad-2 to good-2, on the scale of the largest one in the run."""
    samples = (sample for found in run.evaluations.values() for sample in found)
    largest = max(abs(sample.gold) for sample in samples if sample.gold is not None)
    level = round(2 * gold / max(largest, 1e-9))
    return f"good-{level}" if level > 0 else f"bad-{-level}" if level < 0 else "even"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """(name, text) of what environment.json tells, tables in it one level deep."""
    for name, value in run.environment.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                yield visible(f"{key}"), visible(_plain(inner))
        else:
            yield visible(str(name)), visible(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)


def _folders(run: Run) -> Iterator[tuple[str, str]]:
    """(name, what it is) of each model in the run directory."""
    known = {"base": "where SFT started", "sft": "after SFT", "baseline": "the SFT baseline"}
    known |= {"reward": "the reward model"}
    for arm, name, _ in arms(run):
        folder = arm.replace("ppo", "policy")
        known |= {folder: f"after {name}", f"{folder}_ema": f"after {name}, weights averaged over its steps"}
    yield from ((name, what) for name, what in known.items() if (run.path / name / "config.json").is_file())
