"""Models and data files that a command is given: where they are, and what can be told of them without loading them.

Nothing heavy is imported here, so that a wrong path is told in half a second.
"""

import contextlib
import json
import math
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.config.schema import Config
from reward_server.preferences.formats import file_rows
from reward_server.preferences.forms import kinds_of, row_prompt, row_text
from reward_server.preferences.records import RecordError, read_rows, without_nulls
from reward_server.pretrained import ADAPTER, Kind, is_hub_id

_HUB_ANSWERS_S = 5.0
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_INSTEAD = {"init": "sft", "critic": "reward"}  # models that others stand in for
_MADE_BY = {"policy": "ppo", "init": "ppo"}  # commands that are not called as the model that they write
# What the rows of a data file must have; a file of another kind is told by its first row.
KINDS = {
    **dict.fromkeys(("demonstrations", "demonstrations_valid"), "demonstrations"),
    **dict.fromkeys(("completions", "comparisons"), "comparisons"),
    **dict.fromkeys(("pretraining", "pretraining_valid"), "pretraining text"),
    **dict.fromkeys(("prompts_raw", "preference_prompts", "prompts", "prompts_valid", "prompts_heldout"), "prompts"),
}
_ROWS = {
    "prompts": '{"prompt": text or messages}',
    "demonstrations": '{"prompt": text or messages, "response": text}',
    "comparisons": '{"prompt", "completions", "ranks"} or {"chosen", "rejected"}',
    "pretraining text": '{"text": text}',
}


def model_folder(config: Config, run_dir: Path, name: str) -> Path:
    """Folder of the model "sft", "reward" or "policy": the configured one, else the run's own.

    "init" is the configured one, else the SFT model; "critic" likewise, else the reward model. Raises ValueError
    naming the key when neither exists.
    """
    configured = getattr(config.models, name)
    if configured is None and name in _INSTEAD:
        return model_folder(config, run_dir, _INSTEAD[name])
    path = configured or run_dir / name
    if not (path / "config.json").is_file():
        raise ValueError(
            f"there is no {name} model in {path}: run `rayward {_MADE_BY.get(name, name)}` in this run directory "
            f"first, or set models.{name} to a Hugging Face folder"
        )
    return path


def data_file(config: Config, run_dir: Path, name: str) -> Path:
    """The configured data file, else the run's own. Raises ValueError naming the key when there is neither."""
    path, own = getattr(config.data, name), run_dir / "data" / f"{name}.jsonl"
    if path is None and not own.is_file():
        raise ValueError(f"data.{name} is not set and {own} does not exist: set it to a data file")
    return path or own


def check_data(name: str, path: Path) -> None:
    """Raise ValueError when a data file is not there, or its first row is one of another kind of file."""
    kind = KINDS.get(name)
    try:
        line, row = next(iter(read_rows(path)))
    except RecordError as error:
        if not path.exists() or str(error).startswith(f"{path}: "):  # nothing of it can be read
            raise ValueError(f"data.{name}: {error}") from error
        return  # one bad row: whoever reads the whole file knows how many may be skipped
    found = kinds_of(without_nulls(row))
    if kind and found and kind not in found:
        raise ValueError(
            f"data.{name}: {path}:{line} looks like a row of {found[0]} (its keys are {sorted(row)}), and {kind} are "
            f"wanted: {_ROWS[kind]}. Give data.{name} another file"
        )


def common_prompts(files: Mapping[str, Path], read: Collection[str]) -> Iterator[str]:
    """Warnings of prompts, or pretraining texts, that are trained on and held out; of pairs with a file of `read`.

    Files by their names in `data`. Of rows that cannot be read nothing is said here.
    """
    held_out = ("prompts_heldout", "prompts_valid", "demonstrations_valid")
    trained = ("demonstrations", "preference_prompts", "comparisons", "prompts")
    pairs = [*product(trained, held_out), ("pretraining", "pretraining_valid")]
    pairs.remove(("demonstrations", "demonstrations_valid"))  # by their groups, which SFT itself compares
    pairs = [pair for pair in pairs if files.keys() >= {*pair} and {*pair} & {*read}]
    said = {name: _said(files[name]) for name in {name for pair in pairs for name in pair}}
    for one, other in pairs:
        if both := len(said[one] & said[other]):
            yield (
                f"{both} of the {len(said[other])} different rows of data.{other} ({files[other]}) are also in "
                f"data.{one} ({files[one]}): what is measured on them will look too good. Take them out of one"
            )


def _said(path: Path) -> set[int]:
    """What the rows ask, or say."""
    found = set[int]()
    with contextlib.suppress(ValueError):
        for _, row in file_rows(path):
            with contextlib.suppress(ValueError):
                if isinstance(row, dict):
                    row = without_nulls(row)
                    said = row_text(row, "text") if kinds_of(row) == ["pretraining text"] else row_prompt(row)
                    found.add(hash(said if isinstance(said, str) else tuple((m.role, m.content.strip()) for m in said)))
    return found


