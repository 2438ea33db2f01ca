"""The card of a run: models, data, labelers, settings, figures and limits, from the plain files of its directory.

It is RUN/card.md, a section of the report, and the README.md of each exported policy, which is the model card of the
Hugging Face hub (Mitchell et al. 2019, "Model Cards for Model Reporting"). Nothing is said that the files do not hold.
"""

import json
import math
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from actors.evaluation.tasks import TASKS
from cluster.report.card.licences import UNKNOWN, licence_of, metadata_of
from cluster.report.charts import rounded
from cluster.report.plots import interval, labels, round_table, suite, win_rates
from cluster.rundir.files import Run, Sample, number, read_rows
from cluster.rundir.lineage import CARD, Artefact, Input, latest, read_lineage
from cluster.rundir.record import flat
from reward_server.preferences.records import write_whole
from reward_server.pretrained import is_hub_id
from reward_server.redaction import visible

MARKER = "<!-- Made by rayward report, which replaces it. Without this line it is left alone. -->"
PAPER: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("paper.toml").read_text("utf-8"))
"""What the paper gives, as nested tables; a list stands for any of its values."""
_DATA = ("data", "demonstrations", "completions", "comparisons", "sheet")  # kinds of artefacts that are files with rows
_ROWS = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|gz|bz2|xz|zst)$")
_FEW = 100  # prompts or items below which it is said how few they are
_MARKS = re.compile(r"([\\`*\[\]<>|&#~])")


class Part(NamedTuple):
    """A part of the card: words, and a table with a head, or a list without."""

    title: str
    text: str
    head: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()


def card(run: Run, figures: Sequence[tuple[str, ...]]) -> list[Part]:
    """Every part for which the run has something; `figures` are (name, value, what it is of) at the top of the page."""
    records = latest(read_lineage(run.path))
    files, models = _data(run, records), _models(run, records)
    kinds = (files, models, _labelers(run), _settings(run), _figures(figures), _held_out(run), *suite_parts(run))
    limits = [(one,) for one in _limits(run, records, files)]
    return [*filter(None, kinds), Part("Known limits", "", rows=limits)]


def write_cards(run: Run, title: str, parts: Sequence[Part]) -> Path:
    """Write RUN/card.md, and README.md into every exported policy, and return the first. Raises NotWritten."""
    records = latest(read_lineage(run.path))
    for made in records.values():
        folder = run.path / made.path
        readme = folder / CARD
        if made.kind.startswith("policy") and (folder / "config.json").is_file() and _ours(readme):
            write_whole(readme, _text(f"{folder.name}: {title}", parts, _metadata(run, made, records)))
    path = run.path / "card.md"
    write_whole(path, _text(title, parts))
    return path


def _ours(readme: Path) -> bool:
    """Whether it may be written over: a model card that somebody has written may not."""
    return not readme.exists() or MARKER in readme.read_text("utf-8", errors="replace")


def _text(title: str, parts: Sequence[Part], metadata: str = "") -> str:
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_as_markdown)
    source = Path(__file__).with_name("card.md").read_text("utf-8")
    text = template.from_string(source).render(title=title, parts=parts, metadata=metadata, marker=MARKER)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _as_markdown(value: Any) -> Any:
    """A text of strangers on one line, in which Markdown and HTML mean nothing."""
    return value if isinstance(value, Markup) else _MARKS.sub(r"\\\1", " ".join(visible(str(value)).split()))


def _metadata(run: Run, made: Artefact, records: Mapping[str, Artefact]) -> str:
    """The front matter of a model card, as YAML: what is known of the base model that all began with."""
    base = made.inputs[0].path if made.inputs else ""
    for _ in records:  # at most so many steps back, whatever the lines say
        base = records[base].inputs[0].path if base in records and records[base].inputs else base
    told = metadata_of(run.path / base) if base else {}
    name = base if base and is_hub_id(base) else told.get("base_model")
    given = {"base_model": name, "license": told.get("license"), "language": told.get("language")}
    texts: dict[str, Any] = {key: value for key, value in given.items() if isinstance(value, str)}
    return ModelCardData(
        **texts, library_name="transformers", pipeline_tag="text-generation", tags=["rlhf", "ppo"]
    ).to_yaml()


def _data(run: Run, records: Mapping[str, Artefact]) -> Part | None:
    made = [one for one in records.values() if one.kind in _DATA]
    rows = [
        (_name(one), _of(one), _used(one, records), _licence(run, one, records), one.sha256 or "not hashed")
        for one in (*(one for one in _given(records) if not _is_model(run, one)), *made)
    ]
    text = "sha256 of each file when it was used; a licence is what stands beside the file."
    return Part("Data", text, ("file", "made of", "used for", "licence", "sha256"), rows) if rows else None


