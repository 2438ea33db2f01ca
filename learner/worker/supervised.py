"""What a rank does for supervised fine-tuning and reward modelling: language-model and K-wise ranking steps."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from actors.chat import ChatExample
from learner.maths.losses import kwise_loss, lm_loss_sum
from learner.worker.dropout import training_mode
from learner.worker.networks import ValueNetwork
from learner.worker.rank import Rank
from reward_server.model import Normalisation, set_normalisation


class SupervisedRank(Rank):
    """One rank's part of the steps on examples that people wrote or ranked."""

    def language_model_loss(self, name: str, examples: Sequence[ChatExample], max_tokens: int) -> dict[str, float]:
        """Sums of negative log-likelihood (nats) and of targets over this rank's share of `examples`."""
        total = 0.0
        with torch.no_grad():
            for micro in self._share([len(e.ids) for e in examples], max_tokens):
                if micro:
                    total += self._nll(name, [examples[i] for i in micro]).item()
                else:
                    self._idle(name)
        return {"nll": total}

    def language_model_step(
        self, name: str, examples: Sequence[ChatExample], max_tokens: int, lr: float
    ) -> dict[str, float]:
        """One optimizer step on the mean negative log-likelihood over all targets of `examples`, dropout on."""
        with training_mode(self._held(name).module):
            total = self._backward_language_model(name, examples, max_tokens, 1.0 / targets_of(examples))
        return self._stepped(name, lr, {"nll": total}, "")

    def _backward_language_model(
        self, name: str, examples: Sequence[ChatExample], max_tokens: int, scale: float
    ) -> float:
        total = 0.0
        for micro in self._share([len(e.ids) for e in examples], max_tokens):
            if not micro:
                self._idle(name)
                continue
            loss = self._nll(name, [examples[i] for i in micro])
            self._engines[name].backward(loss * scale)
            total += loss.item()
        return total

    def _nll(self, name: str, examples: Sequence[ChatExample]) -> Tensor:
        ids = _right_padded([e.ids for e in examples])
        mask = _right_padded([e.loss_mask for e in examples]).bool()
        rows, ends = mask.nonzero(as_tuple=True)
        logprobs, _ = self._call(name, ids, rows, ends - 1, ids[rows, ends])
        return lm_loss_sum(logprobs, torch.ones_like(logprobs, dtype=torch.bool))

    def ranking_step(
        self,
        name: str,
        groups: Sequence[Sequence[tuple[int, ...]]],
        ranks: Sequence[Sequence[int]],
        normaliser: Literal["pairs", "all"],
        max_tokens: int,
        lr: float,
    ) -> dict[str, float]:
        """One optimizer step of the K-wise loss: all completions of a prompt in one batch element, one forward each."""
        prompts = sum(len(set(r)) > 1 for r in ranks)
        sums: dict[str, float] = {"loss": 0.0}
        for micro in self._share([len(g) * max(map(len, g)) for g in groups], max_tokens):
            if not micro:
                self._idle(name)
                continue
            group = torch.tensor([i for i in micro for _ in groups[i]])
            order = torch.tensor([rank for i in micro for rank in ranks[i]])
            scores = self._last_values(name, [ids for i in micro for ids in groups[i]])
            loss, _, stats = kwise_loss(scores, group.to(scores.device), order.to(scores.device), normaliser)
            self._engines[name].backward(loss / max(prompts, 1))
            add_sums(sums, {"loss": loss.item(), **floats(stats)})
        return self._stepped(name, lr, sums, "")

    def last_values(self, name: str, sequences: Sequence[tuple[int, ...]], max_tokens: int) -> Tensor:
        """Value at the last token of each sequence, f32 [N], 0 for those that are another rank's."""
        values = torch.zeros(len(sequences))
        with torch.no_grad():
            for micro in self._share([len(s) for s in sequences], max_tokens):
                if micro:
                    values[micro] = self._last_values(name, [sequences[i] for i in micro]).cpu()
                else:
                    self._idle(name)
        return values

    def normalise(self, name: str, gain: float, bias: float) -> None:
        """Store the reward model's normalisation with it."""
        network = self._held(name).module
        assert isinstance(network, ValueNetwork), name
        network.gain, network.bias = gain, bias
        set_normalisation(network.model, Normalisation(gain=gain, bias=bias))

    def _last_values(self, name: str, sequences: Sequence[tuple[int, ...]]) -> Tensor:
        ends = torch.tensor([len(s) - 1 for s in sequences])
        return self._call(name, _right_padded(sequences), torch.arange(len(sequences)), ends)

    def _stepped(self, name: str, lr: float, sums: dict[str, float], suffix: str) -> dict[str, float]:
        """Take the optimizer step: `sums` with its gradient norm, or no sums but that and why it was skipped."""
        norm = self._engines[name].step(lr)
        if norm is not None:
            return {f"grad_norm{suffix}": norm / self.world_size} | sums
        told = ("nll", "loss", "grad_norm")
        culprits = [key for key, value in sums.items() if key.startswith(told) and not math.isfinite(value)]
        times = {key: value for key, value in sums.items() if key.startswith("time/")}
        return {
            f"skipped{suffix}": 1.0 / self.world_size,
            **{f"nonfinite{suffix}/{key}": 1.0 for key in culprits},
        } | times


def _right_padded(sequences: Sequence[Sequence[int] | Sequence[bool]]) -> Tensor:
    """[B, S] with zeros to the right; the value never matters, since nothing before the padding sees it."""
    width = max(map(len, sequences))
    return torch.tensor([[*map(int, s), *[0] * (width - len(s))] for s in sequences])


def targets_of(examples: Sequence[ChatExample]) -> int:
    """How many tokens of the examples are trained."""
    return sum(sum(example.loss_mask) for example in examples)


def floats(stats: dict[str, Tensor]) -> dict[str, float]:
    """Statistics as numbers."""
    return {key: float(value) for key, value in stats.items()}


def add_sums(sums: dict[str, float], more: dict[str, float]) -> None:
    """Add numbers to those of the same name, in place."""
    for key, value in more.items():
        sums[key] = max(sums.get(key, value), value) if key.endswith("/max") else sums.get(key, 0.0) + value
