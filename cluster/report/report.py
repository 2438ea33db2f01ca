"""The report of a run: an HTML page that needs nothing else, a picture for a README, a terminal summary.

Everything is read from the plain files of the run directory (see `cluster.rundir.files`). What summary.json holds, and
titles and leads of the page's sections, are in the template, report.html. Means of gold and score are taken from the
held-out samples in evaluations/ where these have them.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cluster.report.card.card import card, judged, write_cards
from cluster.report.plot import png, svg
from cluster.report.plots import accuracy, arms, interval, labels, overview, plots, round_table, time_spent, use_cases
from cluster.rundir.files import Change, Run, Sample, number, read_run
from cluster.tracking.console import Console, duration
from reward_server.redaction import visible

_FIRST, _EXTREMES, _TERMINAL = 8, 2, 3  # samples: first by id, of each extreme, in the terminal
LONGEST = 700
"""Characters of a sample that are shown."""


class Result(NamedTuple):
    """One of the figures at the top, with what to compare it with, and the PPO run it belongs to, if it does."""

    name: str
    value: str
    detail: str
    arm: str = ""


class Exchange(NamedTuple):
    """One held-out prompt with the responses of every model."""

    why: str
    """how it was chosen, said at the first of a group; empty at the others"""
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each message"""
    responses: tuple[tuple[str, Sample | None], ...]
    """(model, its sample)"""

    @property
    def shaded(self) -> bool:
        """Whether the KL of a response's tokens is shown."""
        return any(sample and sample.tokens for _, sample in self.responses)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html, RUN/report.png and the cards, and return the first.

    Raises ValueError when it is no run.
    """
    run = read_run(run_dir)
    if shown := overview(run):
        caption = f"{subject(run)}. Verdicts: {run.labeler}." if run.arms else subject(run)
        (run_dir / "report.png").write_bytes(png(shown, caption))
    found = list(results(run))
    figures = [(f"{one.name}, {one.arm}" if one.arm else one.name, one.value, one.detail) for one in found]
    write_cards(run, subject(run), parts := card(run, figures))
    page = render(
        "report.html",
        run=run,
        title=subject(run),
        date=str(run.environment.get("date", ""))[:10],
        duration=duration(_seconds(run)),
        results=found,
        arms=list(dict.fromkeys(result.arm for result in found if result.arm)),
        mixed=len({name.split()[0] for _, name, _ in arms(run)}) > 1,
        plots=plots(run),
        accuracy=list(accuracy(run)),
        time_spent=list(time_spent(run)),
        use_cases=list(use_cases(run)),
        exchanges=exchanges(run),
        parts=parts,
        judged=judged(run),
        environment=dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else "",
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(name: str, **values: Any) -> str:
    """A page of a template in this folder, with every text escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"visible": lambda value: visible(str(value)), "svg": svg, "within": _within}
    return pages.get_template(name).render(values, longest=LONGEST)


def _within(tokens: Sequence[tuple[str, float]], characters: int) -> list[tuple[str, float]]:
    """The tokens in the first so many characters of a text."""
    ends = accumulate(len(text) for text, _ in tokens)
    return [token for token, end in zip(tokens, ends, strict=True) if end <= characters]


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
    found = list(results(run))
    named = len({result.arm for result in found if result.arm}) > 1
    table = Table.grid(padding=(0, 3))
    for name, value, detail, arm in found:
        table.add_row(Text(f"{name}, {arm}" if named and arm else name), Text(value, "bold"), Text(detail, "dim"))
    parts: list[RenderableType] = [Rule(Text(subject(run), style="bold"), align="left"), Padding(table, (1, 2))]
    if chosen := exchanges(run)[:_TERMINAL]:
        parts.append(Text(f"  The first prompts by id; the number is gold, by the {run.labeler}", style="dim"))
    for _, prompt, responses in chosen:
        table = Table.grid(padding=(0, 2))
        table.add_row("", "", Text(prompt[-1][1] if prompt else "", style="italic"))
        for name, sample in responses:
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
    first, others = list(last)[:_FIRST], list(last)[_FIRST:]
    judged = sorted((key for key in others if last[key].gold is not None), key=lambda key: -(last[key].gold or 0))
    chosen = {
        f"The first {len(first)} prompts by id": first,
        f"Highest gold after training among the other {len(others)}": judged[:_EXTREMES],
        "Lowest gold after training among them": judged[_EXTREMES:][-_EXTREMES:],
    }
    return [
        Exchange("" if index else why, last[key].prompt, tuple((name, samples.get(key)) for name, samples in models))
        for why, keys in chosen.items()
        for index, key in enumerate(keys)
    ]


