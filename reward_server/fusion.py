"""Element-wise work in fewer passes over memory: norms and MLPs fused by torch.compile, or by Liger's kernels on GPUs.

Attention and the output layer stay as they are: theirs are fused kernels already.
"""

import logging
import os
import shutil
import sys
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)
_PIECES = ("RMSNorm", "MLP")  # how transformers' classes of them end; PyTorch's LayerNorm is fused


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use, CXX or else g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def compile_pieces(model: "PreTrainedModel") -> None:
    """Have torch.compile fuse the model's norms and MLPs, in place; the compiler runs when they are first used.

    One compilation serves all layers and any number of tokens. Whole layers gain no more: attention within each
    sequence breaks their graph, and with gradients they round otherwise than without, so that the ratio of PPO's first
    minibatch would not be 1. Without a compiler, or norms and MLPs by these names, the model stays as it is, and a line
    of the log says so.
    """
    import torch

    pieces = [module for module in model.modules() if type(module).__name__.endswith(_PIECES)]
    name = type(model).__name__
    if not pieces or not cpp_compiler():
        why = f"no C++ compiler ({os.environ.get('CXX') or 'g++'}) is there" if pieces else "it has none by these names"
        _logger.warning("%s: norms and MLPs are not compiled: %s", name, why)
        return
    compiled, compilation = dict[type, Any](), cast(Any, torch.compile)  # its annotations lack options
    for module in pieces:
        kind: Any = type(module)
        if kind not in compiled:
            compiled[kind] = compilation(
                kind.forward,
                dynamic=True,
                isolate_recompiles=True,  # other networks of this class do not use up its recompilations
                options={"emulate_precision_casts": True},  # what is fused is rounded as it is when it is not
            )
        module.forward = MethodType(compiled[kind], module)
    _logger.info("%s: %d norms and MLPs are compiled when they are first used", name, len(pieces))


def apply_liger(model: "PreTrainedModel") -> None:
    """Put Liger's kernels into the model's norms and MLPs, in place. They compute on GPUs alone.

    Raises ImportError without the package, and ValueError for a family of models that it has no kernels for.
    """
    from transformers.integrations.liger import apply_liger_kernel

    modeling: Any = vars(sys.modules[type(model).__module__])
    before, forwards = dict(modeling), _forwards(model)
    # Its rotary embedding would be for every model of the process, as the classes are that are put back here; its
    # losses read logits, which `LogprobHead` has none of.
    apply_liger_kernel(model, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})
    modeling.update(before)
    if _forwards(model) == forwards:
        raise ValueError(
            f"Liger has no kernels for {type(model).__name__}: set network.liger to false (network.compile fuses the "
            "norms and MLPs of any family)"
        )


def _forwards(model: "PreTrainedModel") -> list[Any]:
    return [getattr(module.forward, "__func__", module.forward) for module in model.modules()]
