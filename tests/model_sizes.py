"""Models of a size at which a layer's work outweighs what is done around it, for tests that measure."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from tests.tiny_models import save_reward_model, tiny_tokenizer


def save_policy_and_reward(path: Path) -> Path:
    """A policy and a reward model of 19 million parameters in `path`/policy and `path`/reward; returns `path`."""
    tiny_tokenizer(path / "policy")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12_000,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=7,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(path / "policy")
    reward = new_reward_model(path / "policy", torch.float32, 0)
    set_normalisation(reward, Normalisation(gain=1.0, bias=0.0))
    save_reward_model(reward, ChatEncoding.load(path / "policy"), path / "reward")
    return path
