"""Where DeepSpeed keeps this rank's gradients and float32 weights, which depends on the ZeRO stage and on the dtype.

All that is known here of the insides of DeepSpeed's optimizers (0.19); none of it is written to but gradients in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def master_weights(optimizer: Any, trained: Sequence[nn.Parameter]) -> list[Tensor]:
    """The float32 weights that this rank's Adam updates: a flat partition at ZeRO 1 to 3, else all parameters."""
    for flat in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, flat):
            return [partition.data for partition in getattr(optimizer, flat)]
    return [parameter.data for parameter in trained]


def gradients(optimizer: Any, trained: Sequence[nn.Parameter]) -> list[Tensor]:
    """Where the gradients of this step add up on this rank: writing to them in place changes the step.

    ZeRO 2 and 3: its partition of the mean over ranks. ZeRO 0 and 1: all of this rank's own gradients, not reduced
    yet. What no loss has reached is zeros.
    """
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # ZeRO 3
        return [optimizer.grad_partitions_flat_buffer]
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # ZeRO 1, bfloat16
        return optimizer.fp32_groups_gradients_flat
    if getattr(optimizer, "partition_gradients", False):  # ZeRO 2
        return [part for group in range(len(optimizer.bit16_groups)) for part in _stage_2(optimizer, group)]
    place = "grad_accum" if getattr(optimizer, "use_grad_accum_attribute", False) else "grad"
    for parameter in trained:
        if getattr(parameter, place) is None:
            setattr(parameter, place, torch.zeros_like(parameter, dtype=torch.float32))
    return [getattr(parameter, place) for parameter in trained]


def clear_leftovers(optimizer: Any) -> None:
    """After a step: forget gradients that the next step might not overwrite, of parameters that no loss reaches."""
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # ZeRO 3
        optimizer.grad_partitions_flat_buffer.zero_()


def _stage_2(optimizer: Any, group: int) -> list[Tensor]:
    if optimizer._use_compact_grad_partition_buffer(group):  # float32 beside bfloat16 weights
        return [optimizer._get_compact_grad_partition_buffer(group).flat_partition]
    parameters = optimizer.params_in_partition[group]
    if optimizer.cpu_offload:
        found = []
        for parameter in parameters:
            key = optimizer.get_param_id(parameter)
            _, start, _, size = optimizer.grad_position[key]
            whole = optimizer.accumulated_grads_in_cpu.get(key)
            found.append(torch.zeros(size) if whole is None else whole.view(-1).narrow(0, start, size))
        return found
    if optimizer.all_grad_tensors.get(group) is None:
        optimizer.all_grad_tensors[group] = optimizer.get_all_grad_tensors(parameters, dtype=torch.float32)
    return optimizer.get_flat_partition(
        parameters,
        optimizer.first_offset[group],
        optimizer.partition_size[group],
        dtype=torch.float32,
        device=parameters[0].device if parameters else "cpu",
        param_group_idx=group,
        return_tensor_list=True,
    )
