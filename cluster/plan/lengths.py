"""How long prompts and responses are: counted in the run's own files where they are there, else as `plan` says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from actors.prompts import read_demonstrations, read_prompts
from cluster.config.schema import Config
from cluster.plan.counts import Lengths
from cluster.rundir.inputs import data_file
from reward_server.encoding import ChatEncoding
from reward_server.preferences.labeling import read_comparisons

Reader = Callable[[Path], list[int]]
"""the lengths of what a file holds, in tokens"""
_ROWS = 512  # of a file are counted: more would hardly change a mean


def lengths_of(config: Config, run_dir: Path) -> Lengths:
    """Of the configured data, else of the run's own, by its model's tokenizer; else those of the section `plan`.

    Prompts that are too long do not count, and a response counts as far as sampling would let it go. A file that
    cannot be read counts as none: the checks of the command tell of it.
    """
    plan, rollout = config.plan, config.rollout
    prompts, responses, told = [], [], ["", ""]
    if encoding := _encoding(config, run_dir):
        prompts, prompt_file = _counted(config, run_dir, _prompt_readers(encoding))
        responses, response_file = _counted(config, run_dir, _response_readers(encoding))
        prompts = [length for length in prompts if length <= rollout.max_prompt_tokens]
        told = [f"prompts of {prompt_file}", f"responses of {response_file}"]
    if not prompts:
        told[0] = "plan.prompt_tokens" if plan.prompt_tokens else "the longest prompts allowed"
    if not responses:
        told[1] = "plan.response_tokens" if plan.response_tokens else "the longest responses allowed"
    return Lengths(
        prompt=round(fmean(prompts)) if prompts else plan.prompt_tokens or rollout.max_prompt_tokens,
        response=round(fmean(min(length, rollout.max_new_tokens) for length in responses))
        if responses
        else plan.response_tokens or rollout.max_new_tokens,
        longest=rollout.max_new_tokens,
        source=" and ".join(told),
    )


def _prompt_readers(encoding: ChatEncoding) -> dict[str, Reader]:
    def read(file: Path) -> list[int]:
        return [len(encoding.prompt(row.messages)) for row in read_prompts(file)[:_ROWS]]

    return {"prompts": read, "preference_prompts": read}


def _response_readers(encoding: ChatEncoding) -> dict[str, Reader]:
    """What the SFT model has said, where it has; else what people have."""

    def sampled(file: Path) -> list[int]:
        rows = read_comparisons(file)[:_ROWS]
        pairs = [pair for row in rows for pair in zip(row.responses, row.ended, strict=True)]
        return [len(encoding.response(text, ended)) for text, ended in pairs]

    def written(file: Path) -> list[int]:
        return [len(encoding.response(row.response, ended=True)) for row in read_demonstrations(file)[:_ROWS]]

    return {"completions": sampled, "demonstrations": written}


def _counted(config: Config, run_dir: Path, readers: Mapping[str, Reader]) -> tuple[list[int], str]:
    """The lengths in the first of these files that has any, and its name."""
    for name, read in readers.items():
        try:
            file = data_file(config, run_dir, name)
            if lengths := read(file):
                return lengths, file.name
        except (ValueError, OSError):
            continue
    return [], ""


def _encoding(config: Config, run_dir: Path) -> ChatEncoding | None:
    """The text format of the run's model; None where its folder is not here."""
    models, template = config.models, config.models.chat_template
    for folder, own in ((models.sft or run_dir / "sft", None), (models.base, template)):
        if folder is not None and (Path(folder) / "config.json").is_file():
            try:
                return ChatEncoding.load(folder, own)
            except (ValueError, OSError):
                continue
    return None
