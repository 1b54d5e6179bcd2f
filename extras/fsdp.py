"""A model of which each process has a part, for training what does not fit one GPU (setting `shard`).

    torchrun --nproc_per_node=8 train.py --shard True --gradient_accumulation_steps 8

PyTorch's fully_shard (FSDP2; Zhao et al. 2023, arXiv 2304.11277): a process has some rows of each weight, of its
gradient and of the optimizer's state, and gets the other rows of a layer for as long as it computes with it.
docs/scaling.md counts what that sends. Checkpoints are whole, the same as those of one process.
"""
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.device import Device
from tinyllm.distributed import World


def divide(model: nn.Module, where: Device, world: World) -> nn.Module:
    """Leave this process its part of a model, on its device. In bfloat16, so are the weights of layers on their way."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(where.device.type, (world.size,))
    sent = MixedPrecisionPolicy(torch.bfloat16 if where.dtype == torch.bfloat16 else None, torch.float32,
                                cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=sent)
    return fully_shard(model, mesh=mesh)


def is_part(tensor: Any) -> bool:
    """Whether it is a DTensor. Its import takes half a second, so that those who divide nothing are spared it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which all have to ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that each has, if the one that it shall be like is divided."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(state: Any, world: World) -> Any:
    """A state with whole tensors on the CPU of the first process; in the others, None in place of them."""
    if isinstance(state, dict):
        return {name: gathered(value, world) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, world) for value in state]
    if not is_part(state):
        return state
    found = whole(state)                    # one at a time, for all together do not fit the GPU
    return found.cpu() if world.first else None
