"""Muon, an optimizer for the matrices of a model (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

It is momentum whose steps are made orthogonal, so that a step turns all directions of a matrix by the same
amount, also those whose gradients are small. After as many steps, a small model is clearly better than with AdamW
(docs/benchmarks.md, "Tries behind the presets"). PyTorch has it too, as torch.optim.Muon; here matrices of one
shape are handled together, which takes less time.
"""
from collections.abc import Iterable

import torch
from torch import Tensor

from extras.fsdp import is_dtensor


class Muon(torch.optim.Optimizer):
    """Steps have the length of AdamW's (arXiv 2502.16982), so that both can share a learning rate.

    Args:
        params: matrices.
        dtype: of the products; 16 bits are exact enough.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0, dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"]:
                shapes.setdefault(tuple(weight.shape), []).append(weight)
            for shape, weights in shapes.items():
                steps = _orthogonal(self._smooth(weights, group["momentum"]), self.dtype).type_as(weights[0])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, steps.unbind(), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _smooth(self, weights: list[Tensor], momentum: float) -> Tensor:
        """Nesterov's momentum: the gradients, drawn towards the mean of those before them."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["mean"] = torch.zeros_like(weight)
        grads, means = [weight.grad for weight in weights], [self.state[weight]["mean"] for weight in weights]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        return torch.stack(grads).lerp_(torch.stack(means), momentum)


def _orthogonal(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonal`, also where each process has some rows of all matrices: it gets some whole ones, works on them,
    and gives them back."""
    if not is_dtensor(steps):
        return orthogonal(steps, dtype)
    from torch.distributed.tensor import DTensor, Shard
    own = orthogonal(steps.redistribute(placements=[Shard(0)]).to_local(), dtype)
    return DTensor.from_local(own, steps.device_mesh, [Shard(0)], shape=steps.shape, stride=steps.stride()
                              ).redistribute(placements=steps.placements)


def orthogonal(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of matrices near to 1: (n, rows, columns), of any scale; products are in `dtype`.

    Five steps of a polynomial in x x^T that pulls what lies in (0, 1] to about 0.7 to 1.2.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, dtype).mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)       # in float16, what is tiny would be 0 before
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x