def _models(run: Run, records: Mapping[str, Artefact]) -> Part | None:
    made = [one for one in records.values() if one.kind not in (*_DATA, "evaluation")]
    rows = [
        (_name(one), _of(one), _licence(run, one, records), one.sha256 or "not hashed: a name of the hub")
        for one in (*(one for one in _given(records) if _is_model(run, one)), *made)
    ]
    text = (
        "sha256 of each folder when it was made or used: of the sorted lines of sha256 and name of its files, its "
        f"{CARD} left out. rayward lineage says what has changed since."
    )
    return Part("Models", text, ("model", "made of", "licence", "sha256"), rows) if rows else None


def _given(records: Mapping[str, Artefact]) -> list[Input]:
    """What was used and not made here, once each."""
    return [*{one.path: one for made in records.values() for one in made.inputs if one.path not in records}.values()]


def _is_model(run: Run, one: Input) -> bool:
    path = run.path / one.path
    return (path / "config.json").is_file() if path.exists() else one.sha256 is None or not _ROWS.search(one.path)


def _name(one: Artefact | Input) -> str:
    """A path in the run directory, or a hub id; of what is elsewhere no more than its name."""
    return Path(one.path).name if Path(one.path).is_absolute() else one.path


def _of(one: Artefact | Input) -> str:
    if isinstance(one, Input):
        return "given"
    return ", ".join(_name(source) for source in one.inputs) or "made by the run"


def _used(one: Artefact | Input, records: Mapping[str, Artefact]) -> str:
    kinds = (made.kind for made in records.values() if one.path in (source.path for source in made.inputs))
    return ", ".join(dict.fromkeys(kinds))


def _licence(run: Run, one: Artefact | Input, records: Mapping[str, Artefact]) -> str:
    if isinstance(one, Artefact) and one.inputs:
        return "as what it was made of"
    return licence_of(run.path / one.path)


def _labelers(run: Run) -> Part | None:
    """Who ranked the comparisons, and how often two of them agree."""
    files = [*run.path.glob("data/comparisons.jsonl"), *sorted(run.path.glob("round-*/data/comparisons.jsonl"))]
    ranked = Counter(str(row.get("labeler") or "not recorded") for file in files for row in read_rows(file))
    rows = [(name, f"ranked {count} comparisons") for name, count in ranked.items()]
    tables = {"": run.summary} | {f" in round {index}": row for index, row in round_table(run).items()}
    for where, table in tables.items():
        if (rate := number(table.get("labelers_agree"))) is not None:
            alpha = number(table.get("labelers_alpha"))
            beside = "" if alpha is None else f"; Krippendorff's alpha {rounded(alpha)}"
            agreed = f"agree on {_between(rate, table.get('labelers_agree_ci'))} of pairs{beside}"
            rows.append((f"two labelers{where}", agreed))
    if not (rows or judged(run)):
        return None
    known = rows or "rankings" in run.summary or run.figures("reward") or run.calibration
    text = f"Rankings: {run.rankings if known else 'not recorded here'}. Gold: {run.labeler}."
    return Part("Labelers", text, ("who", "what") if rows else (), rows)


def judged(run: Run) -> bool:
    """Whether somebody's verdicts are in it."""
    return bool(run.arms or run.figures("reward") or run.calibration or run.evaluations or run.figures("rounds"))


def _settings(run: Run) -> Part | None:
    """What stages were made with, by their records, beside what the paper gives."""
    paper, used = dict(flat(PAPER)), defaultdict[str, dict[str, Any]](dict)
    records = (*run.path.glob("stages/*.json"), *run.path.glob("round-*/stages/*.json"))
    for file in sorted(records, key=lambda file: (file.parent, file.stem)):
        stage = file.relative_to(run.path).with_suffix("").as_posix().replace("stages/", "")
        made_of = _made_of(file)
        for key in paper.keys() & made_of.keys():
            used[key][stage] = made_of[key]
    rows = []
    for key, given in paper.items():
        expected = given if isinstance(given, list) else [given]
        if any(value not in expected for value in used[key].values()):
            values = defaultdict[str, list[str]](list)
            for stage, value in used[key].items():
                values[json.dumps(value)].append(stage)
            told = [f"{value} ({', '.join(stages)})" for value, stages in values.items()]
            rows.append((key, " or ".join(map(json.dumps, expected)), ", ".join(told if len(told) > 1 else values)))
    known = sum(bool(stages) for stages in used.values())
    text = f"Of {known} settings that the paper gives for its 1.3B policy, {known - len(rows)} are the paper's."
    return (
        Part("Settings that differ from the paper's", text, ("setting", "paper", "here") if rows else (), rows)
        if known
        else None
    )


