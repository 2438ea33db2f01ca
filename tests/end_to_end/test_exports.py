"""What a run writes, as others read it: transformers, vLLM and TRL take the folders as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from actors.chat import chat_example
from learner.config import NetworkConfig, OptimizerConfig
from learner.worker.worker import LearnerWorker
from reward_server.encoding import ChatEncoding
from reward_server.model import load_reward_model
from reward_server.schema import Message
from reward_server.scorer import raw_scores
from tests.tiny_models import tiny_causal_lm

pytestmark = pytest.mark.slow

FULL = NetworkConfig(dtype="float32")
LORA = NetworkConfig(dtype="float32", lora_rank=4)
ADAM = OptimizerConfig(lr=1e-2)
CONVERSATIONS = [("hello", "good"), ("the fox?", "the quick brown fox jumps"), ("is it bad", "no, good"), ("x", "lazy")]
PROMPTS = [(Message(role="user", content=question),) for question, _ in CONVERSATIONS]
WORSE = ["bad", "dog", "that is bad, bad, bad", ""]

VLLM = {
    "OMP_NUM_THREADS": "2",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """Folders as the stages write them, with what the networks said before they were written."""

    root: Path
    """holds sft, policy, policy_ema and reward"""
    encoding: ChatEncoding
    """of all of them"""
    sequences: list[list[int]]
    """token ids of eight conversations: the four better replies, then the four worse"""
    logprobs: list[list[float]]
    """of the policy, of every token of the sequences after the first"""
    raw: list[float]
    """output of the reward model's head at the last token of each sequence"""

    def texts(self) -> list[str]:
        """The sequences as text."""
        return [self.encoding.tokenizer.decode(ids) for ids in self.sequences]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    """A step of each stage, the policy's and the reward model's with LoRA, which is merged when they are written."""
    root = tmp_path_factory.mktemp("exports")
    tiny_causal_lm(root / "base", hidden=128)  # vLLM's attention on a CPU wants heads of 32
    encoding = ChatEncoding.load(root / "base")
    replies = [*(reply for _, reply in CONVERSATIONS), *WORSE]
    examples = [chat_example(encoding, p, r, 100) for p, r in zip([*PROMPTS, *PROMPTS], replies, strict=True)]
    sequences = [list(example.ids) for example in examples]
    rank = LearnerWorker(rank=0, world_size=1, threads=1)
    rank.start(*rank.meeting_point(loopback=True), deadline_s=60)
    rank.load("sft", "policy", root / "base", FULL, ADAM)
    rank.language_model_step("sft", examples[:4], 400, lr=1e-3)
    rank.save("sft", root / "sft")
    rank.load("policy", "policy", root / "sft", LORA, ADAM, ema_decay=0.5)
    rank.language_model_step("policy", examples[:4], 400, lr=1e-2)
    rank.save("policy", root / "policy")
    rank.save("policy", root / "policy_ema", ema=True)
    rank.load("reward", "new_value", root / "sft", LORA, ADAM)
    pairs = [(tuple(a), tuple(b)) for a, b in zip(sequences[:4], sequences[4:], strict=True)]
    rank.ranking_step("reward", pairs, [(0, 1)] * 4, [1.0] * 4, "pairs", 400, lr=1e-2)
    raw = rank.last_values("reward", [tuple(ids) for ids in sequences], 400).tolist()
    rank.normalise("reward", 2.0, -0.5)
    rank.save("reward", root / "reward")
    yield Exports(root=root, encoding=encoding, sequences=sequences, logprobs=rank.probe_logprobs(sequences), raw=raw)
    rank.unload()


