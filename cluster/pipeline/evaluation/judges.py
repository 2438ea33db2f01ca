"""Who compares the replies of two models: a labeler, a reward model, a chat model, or people."""

import asyncio
import contextlib
import re
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from actors.evaluation.task import Reply
from actors.prompts import Prompt, stable_hash
from actors.waits import together
from cluster.pipeline.job import Job
from cluster.rundir.files import read_rows
from learner.data.journal import Journal
from learner.weights.checkpoint import file_sha256
from reward_server.config import PartConfig
from reward_server.preferences.judges import FORM, VERSION, ChatJudge, Vote, read_votes
from reward_server.preferences.labeling import load_labeler
from reward_server.preferences.records import read_all
from reward_server.schema import Message, ScoreRequest

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool

_LABELER = "labeler"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models' replies to a prompt."""

    prompt: Prompt
    models: tuple[str, str]
    """labels"""
    replies: tuple[Reply, Reply]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """What a judge said of a pair."""

    won: float | None
    """1: the second model's reply is better, 0: the first's, 0.5: a tie; None: the judge gave no verdict"""
    for_first: tuple[bool, ...] = ()
    """of each verdict that was asked for in an order, and was no tie: whether it was for what stood first"""
    votes: int = 1
    """of people"""


class Judge(Protocol):
    """Compares replies."""

    @property
    def name(self) -> str: ...  # which stands wherever its verdicts do
    async def prefer(
        self, job: Job, processes: "ProcessPool", pairs: Sequence[Pair]
    ) -> list[Preference | None]: ...  # one for each pair; None: it was not asked about that one


class LabelerJudge:
    """The configured labeler, whose verdicts on single replies are compared."""

    def __init__(self, job: Job) -> None:
        """Raises ValueError where it cannot be loaded."""
        self._labeler = load_labeler(job.config.labeler)
        self.name = self._labeler.caption

    async def prefer(self, job: Job, processes: "ProcessPool", pairs: Sequence[Pair]) -> list[Preference | None]:
        texts = list(dict.fromkeys(reply.text for pair in pairs for reply in pair.replies))
        found = dict(zip(texts, await asyncio.to_thread(self._labeler.verdicts, texts), strict=True))
        margin = self._labeler.tie_margin
        return [_higher([found[reply.text] for reply in pair.replies], margin) for pair in pairs]