def subject(run: Run) -> str:
    """The model and the steps of a run, in words."""
    model, steps = run.summary.get("model"), ["pretraining"] if "pretraining" in run.metrics else []
    if "sft" in run.metrics or run.figures("sft"):
        steps.append("SFT")
    if "reward" in run.metrics or run.figures("reward") or run.calibration:
        steps.append("reward model")
    steps += dict.fromkeys(name for _, name, _ in arms(run))
    told = " and ".join(filter(None, (", ".join(steps[:-1]), *steps[-1:]))) or "a run"
    return visible(f"{model}: {told}" if model else f"{told[0].upper()}{told[1:]}")


def results(run: Run) -> Iterator[Result]:
    """The figures of a run, each with its interval, who judged and how many prompts or pairs are behind it."""
    for arm, name, _ in arms(run):
        if gold := run.change(arm, "gold"):
            yield Result("Gold", _moved(gold), f"{_gain(gold)} · {run.labeler}", name)
        if score := run.change(arm, "score"):
            yield Result("Score of the reward model", _moved(score), _gain(score), name)
        if (kl := number(run.figures("ppo", arm).get("kl"))) is not None:
            yield Result("KL to the SFT model", f"{kl:.1f} nats", "a response", name)
        if tax := run.change(arm, "pretraining_loss"):
            detail = f"{_moved(tax)} nats a token of pretraining text"
            yield Result("Alignment tax", f"{tax.difference:+.3f}", detail, name)
        best = run.figures("ppo", arm, "best")
        after, gold, kl = (number(best.get(key)) for key in ("iteration", "gold", "kl"))
        if after is not None and gold is not None and kl is not None:
            detail = f"most gold: {gold:.2f}{_ci(best.get('gold_ci'))}, {kl:.1f} nats of KL"
            yield Result("Policy to keep", f"iteration {after:.0f}", detail, name)
    for index, row in round_table(run).items():
        for key, name in (("win_rate_sft", "the SFT model"), ("win_rate_previous", f"round {index - 1}")):
            found = row.get(key)
            if isinstance(found, dict) and (rate := number(found.get("rate"))) is not None:
                counts = [number(found.get(one)) for one in ("wins", "losses", "ties")]
                prompts = f", {sum(filter(None, counts)):.0f} held-out prompts" if any(counts) else ""
                detail = f"against {name}{_ci(found.get('ci'))}{prompts} · {run.labeler}"
                yield Result(f"Win rate of round {index}", f"{rate:.2f}", detail)
    reward = run.figures("reward") | run.calibration
    if (accuracy := number(reward.get("accuracy"))) is not None:
        pairs = number(reward.get("pairs"))
        detail = f"{f'{pairs:,.0f} ' if pairs else ''}held-out pairs{_ci(reward.get('accuracy_ci'))}"
        for key, name in (("prompt_accuracy", "mean of prompts"), ("longer_wins", "longer wins")):
            if (share := number(reward.get(key))) is not None:
                detail += f"; {name}: {share:.3f}"
        yield Result("Reward-model accuracy", f"{accuracy:.3f}", f"{detail} · {run.rankings}")
    for stage, name, what in (("pretraining", "Pretraining loss", "text"), ("sft", "SFT loss", "demonstrations")):
        before, after = (number(run.figures(stage).get(f"valid_{when}")) for when in ("before", "after"))
        if before is not None and after is not None:
            yield Result(name, _moved(Change(before=before, after=after)), f"nats a token of held-out {what}")
    if seconds := _seconds(run):
        yield Result("Time", duration(seconds), "all phases")


def _moved(change: Change) -> str:
    return f"{change.before:.2f} → {change.after:.2f}"


def _gain(change: Change) -> str:
    prompts = f", {change.count} held-out prompts" if change.interval else ""
    return f"{change.difference:+.2f}{_ci(list(change.interval or ()), '+')}{prompts}"


def _ci(value: object, sign: str = "") -> str:
    bounds = interval(value)
    return f", 95% CI {bounds[0]:{sign}.2f} to {bounds[1]:{sign}.2f}" if bounds else ""


def _seconds(run: Run) -> float:
    return number(run.summary.get("seconds")) or sum(seconds for *_, seconds in run.phases)
