"""The frozen first layers that networks have in common, computed once a micro-batch: a "hydra", as trlX calls it.

While a network reads what its trunk's output is known of, a stand-in for each of these layers gives that output. All
else in the model runs as it does without: embeddings are looked up, positions and masks made. So no family of models
needs code here, and one that is not bitwise the same on a probe shares nothing.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from reward_server.packing import hidden_states

_logger = logging.getLogger(__name__)
_Known = dict[str, Tensor]  # the output of each trunk, by the name of the first network that has it


class Trunk:
    """The first layers of a network, in which nothing is trained."""

    def __init__(self, model: PreTrainedModel, depth: int | None = None) -> None:
        """Of the first `depth` layers; else of those below all that is trained (0 where that is not a layer)."""
        self.model, body = model, model.base_model
        count = model.config.get_text_config().num_hidden_layers
        lists = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        self._path, self._layers = lists[0] if lists else ("", nn.ModuleList())
        trained = [self._layer(name) or 0 for name, p in body.named_parameters() if p.requires_grad]
        self.depth = min([*trained, len(self._layers)]) if depth is None else depth

    @contextlib.contextmanager
    def given(self, known: _Known, name: str) -> Iterator[None]:
        """Within it these layers give `known[name]`, or are computed and their output is kept there."""
        mine = list(self._layers)[: self.depth]
        for index, layer in enumerate(mine):
            if name in known or index == self.depth - 1:
                self._layers[index] = _StandIn(layer, known, name)
        try:
            yield
        finally:
            for index, layer in enumerate(mine):
                self._layers[index] = layer

    def same_as(self, other: "Trunk") -> bool:
        """Whether both compute bitwise the same: the same code, settings and weights."""
        mine, theirs = self._weights(), other._weights()
        return (
            self._settings() == other._settings()
            and mine.keys() == theirs.keys()
            and all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
        )

    def works(self) -> bool:
        """Whether the model gives bitwise the same with its trunk's output given, twice, as without."""
        device, size = next(self.model.parameters()).device, self.model.config.get_text_config().vocab_size
        ids, known = torch.arange(1, 9, device=device) * 7919 % size, _Known()
        try:
            with torch.no_grad():
                expected = hidden_states(self.model, ids, [3, 5])
                for _ in range(3):
                    with self.given(known, ""):
                        if not hidden_states(self.model, ids, [3, 5]).equal(expected):
                            return False
        except Exception as error:  # what its forward pass asks of a layer is its own
            _logger.info("%s with its first layers' output given: %s", type(self.model).__name__, error)
            return False
        return True

    def _layer(self, name: str) -> int | None:
        """The layer that a parameter or buffer is in; None outside of all."""
        inside = name.removeprefix(f"{self._path}.")
        return int(inside.partition(".")[0]) if self._path and inside != name else None

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of these layers, and of what is outside of all layers."""
        body = self.model.base_model
        named = [*body.named_parameters(), *body.named_buffers()]
        return {name: tensor for name, tensor in named if (self._layer(name) or 0) < self.depth}

    def _settings(self) -> tuple[Any, ...]:
        config, common = self.model.config.get_text_config(), PreTrainedConfig().to_dict()
        other = ("_token_id", "use_cache", "rayward_normalisation")  # what heads and tokenizers want to know
        fields = {key: value for key, value in config.to_dict().items() if not (key in common or key.endswith(other))}
        model, modules = self.model, self.model.base_model.named_modules()
        code = [  # of each module, its class's or what fuses it (`reward_server.fusion`)
            (name, type(module), "forward" in vars(module), module.forward.__module__)
            for name, module in modules
            if (self._layer(name) or 0) < self.depth
        ]
        return code, model.dtype, model.config._attn_implementation, self.depth, fields


class _StandIn(nn.Module):
    """In the place of a layer: gives what is known, or what the layer computes, which is known from then on.

    What is kept lies in main memory, since a batch of it may be larger than what else a device holds.
    """

    def __init__(self, layer: nn.Module, known: _Known, name: str) -> None:
        super().__init__()
        self.__dict__["layer"], self.known, self.name = layer, known, name  # no child: its weights are the model's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # a model may ask its layer for more than its output

    def forward(self, hidden: Tensor, *args: Any, **settings: Any) -> Tensor:
        if self.name not in self.known:
            output = self.layer(hidden, *args, **settings)
            self.known[self.name] = output.detach().cpu()
            return output
        return self.known[self.name].to(hidden.device)


class SharedTrunks:
    """The trunks of a rank's networks, and what they gave for the sequences of a batch so far."""

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self.trunks = shared_trunks(models)
        self._known: dict[tuple[bytes, ...], _Known] = {}

    def given(self, name: str, sequences: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Within it a network that reads these sequences computes its trunk only where none has done so before."""
        if name not in self.trunks:
            return contextlib.nullcontext()
        first, trunk = self.trunks[name]
        return trunk.given(self._known.setdefault(_key(sequences), {}), first)

    def forget(self, sequences: Sequence[Tensor] | None = None) -> None:
        """Let go of what was given for these sequences, or for all."""
        if sequences is None:
            self._known.clear()
        else:
            self._known.pop(_key(sequences), None)


def _key(sequences: Sequence[Tensor]) -> tuple[bytes, ...]:
    return tuple(ids.numpy().tobytes() for ids in sequences)


def shared_trunks(models: Mapping[str, PreTrainedModel]) -> dict[str, tuple[str, Trunk]]:
    """The trunk of each network that has one, with the name of the first network that has the same.

    A network that is only read has that of a trained one, or none: it reads nothing twice. A line of the log says who
    shares what.
    """
    if any(hasattr(p, "ds_id") for model in models.values() for p in model.parameters()):
        _logger.info("ZeRO 3 gathers weights in the order of the passes before: no layers are shared")
        return {}
    found: dict[str, tuple[str, Trunk]] = {}
    only_read = {name for name, model in models.items() if not any(p.requires_grad for p in model.parameters())}
    for name in sorted(models, key=only_read.__contains__):
        own = Trunk(models[name])
        firsts = {first: trunk for key, (first, trunk) in found.items() if key == first}
        trunks = [(first, Trunk(models[name], min(own.depth, trunk.depth))) for first, trunk in firsts.items()]
        same = [(first, trunk) for first, trunk in trunks if trunk.same_as(firsts[first])]
        same += [] if name in only_read or not own.depth else [(name, own)]
        if same and same[0][1].works():
            found[name] = same[0]
    for first in dict.fromkeys(first for first, _ in found.values()):
        names = " and ".join(name for name, (other, _) in found.items() if other == first)
        _logger.info("the first %d layers of %s are computed once a batch", found[first][1].depth, names)
    return found
