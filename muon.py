"""Muon, an optimizer for the matrices of a model (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

It is momentum whose steps are made orthogonal, so that a step turns all directions of a matrix by the same
amount, also those whose gradients are small. After as many steps a small model had 0.985 bits per byte instead
of AdamW's 1.078 (docs/benchmarks.md). PyTorch has it too, as torch.optim.Muon; here matrices of one shape are
handled together, which takes less time.
"""
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Steps have the length of AdamW's (arXiv 2502.16982), so that both can share a learning rate.

    Args:
        params: matrices.
        dtype: of the products; bfloat16 is exact enough where the hardware has it.
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
                shapes.setdefault(tuple(sorted(weight.shape)), []).append(weight)
            for (_, longer), weights in shapes.items():
                steps = torch.stack([_wide(self._smooth(weight, group["momentum"])) for weight in weights])
                scale = group["lr"] * 0.2 * longer ** 0.5
                for weight, step in zip(weights, orthogonal(steps.to(self.dtype))):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    _wide(weight).add_(step, alpha=-scale)

    def _smooth(self, weight: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum: the gradient, drawn towards the mean of those before it."""
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight)
        state["mean"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["mean"], momentum)


def orthogonal(x: Tensor) -> Tensor:
    """Bring the singular values of matrices near to 1: (n, rows, columns), rows <= columns, of any scale.

    Five steps of a polynomial in x x^T that pulls what lies in (0, 1] to about 0.7 to 1.2.
    """
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def _wide(x: Tensor) -> Tensor:
    """A matrix with at least as many columns as rows: the matrix, or a view of it turned over."""
    return x if x.shape[0] <= x.shape[1] else x.mT
