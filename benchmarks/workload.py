"""What every row works on: W-small, Qwen2's shape with 27 million parameters, and prompts of 64 tokens each.

All of it is made here, with random weights and a byte-level tokenizer of 8,192 tokens. Responses have 64 tokens too: a
random model ends one in a hundred early.
"""

import json
import random
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from reward_server.schema import Message
from tests.tiny_models import save_reward_model, tiny_tokenizer

EPISODES, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 64, 64
TOKENS_PER_PASS = EPISODES * (PROMPT_TOKENS + RESPONSE_TOKENS)
VOCABULARY = 8192
POLICY_LR, CRITIC_LR, BETA = 1e-6, 1e-6, 0.02


def make(folder: Path) -> None:
    """Write policy and reward model, prompts, and the ids of the prompts as the policy is asked."""
    save_models(folder)
    encoding, words, draw = ChatEncoding.load(folder / "policy"), _words(), random.Random(1)
    single = [word for word in words if len(encoding.tokenizer.encode(f" {word}")) == 1]
    texts = [_prompt(encoding, draw.choices(single, k=PROMPT_TOKENS)) for _ in range(8 * EPISODES)]
    rows = [json.dumps({"id": str(number), "prompt": text}) + "\n" for number, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "heldout.jsonl").write_text(rows[0])
    (folder / "text.jsonl").write_text(json.dumps({"text": " ".join(texts[:4])}) + "\n")
    ids = [encoding.prompt([Message(role="user", content=text)]) for text in texts]
    (folder / "queries.json").write_text(json.dumps(ids))


def save_models(folder: Path) -> None:
    """Write a policy and a reward model with random weights, and their tokenizer."""
    tiny_tokenizer(folder / "policy", [" ".join(_words())], VOCABULARY)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    config = Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=4096, **shape, **tokens)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "policy")
    reward = new_reward_model(folder / "policy", torch.float32, 0)
    set_normalisation(reward, Normalisation(gain=1.0, bias=0.0))
    save_reward_model(reward, ChatEncoding.load(folder / "policy"), folder / "reward")


def queries(folder: Path) -> list[list[int]]:
    """Token ids of the prompts."""
    return json.loads((folder / "queries.json").read_text())


def _words() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(12_000)]


def _prompt(encoding: ChatEncoding, words: list[str]) -> str:
    while len(encoding.prompt([Message(role="user", content=" ".join(words))])) > PROMPT_TOKENS:
        words.pop()
    return " ".join(words)