def check_base(name: str) -> None:
    """Raise ValueError when models.base is neither a model's folder, nor in the local cache, nor can be downloaded.

    Left to itself, the hub's client tries an unreachable hub for most of a minute.
    """
    path = Path(name)
    if path.exists():
        Model(name="base", path=path).check()
    elif not is_hub_id(name):
        raise ValueError(f"models.base = {name}: there is no such folder. Give a Hugging Face folder, or a hub id")
    elif not _cached(name):
        _check_hub(name)


def _cached(name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return any((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def _check_hub(name: str) -> None:
    remedy = "Give models.base a Hugging Face folder, or download the model where there is a network"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(f"models.base = {name} is not in the local cache, and HF_HUB_OFFLINE is set. {remedy}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if any(os.environ.get(variable) for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    url = urlsplit(endpoint)
    address = (url.hostname or endpoint, url.port or (80 if url.scheme == "http" else 443))
    try:
        socket.create_connection(address, timeout=_HUB_ANSWERS_S).close()
    except OSError as error:
        raise ValueError(
            f"models.base = {name} is not in the local cache, and the hub at {endpoint} cannot be reached ({error}). "
            f"{remedy}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Hugging Face folder, as its small files describe it."""

    name: str
    """in the configuration: base, sft, init, reward, critic or policy"""
    path: Path
    """the folder"""

    def check(self) -> None:
        """Raise ValueError when a file that makes a model is missing or cannot be read."""
        if not self.path.is_dir():
            raise ValueError(f"{self._where} is a file, and a model is a folder: name the folder it is in")
        if not (self.path / "config.json").is_file():
            adapter = (self.path / "adapter_config.json").is_file()
            told = ADAPTER if adapter else "has no config.json, so it is not a model's folder: name another"
            raise ValueError(f"{self._where} {told}")
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError(f"{self._where} has a config.json without model_type: name a language model's folder")
        if not any((self.path / file).is_file() for file in _TOKENIZERS):
            raise ValueError(f"{self._where} has no tokenizer ({_TOKENIZERS[0]}): save it there too")
        if not any((self.path / file).is_file() for file in _WEIGHTS):
            raise ValueError(f"{self._where} has no weights ({_WEIGHTS[0]}): save or copy them there")
        index = self.path / _WEIGHTS[1]
        parts = set(_json(index).get("weight_map", {}).values()) if index.is_file() else set()
        if missing := sorted(file for file in parts if not (self.path / file).is_file()):
            raise ValueError(f"{self._where} lacks {len(missing)} of its files, first {missing[0]}: copy all")
        if self.tokens and self.vocabulary and self.tokens > self.vocabulary:
            raise ValueError(
                f"{self._where} has a tokenizer with ids up to {self.tokens - 1}, and the model's vocabulary ends at "
                f"{self.vocabulary - 1}: give the tokenizer that the model was trained with, or resize the "
                "model's embeddings"
            )

    @property
    def _where(self) -> str:
        return f"models.{self.name} = {self.path}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; of a model that does more than text, the part about text laid over it."""
        fields = _json(self.path / "config.json")
        text = fields.get("text_config")
        return {**fields, **text} if isinstance(text, dict) else fields

    @property
    def kind(self) -> Kind:
        """What it is loaded as; a critic starts from a reward model, or from a language model with a fresh head."""
        if self.name not in ("reward", "critic"):
            return "policy"
        scalar = any(name.endswith("ForSequenceClassification") for name in self.config.get("architectures") or ())
        return "value" if scalar or self.name == "reward" else "new_value"

    @property
    def positions(self) -> int | None:
        """Longest sequence in tokens, where the model says."""
        found = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        return found if isinstance(found, int) else None

    @property
    def vocabulary(self) -> int | None:
        """Token ids that the model has embeddings for, where it says."""
        found = self.config.get("vocab_size")
        return found if isinstance(found, int) else None

    @cached_property
    def words(self) -> dict[str, int]:
        """Every token of a fast tokenizer with its id; empty for another kind of tokenizer."""
        file = self.path / "tokenizer.json"
        fields = _json(file) if file.is_file() else {}
        words = (fields.get("model") or {}).get("vocab")
        added = {token["content"]: token["id"] for token in fields.get("added_tokens") or ()}
        return {**words, **added} if isinstance(words, dict) else added

    @property
    def tokens(self) -> int | None:
        """One more than the largest id of a fast tokenizer."""
        return max(self.words.values(), default=-1) + 1 or None

    @cached_property
    def parameters(self) -> int:
        """Numbers in its safetensors files, tied ones once; 0 where there are none to count."""
        return sum(_parameters(file) for file in self.path.glob("*.safetensors"))


def _parameters(file: Path) -> int:
    """Read off the header: eight bytes with its length, then JSON {name: {"dtype", "shape", "data_offsets"}}."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if length < file.stat().st_size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file} is damaged: its header cannot be read. Copy or save the model again")
    end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end > file.stat().st_size:
        raise ValueError(f"{file} is cut off: it should have {8 + length + end} bytes. Copy or save the model again")
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): copy or save the model again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object: copy or save the model again")
    return fields
