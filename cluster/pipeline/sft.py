"""Step 1: supervised fine-tuning, of the policy that PPO starts from and of the baseline that it is compared with."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.pipeline.stage import SECTIONS, MadeOf, Stage, Trained
from learner.config import SFTConfig
from reward_server.preferences.records import read_all

if TYPE_CHECKING:
    from actors.chat import ChatExample
    from actors.prompts import Demonstration
    from cluster.fleet.pool import ProcessPool
    from learner.sft import SFTData
    from reward_server.encoding import ChatEncoding

log = logging.getLogger(__name__)


class SFT(Stage):
    """Fine-tunes models.base on demonstrations and writes the epoch that `select` names."""

    name = "sft"
    purpose = "Step 1: fine-tune a language model on demonstrations."
    files = "Reads models.base and data.demonstrations. Writes RUN/sft, a Hugging Face folder."
    example = "rayward sft --run runs/mine --models.base path/to/model --data.demonstrations d.jsonl"
    sections = (*SECTIONS, "sft", "tracking")
    reads = ("models.base", "data.demonstrations", "data.pretraining")
    processes = ("learner",)
    writes = ("sft",)
    results = ("sft",)

    @classmethod
    def settings(cls, config: Config) -> SFTConfig:
        """Its section."""
        return config.sft

    @classmethod
    def mixes(cls, config: Config) -> bool:
        return bool(cls.settings(config).pretraining_share)

    @classmethod
    def trained(cls, config: Config) -> Trained:
        section = cls.settings(config)
        return {f"{cls.name}.optimizer": (section.network, section.optimizer)}

    def __init__(self, job: Job, base: str | Path | None = None) -> None:
        """`base` is what is fine-tuned, models.base where it is not given."""
        super().__init__(job)
        self._base = base

    @property
    def base(self) -> str | Path:
        """What is fine-tuned. Raises ValueError when it is not set."""
        base = self._base or self.job.config.models.base
        if base is None:
            raise ValueError("models.base is not set: name a Hugging Face folder or hub id, --models.base NAME")
        return base

    def made_of(self) -> MadeOf:
        config = self.job.config
        tokens = {"ppo": {"pretraining": {"sequence_tokens": config.ppo.pretraining.sequence_tokens}}}
        template = {"models": {"chat_template": config.models.chat_template}}
        files = self.job.files("demonstrations", "demonstrations_valid", "pretraining", "pretraining_valid")
        settings = {self.name: self.settings(config).model_dump(mode="json"), **template, **tokens}
        return settings, {"models.base": self.base, **files}

    def check(self) -> "SFTData":
        """Read and encode the files of step 1."""
        from learner.data.corpora import split_held_out
        from learner.sft import SFTData
        from reward_server.encoding import ChatEncoding

        job, config = self.job, self.settings(self.job.config)
        encoding = ChatEncoding.load(self.base, job.config.models, job.config.models.chat_template)
        if encoding.positions and config.max_tokens > encoding.positions:
            raise ValueError(
                f"{self.name}.max_tokens = {config.max_tokens} is more than the {encoding.positions} positions of "
                f"{self.base}. Nearest: {self.name}.max_tokens = {encoding.positions}"
            )
        valid = job.files("demonstrations_valid").get("data.demonstrations_valid")
        text = bool(config.pretraining_share)
        measured = text and bool(job.files("pretraining_valid"))
        tokens = min(job.config.ppo.pretraining.sequence_tokens, config.max_tokens)
        rows, held_out, pretraining, pretraining_valid = read_all(
            lambda: encoded(job.file("demonstrations"), job.max_bad_rows, encoding, config),
            lambda: encoded(valid, job.max_bad_rows, encoding, config) if valid else [],
            lambda: packed_text(job, "pretraining", encoding, tokens) if text else (),
            lambda: packed_text(job, "pretraining_valid", encoding, tokens) if measured else (),
        )
        if valid is None:
            rows, held_out = split_held_out(rows, lambda row: instruction(row[0]), config.valid_share, config.seed)
        elif both := len({instruction(row) for row, _ in held_out} & {instruction(row) for row, _ in rows}):
            log.warning(
                "%d instructions of %s are also in data.demonstrations: its loss will look too good", both, valid
            )
        return SFTData(
            demonstrations=[example for _, example in rows],
            valid=[example for _, example in held_out],
            pretraining=pretraining,
            pretraining_valid=pretraining_valid,
        )

    async def run(self, processes: "ProcessPool", inputs: "SFTData") -> None:
        from learner.sft import best_epoch, sft

        job, config, (out,) = self.job, self.settings(self.job.config), self.results
        target, kept, progress = job.run_dir / out, job.run_dir / f"{out}-epochs", self.progress(config)
        if not progress.done:
            shutil.rmtree(kept, ignore_errors=True)  # of an earlier run in this directory, perhaps of more epochs
        learner = await processes.learner()
        trained = await learner.load(
            "policy",
            "policy",
            Path(self.base),
            config.network,
            config.optimizer,
            chat_template=job.config.models.chat_template,
            residual_dropout=config.residual_dropout,
        )
        await progress.load(learner)

        async def keep(epoch: int) -> None:
            if config.select != "last":
                await job.export(learner, "policy", kept / str(epoch))

        title = f"{self.name}: {len(inputs.demonstrations)} examples, {trained / 1e6:.1f} M parameters"
        with job.tracker.phase(title, self.name):
            losses = await sft(learner, inputs, config, progress, keep)
        epoch = best_epoch(losses) if config.select == "loss" else config.epochs
        if config.select == "last":
            await job.export(learner, "policy", target)
        else:
            job.install(kept / str(epoch), out)
        await learner.unload()
        job.made(out, target, self.base, *map(job.file, self.learnt(inputs)))
        before, after = losses[0], losses[epoch]
        text = {} if after.pretraining is None else {"pretraining_valid_after": after.pretraining}
        figures = {"valid_before": before.demonstrations, "valid_after": after.demonstrations, "epoch": epoch, **text}
        job.summarise(self.name, **figures)

    def learnt(self, inputs: "SFTData") -> Sequence[str]:
        """Data files that the model has learnt from."""
        return ("demonstrations", *["pretraining"] * bool(inputs.pretraining))


class Baseline(SFT):
    """The same with the settings of `baseline`."""

    name = "baseline"
    purpose = "Step 1 again: the SFT baseline, trained longer and without pretraining text."
    files = "Reads models.base and data.demonstrations. Writes RUN/baseline, and each epoch to RUN/baseline-epochs."
    example = "rayward baseline --run runs/mine --models.base path/to/model --data.demonstrations d.jsonl"
    sections = (*SECTIONS, "baseline", "tracking")
    writes = ("baseline",)
    results = ("baseline",)

    @classmethod
    def settings(cls, config: Config) -> SFTConfig:
        return config.baseline


def encoded(
    file: Path, max_bad_rows: int, encoding: "ChatEncoding", config: SFTConfig
) -> "list[tuple[Demonstration, ChatExample]]":
    """Read demonstrations with what is learnt of each; those that are cut are counted and warned of."""
    from actors.chat import chat_example
    from actors.prompts import read_demonstrations

    rows = read_demonstrations(
        file,
        max_bad_rows,
        lambda row: (row, chat_example(encoding, row.prompt, row.response, config.max_tokens, config.mask_prompt)),
    )
    if cut := sum(example.ids[-1] != encoding.eos_id for _, example in rows):
        log.warning(
            "%d of %d rows of %s are cut at max_tokens = %d, and so teach no end: raise it, or leave them out",
            *(cut, len(rows), file, config.max_tokens),
        )
    if twice := sum(encoding.ends_twice(row.response) for row, _ in rows):
        log.warning("%d of %d rows of %s end in an end mark already, and get another: cut it", twice, len(rows), file)
    return rows


def instruction(row: "Demonstration") -> str:
    """What a demonstration must not be parted from in a split: its group, else the text of its prompt."""
    return row.group or json.dumps([(message.role, message.content) for message in row.prompt])


def packed_text(job: Job, name: str, encoding: "ChatEncoding", tokens: int) -> "list[ChatExample]":
    """A file of texts as packed sequences in which every token but the first is a target."""
    from learner.data.corpora import pack, read_texts, text_examples

    return text_examples(pack(read_texts(job.file(name), job.max_bad_rows), encoding, tokens))
