"""A model of which each process has a part, for training what does not fit one GPU (setting `shard`).

    torchrun --nproc_per_node=8 train.py --shard True --gradient_accumulation_steps 8

PyTorch's fully_shard (FSDP2; Zhao et al. 2023, arXiv 2304.11277): a process has some rows of each weight, of its
gradient and of the optimizer's state, and gets the other rows of a layer for as long as it computes with it.
docs/scaling.md counts what that sends. Checkpoints are whole, the same as those of one process.
"""
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.device import Backend
from tinyllm.distributed import DistributedContext


def shard_model(model: nn.Module, where: Backend, dist: DistributedContext) -> nn.Module:
    """Leave this process its part of a model, on its device. In bfloat16, so are the weights of layers on their way."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(where.device.type, (dist.size,))
    sent = MixedPrecisionPolicy(torch.bfloat16 if where.dtype == torch.bfloat16 else None, torch.float32,
                                cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=sent)
    return fully_shard(model, mesh=mesh)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor. Its import takes half a second, so that those who divide nothing are spared it."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which all have to ask for it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that each has, if the one that it shall be like is divided."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def full_state_dict(state: Any, dist: DistributedContext) -> Any:
    """A state with whole tensors on the CPU of the first process; in the others, None in place of them."""
    if isinstance(state, dict):
        return {name: full_state_dict(value, dist) for name, value in state.items()}
    if isinstance(state, list):
        return [full_state_dict(value, dist) for value in state]
    if not is_dtensor(state):
        return state
    found = full_tensor(state)                    # one at a time, for all together do not fit the GPU
    return found.cpu() if dist.is_main else None
