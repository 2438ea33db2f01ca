"""The rows of the benchmark: what each divides by what, the least that the ratio should be, and what limits it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Found = Mapping[str, Mapping[str, float]]
"""Figures by side and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A ratio of two figures of one repeat; the larger the better."""

    name: str
    value: str
    """what is above the line, with its unit"""
    denominator: str
    """what is below it, measured in the same repeat"""
    goal: float | None
    """least ratio that is aimed at; None: it is reported only"""
    sides: tuple[str, ...]
    """what has to be measured; see `benchmarks/sides.py`"""
    ratio: Callable[[Found], tuple[float, float]]
    """value and denominator"""
    limit: str
    """what keeps it from more"""


def _learner(one: Mapping[str, float]) -> float:
    return one["evaluate"] + one["update"]


def _serial(found: Found) -> float:
    return found["vllm"]["seconds"] + found["torch"]["score"] + _learner(found["torch"])


def _parallel(found: Found) -> float:
    return max(found["vllm_one"]["seconds"] + found["torch_one"]["score"], _learner(found["torch_one"]))


ROWS = (
    Row(
        name="rollout",
        value="two bare vLLM engines, a core each, s",
        denominator="rollout phase, scores included, s",
        goal=0.9,
        sides=("ppo", "vllm"),
        ratio=lambda s: (s["vllm"]["seconds"], s["ppo"]["time/rollout"]),
        limit="scores, which take the same two cores for more than half of what the engines take",
    ),
    Row(
        name="learner",
        value="plain PyTorch: evaluate and update, s",
        denominator="the same in the running system, s",
        goal=1.0,
        sides=("ppo", "torch"),
        ratio=lambda s: (_learner(s["torch"]), s["ppo"]["time/evaluate"] + s["ppo"]["time/update"]),
        limit="float32 gradients, master weights and moving average, which plain PyTorch has not",
    ),
    Row(
        name="trl",
        value="an update of TRL 1.12.0's PPO, s",
        denominator="a step of ours, s",
        goal=1.5,
        sides=("ppo", "trl"),
        ratio=lambda s: (s["trl"]["update"], s["ppo"]["step"]),
        limit="arithmetic that both do: matrix products and attention are three quarters of the learner's time",
    ),
    Row(
        name="padding",
        value="tokens of 64 log-normal sequences",
        denominator="tokens of time on 1 to 8 ranks, the worst",
        goal=0.95,
        sides=("padding",),
        ratio=lambda s: (s["padding"]["useful"], s["padding"]["spent"]),
        limit="the longest sequence, which is not cut",
    ),
    Row(
        name="packing",
        value="speed of evaluate and update, packed by padded",
        denominator="tokens computed, padded by packed",
        goal=0.9,
        sides=("padding",),
        ratio=lambda s: (s["padding"]["padded"] / s["padding"]["packed"], s["padding"]["padding"]),
        limit="the optimizer, which padding does not slow",
    ),
    Row(
        name="publish",
        value="copying the weights in memory once, s",
        denominator="their transfer to two engines, checksums included, s",
        goal=0.2,
        sides=("ppo", "copies"),
        ratio=lambda s: (s["ppo"]["publish/bytes"] / s["copies"]["gb_s"] / 1e9, s["ppo"]["publish/transfer_s"]),
        limit="checksums on both sides and the loopback; 54 MB are copied in a few ms",
    ),
    Row(
        name="step",
        value="engines, scores and learner alone, one after the other, s",
        denominator="synchronous step, s",
        goal=0.87,
        sides=("ppo", "vllm", "torch"),
        ratio=lambda s: (_serial(s), s["ppo"]["step"]),
        limit="publishing, of which the bound has nothing, and what limits rollout and learner",
    ),
    Row(
        name="async",
        value="engine and scores, or learner, a core each, the longer, s",
        denominator="asynchronous step, s",
        goal=0.85,
        sides=("ppo_async", "vllm_one", "torch_one"),
        ratio=lambda s: (_parallel(s), s["ppo_async"]["step"]),
        limit="publishing, of which the bound has nothing",
    ),
    Row(
        name="workers",
        value="rollout phase of one actor on one core, 16 prompts, s",
        denominator="that of two actors on two cores, 32 prompts, s",
        goal=0.85,
        sides=("ppo_half", "ppo"),
        ratio=lambda s: (s["ppo_half"]["time/rollout"], s["ppo"]["time/rollout"]),
        limit="memory and caches that both cores share",
    ),
    Row(
        name="control",
        value="samples/s of 64 fake engines of a sample a ms",
        denominator="twice those of one",
        goal=1.0,
        sides=("control_1", "control_64"),
        ratio=lambda s: (s["control_64"]["samples_s"], 2 * s["control_1"]["samples_s"]),
        limit="the controller's one Python thread",
    ),
    Row(
        name="service",
        value="responses/s of the reward service, 8 clients",
        denominator="those of the bare reward model",
        goal=0.9,
        sides=("service",),
        ratio=lambda s: (s["service"]["served"], s["service"]["bare"]),
        limit="clients and service share the two cores",
    ),
    Row(
        name="checkpoint",
        value="synchronous step, s",
        denominator="the same with a checkpoint before it, s",
        goal=0.95,
        sides=("ppo",),
        ratio=lambda s: (s["ppo"]["step"], s["ppo"]["step_saving"]),
        limit="training waits for the disk; by default every tenth step saves",
    ),
    Row(
        name="recovery",
        value="start of a bare engine, s",
        denominator="from SIGKILL of an actor to its replacement's first sample, s",
        goal=None,
        sides=("ppo_killed", "vllm_one"),
        ratio=lambda s: (s["vllm_one"]["start"], s["ppo_killed"]["recovery"]),
        limit="the pause before a replacement, the process's start, a publication and the sampling itself",
    ),
    Row(
        name="cold",
        value="start of two bare engines, s",
        denominator="from `rayward ppo` to the end of its first update, s",
        goal=0.83,
        sides=("ppo", "vllm"),
        ratio=lambda s: (s["vllm"]["start"], s["ppo"]["first_update"]),
        limit="imports of five processes and two engines on two cores, Ray, and the first step itself",
    ),
    Row(
        name="memory",
        value="memory for log-probs of 2,048 tokens of 151,936, all logits at once, bytes",
        denominator="in chunks of 256, bytes",
        goal=4.0,
        sides=("logprobs", "logprobs_whole"),
        ratio=lambda s: (s["logprobs_whole"]["bytes"], s["logprobs"]["bytes"]),
        limit="the gradient of the head, in float32, which both have",
    ),
)