class RewardModelJudge:
    """A reward model's folder, whose scores are compared; equal ones are a tie.

    A decoder is scored by the reward service. An encoder reads prompt and reply as a pair in this process, and gives
    no verdict on what is longer than it reads.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        """Raises ValueError for a folder that holds no reward model."""
        from actors.evaluation.classifiers import PairClassifier
        from reward_server.model import check_model
        from reward_server.pretrained import NoDecoder

        self.folder, self.name, self._encoder = folder, str(folder), None
        try:
            try:
                check_model(folder, "raw_value", job.config.models)
            except NoDecoder:
                self._encoder = PairClassifier(self.name, job.config.models)
        except ValueError as error:
            raise ValueError(f"evaluation.judges: {folder} is no reward model ({error})") from error

    def refuse_trained_on(self, job: Job, models: Mapping[str, Path]) -> None:
        """Raise ValueError where its weights are those that PPO trained one of the models on."""
        own = _weights(self.folder)
        for key, path in _trained_on(job, models):
            if own & _weights(path):
                raise ValueError(
                    f"evaluation.judges: {self.folder} has the weights of {path} ({key}), which PPO was trained on: it "
                    "would praise what was learnt to please it. Give a reward model of other rankings, such as of "
                    "other labelers"
                )

    async def prefer(self, job: Job, processes: "ProcessPool", pairs: Sequence[Pair]) -> list[Preference | None]:
        said = {(pair.prompt.id, reply): pair.prompt for pair in pairs for reply in pair.replies}
        both = [(prompt.messages, reply) for (_, reply), prompt in said.items()]
        found = await (self._paired(both) if self._encoder else self._served(both, job, processes))
        scores = dict(zip(said, found, strict=True))
        return [_higher([scores[pair.prompt.id, reply] for reply in pair.replies]) for pair in pairs]

    async def _served(
        self, said: Sequence[tuple[tuple[Message, ...], Reply]], job: Job, processes: "ProcessPool"
    ) -> list[float | None]:
        part = PartConfig(name="judge", kind="model", target=str(self.folder), raw=True)
        client = await processes.rewards(None, job.config.scoring.model_copy(update={"parts": (part,)}))
        requests = [
            ScoreRequest(id=f"{n}", prompt=prompt, response=reply.text, ended=reply.ended)
            for n, (prompt, reply) in enumerate(said)
        ]
        return [one.score for one in await client.score(requests)]

    async def _paired(self, said: Sequence[tuple[tuple[Message, ...], Reply]]) -> list[float | None]:
        assert self._encoder
        prompts = ("\n\n".join(message.content for message in prompt) for prompt, _ in said)
        texts = [(prompt, reply.text) for prompt, (_, reply) in zip(prompts, said, strict=True)]
        return [await asyncio.to_thread(self._encoder.score, *one) for one in texts]


class ChatModelJudge(ChatJudge):
    """A chat model, asked in both orders: what it says in both decides, and where they differ it is a tie."""

    async def prefer(self, job: Job, processes: "ProcessPool", pairs: Sequence[Pair]) -> list[Preference | None]:
        """Replies that are the same are a tie, and it is not asked. Raises JudgeUnavailable.

        Every answer is a line of RUN/evaluations/win_rate/<judge>.answers.jsonl as it comes, and not asked for again.
        """
        path = judged_file(job, self, ".answers")
        known = {row["key"]: row.get("verdict") for row in read_rows(path) if "key" in row}
        differ = [pair for pair in pairs if pair.replies[0].text != pair.replies[1].text]
        wanted = {self._key(pair, first): (pair, first) for pair in differ for first in (0, 1)}
        left = {key: one for key, one in wanted.items() if key not in known}
        journal = Journal(path, job.monitor.disk)

        async def ask(key: str, pair: Pair, first: int) -> None:
            texts = pair.replies[first].text, pair.replies[1 - first].text
            found = await self.compare(pair.prompt.messages, *texts)
            models = pair.models[first], pair.models[1 - first]
            about = {"id": pair.prompt.id, "first": models[0], "second": models[1]}
            journal.append({"key": key, **about, "answer": found.text, "verdict": found.verdict})
            known[key] = found.verdict
            advance()

        try:
            with job.tracker.console.progress(f"judged by {self.name}", len(left)) as advance:
                await together(*(ask(key, *one) for key, one in left.items()))
        finally:
            journal.close()
        await job.monitor.disk.ready()
        said = [[known.get(self._key(pair, first), "tie") for first in (0, 1)] for pair in pairs]
        return [_agreed(*both) for both in said]

    def _key(self, pair: Pair, first: int) -> str:
        """What an answer depends on, as a hash."""
        texts = pair.replies[first].text, pair.replies[1 - first].text
        return f"{stable_hash(VERSION, self.url, self.model, pair.prompt.messages, *texts):016x}"


class PeopleJudge:
    """People's verdicts in a file; the majority of several on a pair decides, and as many of both are a tie."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, f"people ({path.name})"
        self._votes: list[Vote] = []

    def read(self, prompts: Sequence[Prompt], models: Mapping[str, Path], max_bad_rows: int) -> None:
        """Read them. Raises RecordError, see `read_votes`."""
        self._votes = read_votes(self._path, {prompt.id for prompt in prompts}, models, max_bad_rows)

    async def prefer(self, job: Job, processes: "ProcessPool", pairs: Sequence[Pair]) -> list[Preference | None]:
        votes: dict[tuple[str, tuple[str, str]], list[float]] = {}
        for vote in self._votes:
            one, other = vote.models
            votes.setdefault((vote.prompt, (one, other)), []).append(vote.won)
            votes.setdefault((vote.prompt, (other, one)), []).append(1 - vote.won)
        found = [votes.get((pair.prompt.id, pair.models)) for pair in pairs]
        return [_higher([len(one) - sum(one), sum(one)], votes=len(one)) if one else None for one in found]


