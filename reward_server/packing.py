"""Sequences one after the other in one row, without padding: positions start anew, attention stays within each.

Variable-length flash attention does that on GPUs that have it. Elsewhere torch's fused attention is called for each
sequence, so there is never a mask over the whole row. A family of models that cannot be packed is padded.
"""

import logging
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available

_logger = logging.getLogger(__name__)
_BY_SEQUENCE = "sdpa_by_sequence"
_FLASH = "flash_attention_2"


def pack(model: PreTrainedModel) -> PreTrainedModel:
    """Have the model read packed rows if it gives each sequence in one what it gives the sequence alone.

    Otherwise it stays as it was loaded, `hidden_states` pads for it, and a line of the log says so.
    """
    before = model.config._attn_implementation or "eager"
    if not _try_packing(model):
        if packs(model):
            model.set_attn_implementation(before)
        _logger.warning("%s cannot read packed sequences: its batches are padded", type(model).__name__)
        return model
    flash = torch.cuda.is_available() and is_flash_attn_2_available() and model._supports_flash_attn
    if flash and model.dtype != torch.float32:
        model.set_attn_implementation(_FLASH)
    _logger.info("%s reads packed sequences: %s", type(model).__name__, model.config._attn_implementation)
    return model


def packs(model: PreTrainedModel) -> bool:
    """Whether the model reads packed rows."""
    return model.config._attn_implementation in (_BY_SEQUENCE, _FLASH)


def hidden_states(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states, [N, d], of sequences of `lengths` tokens that lie one after the other in ids, i64 [N]."""
    if packs(model):
        flash = model.config._attn_implementation == _FLASH
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device if flash else "cpu")
        longest = max(lengths)
        return model.base_model(
            input_ids=ids[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(ids.device),
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]
    # Padded on the right: under a causal mask nothing before the padding sees it, and positions count from 0.
    rows = nn.utils.rnn.pad_sequence(list(ids.split(list(lengths))), batch_first=True)
    real = torch.arange(rows.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    return model.base_model(input_ids=rows, use_cache=False).last_hidden_state[real]


def _try_packing(model: PreTrainedModel) -> bool:
    """Compare two sequences in one row with each alone; leaves the model reading packed rows."""
    ids = torch.arange(1, 9, device=next(model.parameters()).device) * 7919 % model.config.get_text_config().vocab_size
    with torch.no_grad():
        alone = torch.cat([model.base_model(input_ids=part[None], use_cache=False)[0][0] for part in ids.split([3, 5])])
        if not model._can_set_attn_implementation():
            return False
        model.set_attn_implementation(_BY_SEQUENCE)
        try:
            together = hidden_states(model, ids, [3, 5])
        except (TypeError, NotImplementedError):
            return False
    bound = (1e-4 if model.dtype == torch.float32 else 5e-2) * alone.abs().max()
    return bool((together - alone).abs().max() <= bound)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [1, heads, N, d] within each sequence; without bounds, of all of [B, heads, S, d]."""
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    if attention_mask is not None or cu_seq_lens_q is None:
        return _within(module, query, key, value, attention_mask, **kwargs), None
    lengths = cu_seq_lens_q.diff().tolist()
    outputs, start = [], 0
    for length, run in groupby(lengths):  # neighbours of one length are a batch
        count = len(list(run))
        taken = slice(start, start + count * length)
        parts = [x[0, :, taken].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)]
        outputs.append(_within(module, *parts, None, **kwargs).flatten(0, 1))
        start = taken.stop
    return torch.cat(outputs)[None], None


def _within(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention of [B, heads, S, d] -> [B, S, heads, d]."""
    steps = query.shape[2]
    if mask is None and (softcap or (sliding_window and steps > sliding_window)):
        distance = torch.arange(steps, device=query.device)[:, None] - torch.arange(steps, device=query.device)
        mask = (distance >= 0) & (distance < (sliding_window or steps))
    if not softcap:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
    groups = query.shape[1] // key.shape[1]  # Gemma 2 caps its logits, which fused attention cannot
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = ((logits / softcap).tanh() * softcap).masked_fill(~mask, float("-inf"))  # pyright: ignore
    return (logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2)


AttentionInterface.register(_BY_SEQUENCE, _attend)