def loaded(auto: Any, folder: Path) -> PreTrainedModel:
    """A model in the type it was written in, of whose weights none is missing and none left over."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", ["sft", "policy", "policy_ema"])
def test_a_written_policy_chats_in_transformers(exports: Exports, name: str) -> None:
    model = loaded(AutoModelForCausalLM, exports.root / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(exports.root / name)
    chat = [{"role": "user", "content": "the fox?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == exports.encoding.prompt(PROMPTS[1])
    ids = list(prompt)
    while len(ids) < len(prompt) + 12 and ids[-1] != exports.encoding.eos_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    chatting: Any = pipeline("text-generation", model=str(exports.root / name))
    (said,) = chatting(chat, max_new_tokens=12, max_length=None, do_sample=False)
    assert said["generated_text"][-1] == {"role": "assistant", "content": exports.encoding.text(ids[len(prompt) :])}


def test_the_written_policies_are_the_networks_that_were_trained(exports: Exports) -> None:
    """The policy's log-probs are those of the network with its adapters; its average lies between start and end."""
    weights = {}
    for name in ("sft", "policy", "policy_ema"):
        model = loaded(AutoModelForCausalLM, exports.root / name)
        weights[name] = model.get_parameter("model.layers.1.mlp.up_proj.weight").detach()
        if name == "policy":
            for ids, expected in zip(exports.sequences, exports.logprobs, strict=True):
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                found = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    moved = (weights["policy"] - weights["sft"]).abs().max()
    assert 0 < (weights["policy_ema"] - weights["sft"]).abs().max() < moved


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_written_reward_model_scores_texts_in_transformers_whatever_side_is_padded(
    exports: Exports, side: str
) -> None:
    model = loaded(AutoModelForSequenceClassification, exports.root / "reward")
    tokenizer: Any = AutoTokenizer.from_pretrained(exports.root / "reward")
    batch = tokenizer(exports.texts(), padding=True, padding_side=side, return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0]
    assert model.config.num_labels == 1
    assert model.config.rayward_normalisation == {"gain": 2.0, "bias": -0.5}
    torch.testing.assert_close(theirs, torch.tensor(exports.raw), rtol=0, atol=1e-4)
    ours = raw_scores(load_reward_model(exports.root / "reward", torch.float32), exports.sequences, 200)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(exports.raw), rtol=0, atol=1e-4)


def test_vllm_classifies_with_a_written_reward_model(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pooler takes the folder as a classifier of one label; without an activation it gives the raw output."""
    for variable, value in VLLM.items():
        monkeypatch.setenv(variable, value)
    from vllm import LLM, PoolingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        str(exports.root / "reward"),
        runner="pooling",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        disable_log_stats=True,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",  # ten seconds less to start
    )
    try:
        plain = PoolingParams(use_activation=False)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in exports.sequences]
        found = [output.outputs.probs for output in engine.classify(prompts, pooling_params=plain, use_tqdm=False)]
    finally:
        engine.llm_engine.engine_core.shutdown()
    torch.testing.assert_close(torch.tensor(found)[:, 0], torch.tensor(exports.raw), rtol=0, atol=1e-4)


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL in a process that it takes for a lone one, though the learner's rank has joined a group here."""
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    import datasets
    import trl

    datasets.disable_progress_bars()
    yield trl
    datasets.enable_progress_bars()


def settings(folder: Path) -> dict[str, Any]:
    """One step on the CPU, of all four rows, written nowhere."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def test_trl_trains_on_from_a_written_reward_model(exports: Exports, trl: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    opened = [exports.encoding.tokenizer.decode(exports.encoding.prompt(prompt)) for prompt in PROMPTS]
    better = [reply for _, reply in CONVERSATIONS]
    rows = Dataset.from_dict({"prompt": opened, "chosen": better, "rejected": WORSE})
    trainer = trl.RewardTrainer(
        model=str(exports.root / "reward"),
        args=trl.RewardConfig(**settings(tmp_path)),
        train_dataset=rows,
        eval_dataset=rows,
    )
    found = trainer.evaluate()
    raw = torch.tensor(exports.raw)
    margins = raw[:4] - raw[4:]
    assert found["eval_mean_reward"] == pytest.approx(raw.mean().item(), abs=1e-4)
    assert found["eval_min_reward"] == pytest.approx(raw.min().item(), abs=1e-4)
    assert found["eval_max_reward"] == pytest.approx(raw.max().item(), abs=1e-4)
    assert found["eval_margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert found["eval_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < found["eval_loss"]


def test_trl_trains_on_from_a_written_policy_with_the_loss_that_sft_has(
    exports: Exports, trl: Any, tmp_path: Path
) -> None:
    from datasets import Dataset

    opened = [exports.encoding.tokenizer.decode(exports.encoding.prompt(prompt)) for prompt in PROMPTS]
    rows = Dataset.from_dict({"prompt": opened, "completion": [reply for _, reply in CONVERSATIONS]})
    trainer = trl.SFTTrainer(
        model=str(exports.root / "policy"), args=trl.SFTConfig(**settings(tmp_path)), train_dataset=rows
    )
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    learnt: list[float] = []
    for (_, reply), prompt, logprobs in zip(CONVERSATIONS, PROMPTS, exports.logprobs[:4], strict=True):
        example = chat_example(exports.encoding, prompt, reply, 100)
        learnt += [value for value, target in zip(logprobs, example.loss_mask[1:], strict=True) if target]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-sum(learnt) / len(learnt), abs=1e-3)
    assert not torch.equal(before, trainer.model.get_input_embeddings().weight)