def read_judges(job: Job) -> list[Judge]:
    """The judges of evaluation.judges. Raises ValueError for what is none, and one that is there twice."""
    names = job.config.evaluation.judges
    judges = read_all(*(lambda name=name: _judge(name, job) for name in names))
    if twice := [judge.name for n, judge in enumerate(judges) if judge.name in [one.name for one in judges[:n]]]:
        raise ValueError(f"evaluation.judges has {twice[0]} twice: name it once")
    hosts = {judge.host for judge in judges if isinstance(judge, ChatJudge) and judge.has_token}
    if len(hosts) > 1:
        raise ValueError(
            f"evaluation.judges are at {' and '.join(sorted(hosts))}, and RAYWARD_JUDGE_TOKEN is for one host: ask "
            "each in a command of its own"
        )
    return judges


def ready(judges: Sequence[Judge], job: Job, prompts: Sequence[Prompt], models: Mapping[str, Path]) -> None:
    """Check that they can judge these models' replies. Raises ValueError."""
    for judge in judges:
        if isinstance(judge, PeopleJudge):
            judge.read(prompts, models, job.max_bad_rows)
        elif isinstance(judge, RewardModelJudge):
            judge.refuse_trained_on(job, models)


def chat_model(judges: Sequence[Judge]) -> ChatJudge | None:
    """The first that can be asked a question."""
    return next((judge for judge in judges if isinstance(judge, ChatJudge)), None)


@contextlib.asynccontextmanager
async def attending(judges: Sequence[Judge]) -> AsyncIterator[None]:
    """While the block lasts, chat models can be asked. Raises JudgeUnavailable at once for one that does not answer."""
    chats = [judge for judge in judges if isinstance(judge, ChatJudge)]
    try:
        await together(*(judge.ready() for judge in chats))
        yield
    finally:
        for judge in chats:
            await judge.close()


def judged_file(job: Job, judge: Judge, kind: str = "") -> Path:
    """Where a judge's verdicts are."""
    return job.run_dir / "evaluations" / "win_rate" / f"{slug(judge)}{kind}.jsonl"


def slug(judge: Judge) -> str:
    """A judge's name for files and metrics."""
    return re.sub(r"[^\w.]+", "-", judge.name).strip("-.")


def _judge(name: str, job: Job) -> Judge:
    path = Path(name)
    if name == _LABELER:
        return LabelerJudge(job)
    if name.startswith(("http://", "https://")):
        return ChatModelJudge(name, job.config.scoring.retry_s)
    if path.is_dir():
        return RewardModelJudge(path, job)
    if path.is_file():
        return PeopleJudge(path)
    raise ValueError(
        f"evaluation.judges: {name!r} is no judge; it is {_LABELER!r}, the folder of a reward model, {FORM}, or a file "
        "of people's verdicts"
    )


def _higher(values: Sequence[float | None], margin: float = 0.0, votes: int = 1) -> Preference:
    one, other = values
    if one is None or other is None:
        return Preference(won=None)
    return Preference(won=0.5 if abs(other - one) <= margin else float(other > one), votes=votes)


def _agreed(one: str | None, other: str | None) -> Preference:
    """Of the verdicts when the first model's reply stood first, and when the second model's did."""
    won = 0.5
    if one is None or other is None:
        won = None
    elif {one, other} == {"first", "second"}:  # the same reply both times
        won = float(other == "first")
    return Preference(won=won, for_first=tuple(said == "first" for said in (one, other) if said not in (None, "tie")))


def _trained_on(job: Job, models: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """(what says so, folder) of the reward models behind this run, and behind the runs of the models."""
    config = job.config
    yield "RUN/reward", job.run_dir / "reward"
    if config.models.reward is not None:
        yield "models.reward", config.models.reward
    for part in config.scoring.parts:
        if part.kind == "model" and part.target is not None:
            yield f"scoring.parts ({part.name})", Path(part.target)
    for label, model in models.items():
        yield f"the run of {label}", model.parent / "reward"
        try:
            used = tomllib.loads((model.parent / "config.toml").read_text("utf-8"))["models"]["reward"]
            yield f"the run of {label}", Path(used)
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _weights(folder: Path) -> set[str]:
    """SHA-256 of a model's files of weights; none where there is no folder."""
    return {file_sha256(path) for kind in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(kind)}