def _made_of(file: Path) -> Mapping[str, Any]:
    """What a stage was made of; nothing where its record cannot be read."""
    try:
        found = json.loads(file.read_text("utf-8"))["made_of"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _figures(figures: Sequence[tuple[str, ...]]) -> Part | None:
    return (
        Part("Figures", "In short; the report has the curves.", ("figure", "value", "of"), figures) if figures else None
    )


def _held_out(run: Run) -> Part | None:
    """Mean gold, score and KL of each model's responses."""
    rows = []
    for label, name, _ in labels(run):
        samples = run.evaluations[label]
        cells = (mean(samples, quantity) for quantity in ("gold", "score", "kl"))
        rows.append((name, *cells, str(len(samples))))
    text = (
        f"Means with 95 % intervals over prompts. Gold: {run.labeler}; score: the reward model that PPO is trained "
        "with; KL: to the SFT model."
    )
    head = ("model", "gold", "score", "KL, nats a response", "n")
    return Part("Held-out prompts", text, head, rows) if rows else None


def mean(samples: Sequence[Sample], quantity: str) -> str:
    """Mean of a figure of samples, with a 95 % interval by the normal approximation; empty where none has it."""
    values = [value for one in samples if (value := getattr(one, quantity)) is not None]
    if not values:
        return ""
    middle = fmean(values)
    half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return _between(middle, [middle - half, middle + half] if half is not None else None)


def _between(value: float, ci: object) -> str:
    ends = interval(ci)
    return f"{rounded(value)} ({rounded(ends[0])} to {rounded(ends[1])})" if ends else rounded(value)


def suite_parts(run: Run) -> Iterator[Part]:
    """The benchmarks, and what the other models have more than the first."""
    found = {name: row for name, row in run.figures("suite").items() if isinstance(row, dict)}
    kinds = {
        "Benchmarks": "figures",
        "Benchmarks: differences": "difference",
        "Share of the tax that the mix saved": "saved",
    }
    for title, kind in kinds.items():
        head, *rows = suite(found, kind)
        if rows:
            first = next((str(row["to"]) for row in found.values() if "to" in row), "the first model")
            against = {
                "difference": f" More than {first}, paired by item.",
                "saved": f" Of what PPO without it lost of {first}.",
            }
            yield Part(title, f"With 95 % bootstrap intervals over items.{against.get(kind, '')}", head, rows)
    head, *rows = win_rates(found)
    if rows:
        yield Part("Win rates", "A tie is half a win; Wilson's 95 % intervals over prompts.", head, rows)


def _limits(run: Run, records: Mapping[str, Artefact], data: Part | None) -> Iterator[str]:
    """What a reader must not take the figures for."""
    if judged(run) and run.labeler.startswith("simulated"):
        yield f"Gold is the verdict of the {run.labeler}, a program: no person judged a response."
        if run.rankings == run.labeler and (run.figures("reward") or run.calibration):
            yield "The same labeler ranked what the reward model learnt from: it is no independent judge of the policy."
    if run.arms:
        yield "Each policy was trained once, with one seed: intervals are over prompts or items, not over trainings."
    if any(run.figures("ppo", arm, "best") for arm in run.arms):
        yield "The policy to keep was chosen by its gold on the held-out prompts, which is therefore too high."
    counts = {len(samples) for samples in run.evaluations.values()}
    if counts and min(counts) < _FEW:
        yield f"The held-out evaluation has {min(counts)} prompts."
    tables = {name: row for name, row in run.figures("suite").items() if isinstance(row, dict)}
    items: dict[str, float] = {}
    for task, count in chain.from_iterable(map(_items, tables.values())):
        items[task] = min(count, items.get(task, count))
    compared = [sum(map(int, row[3].split(", "))) for row in [*win_rates(tables)][1:]]
    items |= {"win_rate": min(compared)} if compared else {}
    if few := {task: count for task, count in items.items() if count < _FEW}:
        yield "Benchmarks of few items: " + ", ".join(f"{task} ({count:.0f})" for task, count in few.items()) + "."
    claims = defaultdict[str, list[str]](list)
    for name, kind in TASKS.items():
        if name not in items:
            claims[kind.claim].append(name)
    if claims:
        yield "Not measured: " + "; ".join(f"{claim} ({', '.join(names)})" for claim, names in claims.items()) + "."
    if "toxicity" in items:
        yield "Toxicity is not the Perspective API's, which the paper asked: it does not compare with the paper's."
    if data and (unknown := [row[0] for row in data.rows if row[3] == UNKNOWN]):
        yield f"No licence is known of {', '.join(unknown)}."
    if not records:
        yield "There is no lineage.jsonl: what it was made of is not recorded."
    if any((one.commit or "").endswith("-dirty") for one in records.values()):
        yield "Some of it was made by code with changes that are in no commit."
    if marked := [_name(one) for one in records.values() if one.trust_remote_code]:
        yield f"Code that a model's folder brought along could run when these were made: {', '.join(marked)}."
    if run.unreadable:
        yield f"{len(run.unreadable)} files or rows could not be read and are left out."


def _items(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The fewest items behind a figure of each task."""
    figures = row.get("figures")
    for task, found in figures.items() if isinstance(figures, dict) else ():
        counts = [number(one.get("n")) for one in found.values() if isinstance(one, dict)]
        if known := [count for count in counts if count is not None]:
            yield task, min(known)
