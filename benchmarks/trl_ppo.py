"""Seconds of an update of TRL's PPO on the workload in FOLDER, with the hyper-parameters of `benchmarks/sides.py`.

    .venv-trl/bin/python benchmarks/trl_ppo.py FOLDER

All 32 responses are sampled, evaluated and trained on in one pass each, which is TRL's fastest here; no response is cut
off, nothing is recomputed, nothing is logged elsewhere.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

EPISODES, RESPONSE_TOKENS, WARM_UP, STEPS = 32, 64, 2, 5


class Clock(TrainerCallback):
    """Notes when each update ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_, **__) -> None:
        """Note the time."""
        self.ends.append(time.monotonic())


def main() -> None:
    """Train, and print the median."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.bfloat16) for _ in "ab")
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, dtype=torch.bfloat16)
        for _ in "ab"
    )
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=EPISODES,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        local_rollout_forward_batch_size=EPISODES,
        num_ppo_epochs=1,
        num_mini_batches=1,
        total_episodes=EPISODES * (WARM_UP + STEPS),
        response_length=RESPONSE_TOKENS,
        temperature=1.0,
        kl_coef=0.02,
        learning_rate=1e-6,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    queries = json.loads((folder / "queries.json").read_text())
    clock = Clock()
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": queries}),
        eval_dataset=Dataset.from_dict({"input_ids": queries[:EPISODES]}),
        callbacks=[clock],
    ).train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    print(json.dumps({"update": statistics.median(seconds[WARM_UP - 1 :])}))


if __name__ == "__main__":
    main()
