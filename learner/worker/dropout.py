"""Residual dropout: on what attention and MLP of each layer add to the residual stream, whatever the architecture.

InstructGPT trains its SFT models with 0.2 of it (appendix C.1). Most open models have no dropout in their code, and a
network here is always in eval mode, so it is attached by hooks and switched on for a training step alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_ATTENTION = ("self_attn", "attention", "attn")
_MLP = ("mlp", "block_sparse_moe", "feed_forward")
_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")  # of branches, where both are there (Gemma 2)


class ResidualDropout(nn.Dropout):
    """The dropout of one layer; off unless `training_mode` switches it on."""

    def of_output(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """A forward hook: drop from the output, or from the first of several (attention gives its weights too)."""
        if isinstance(output, Tensor):
            return self(output)
        return (self(output[0]), *output[1:])


def add_residual_dropout(model: PreTrainedModel, share: float) -> None:
    """Attach dropout of `share` to both branches of every layer, switched off. It has no weights and is not saved.

    Raises ValueError for an architecture whose layers are not found.
    """
    layers = [layer for layer in model.modules() if _branches(layer)]
    count = model.config.get_text_config().num_hidden_layers
    if len(layers) != count:
        raise ValueError(
            f"residual dropout found attention and MLP in {len(layers)} layers of {type(model).__name__}, which has "
            f"{count}; set residual_dropout to 0 for this architecture"
        )
    for layer in layers:
        dropout = ResidualDropout(share).eval()
        for branch in _branches(layer):
            branch.register_forward_hook(dropout.of_output)
        layer.add_module("residual_dropout", dropout)


@contextlib.contextmanager
def training_mode(network: nn.Module) -> Iterator[None]:
    """Switch residual dropout on inside the block, and nothing else: a model's own dropouts stay off."""
    dropouts = [module for module in network.modules() if isinstance(module, ResidualDropout)]
    for dropout in dropouts:
        dropout.train()
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.eval()


def _branches(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The two modules whose output is added to the residual stream; none when `layer` is not a layer."""
    children = dict(layer.named_children())
    found = [next((children[name] for name in names if name in children), None) for names in (_ATTENTION, _MLP)]
    if None in found:
        return ()
    if all(name in children for name in _NORMS):
        return tuple(children[name] for name in _NORMS)
    return tuple(module for module in found if module is not None)
