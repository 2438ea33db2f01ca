"""A policy and a reward model with different tokenizers and templates: what passes between them is text."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from actors.config import MissingEos, RolloutConfig
from actors.prompts import Prompt, PromptStream
from actors.rollout import rollout
from actors.trajectory import Trajectory
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger
from reward_server.app import serve
from reward_server.bearer import TOKEN_VARIABLE
from reward_server.client import RewardClient
from reward_server.config import SourceConfig
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from reward_server.schema import Message
from reward_server.sources import build_source
from tests.hf_generator import HfGenerator
from tests.tiny_models import save_reward_model, tiny_causal_lm

SCALE = Normalisation(gain=1.5, bias=-0.25)
TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:' }}{% endif %}"
)
CHATS = {
    "plain": (Message(role="user", content="the quick brown fox?"),),
    "system": (Message(role="system", content="be good"), Message(role="user", content="hé 狐")),
    "turns": (
        Message(role="user", content="hello"),
        Message(role="assistant", content="hello world"),
        Message(role="user", content="is that bad?"),
    ),
}
PROMPTS = [Prompt(id=name, messages=chat, reference=None) for name, chat in CHATS.items()]


def other_reward_model(folder: Path) -> None:
    """A GPT-2 whose tokenizer has other tokens, other special ones, other ids and another template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["### user: ### assistant: ### system:", "worlds of foxes, of words, of good"] * 3, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    tiny_causal_lm(folder / "base", family="gpt2", seed=3)
    fast.save_pretrained(folder / "base")
    model = new_reward_model(folder / "base", torch.float32, seed=1)
    set_normalisation(model, SCALE)
    save_reward_model(model, ChatEncoding.load(folder / "base"), folder)


async def trajectories(policy: Path, url: str, config: RolloutConfig) -> list[Trajectory]:
    """Samples of every prompt, scored over HTTP."""
    client, stream = RewardClient(url, retry_s=30.0), PromptStream(PROMPTS, seed=0)
    buffer = Buffer(len(PROMPTS), config.samples_per_prompt, 0, ledger=Ledger(None, stream))
    generator, leave = HfGenerator(policy), asyncio.Event()
    work = rollout(generator, client, stream, buffer, generator.encoding, config, 0, leave)
    working = asyncio.create_task(work)
    try:
        return await buffer.take(60.0)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await client.close()


def test_the_score_of_a_trajectory_is_the_reward_models_own_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    tiny_causal_lm(tmp_path / "policy")
    other_reward_model(tmp_path / "reward")
    config = RolloutConfig(
        prompts_per_wave=3,
        samples_per_prompt=4,
        max_prompt_tokens=100,
        max_new_tokens=12,
        missing_eos=MissingEos(rule="none"),
    )
    server = serve(build_source(SourceConfig(dtype="float32"), tmp_path / "reward"))
    try:
        found = asyncio.run(trajectories(tmp_path / "policy", server.url, config))
    finally:
        server.close()
    assert len(found) == 12
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    policy = ChatEncoding.load(tmp_path / "policy")
    for trajectory in found:
        chat = [message.model_dump() for message in trajectory.prompt]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        text += trajectory.completion.text + ("</s>" if trajectory.completion.ended else "")
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            raw = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert trajectory.score == pytest.approx(SCALE(raw), abs=1e-4)
        assert trajectory.completion.query_ids == tuple(policy.prompt(trajectory.prompt))
        assert ids != [*trajectory.completion.query_ids, *trajectory.completion.response_ids]
    assert len({round(trajectory.score, 3) for trajectory in found}) > 6
    assert {trajectory.completion.ended for trajectory in found} == {True, False}
