"""Tiny real models: a byte-level BPE tokenizer with a ChatML template, random models of every family."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "gpt_neox": {},
    "gpt2": {},
}
"""Kinds of models, by transformers' name of their config, and what is particular to the tiny one of each."""
CORPUS = [
    "system\nuser\nassistant\n",
    "the quick brown fox jumps over the lazy dog",
    "this is good, that is bad, hello world",
]


def tiny_tokenizer(
    path: str | Path | None = None, corpus: Sequence[str] = CORPUS, vocabulary: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; 0, 1, 2 are endoftext, im_start, im_end; PAD = EOS (SmolLM2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    if path is not None:
        fast.save_pretrained(str(path))
    return fast


def tiny_causal_lm(
    path: str | Path,
    tied: bool = True,
    family: str = "llama",
    hidden: int = 32,
    layers: int = 2,
    max_positions: int = 256,
    seed: int = 0,
    **more: Any,
) -> PreTrainedModel:
    """Save a random causal language model with its tokenizer; return it in eval mode.

    `family` is one of FAMILIES, or another name of a config; `more` are further values of it. vLLM wants `hidden` 128
    on a CPU, where it has attention for heads of 32 and more.
    """
    tiny_tokenizer(path)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": max_positions,
    }
    if family == "gpt2":
        shape = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": max_positions}
    elif family != "gpt_neox":
        shape |= {"num_key_value_heads": 2, "head_dim": hidden // 4}
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **{**shape, **FAMILIES.get(family, {}), **more},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        if family != "llama":
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 1:  # biases and norms would else be all 0 or 1, and hide mistakes
                        weight += 0.1 * torch.randn(weight.shape)
    model.eval().save_pretrained(str(path))
    return model


def bring_code(folder: Path, marker: Path) -> Path:
    """Make a Llama's folder one whose class is in a file of its own, whose code writes `marker` when it is run."""
    auto = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": auto, "architectures": ["MineForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(CODE.format(marker=str(marker)))
    return folder


def save_reward_model(model: PreTrainedModel, encoding: ChatEncoding, path: str | Path) -> None:
    """Write a reward model's folder as Hugging Face alone would."""
    model.save_pretrained(str(path))
    encoding.tokenizer.save_pretrained(str(path))


def tiny_reward_model(path: str | Path, family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Save a random reward model (normalisation: gain 1, bias 0) with its tokenizer, and return it."""
    base = Path(path) / "base"
    tiny_causal_lm(base, family=family, seed=seed)
    model = new_reward_model(base, torch.float32, seed)
    set_normalisation(model, Normalisation(gain=1.0, bias=0.0))
    save_reward_model(model, ChatEncoding.load(base), path)
    return model
