"""Tiny real models: a byte-level BPE tokenizer with a ChatML template, random Llama and GPT-2 models."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, save_reward_model, set_normalisation

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320
CORPUS = [
    "system\nuser\nassistant\n",
    "the quick brown fox jumps over the lazy dog",
    "this is good, that is bad, hello world",
]


def tiny_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 320 tokens; 0, 1, 2 are endoftext, im_start, im_end; PAD = EOS (SmolLM2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
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
) -> PreTrainedModel:
    """Save a random causal language model with its tokenizer; return it in eval mode."""
    tiny_tokenizer(path)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            model: PreTrainedModel = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=hidden,
                    intermediate_size=2 * hidden,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=max_positions,
                    **common,
                )
            )
        else:
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_embd=hidden,
                    n_layer=layers,
                    n_head=4,
                    n_positions=max_positions,
                    **common,
                )
            )
    model.eval().save_pretrained(str(path))
    return model


def tiny_reward_model(path: str | Path, family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Save a random reward model (normalisation: gain 1, bias 0) with its tokenizer, and return it."""
    base = Path(path) / "base"
    tiny_causal_lm(base, family=family, seed=seed)
    model = new_reward_model(base, torch.float32, seed)
    set_normalisation(model, Normalisation(gain=1.0, bias=0.0))
    save_reward_model(model, ChatEncoding.load(base), path)
    return model
