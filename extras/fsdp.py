"""Train a sharded model, for models that do not fit one GPU (setting `shard`).

    torchrun --nproc_per_node=8 train.py --shard True --gradient_accumulation_steps 8

PyTorch's fully_shard (FSDP2; Zhao et al. 2023, arXiv 2304.11277): each rank holds some rows of every weight, gradient
and optimizer moment, and gathers the other rows of a layer only while it computes with that layer. docs/scaling.md
counts the traffic. Checkpoints are complete, as a single process writes them.
"""
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tinyllm.optim import Muon, build_optimizers, orthogonalize
from tinyllm.run import TrainRun


class ShardedMuon(Muon):
    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        """Exchange this rank's rows of all matrices for all rows of some matrices, orthogonalize, and exchange back."""
        mine = orthogonalize(matrices.redistribute(placements=[Shard(0)]).to_local(), self.dtype)
        whole = DTensor.from_local(mine, matrices.device_mesh, [Shard(0)], shape=matrices.shape,
                                   stride=matrices.stride())
        return whole.redistribute(placements=matrices.placements)


class ShardedRun(TrainRun):
    is_sharded = True

    def wrap_model(self) -> nn.Module:
        """Shard the model; in bfloat16, ranks also gather its layers in bfloat16."""
        mesh = init_device_mesh(self.backend.device.type, (self.ranks.world_size,))
        gather_dtype = torch.bfloat16 if self.backend.dtype == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False)
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(self.model, mesh=mesh)

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.cfg, self.backend, ShardedMuon)

    def gradient_sync(self, is_last: bool) -> AbstractContextManager:
        """Reduce gradients after each micro-batch, because unreduced ones are as large as the whole model."""
        return nullcontext()

    def clip_gradients(self) -> Tensor:
        return super().clip_gradients().full_tensor()

    def checkpoint_dict(self) -> dict[str, Any]:
        return gather(super().checkpoint_dict(), self.ranks.is_main)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Any]]) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        sharded = {}
        for index, state in moments.items():
            sharded[index] = {name: shard_like(value, weights[index]) for name, value in state.items()}
        super().restore_optimizer(optimizer, sharded)


def shard_like(value: Any, weight: DTensor) -> Any:
    """Return this rank's shard of a moment, divided like its weight; return a step count unchanged."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def gather(state: Any, is_main: bool) -> Any:
    """Replace a state's sharded tensors: by complete ones on the main process's CPU, by None on other ranks."""
    if isinstance(state, dict):
        return {name: gather(value, is_main) for name, value in state.items()}
    if isinstance(state, list):
        return [gather(value, is_main) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()                 # one at a time: all together may not fit the GPU
    return whole.cpu() if is_main else None
