"""The optimizers: Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalizes the momentum update: a step changes all
directions of a matrix by the same amount, even directions with small gradients. After the same number of steps, a small
model is clearly better than with AdamW alone (docs/notes.md, "Recipe"). This version stacks matrices of equal shape,
which is faster than torch.optim.Muon.
"""
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tinyllm.device import Backend

NEWTON_SCHULZ_STEPS = 5
A, B, C = 3.4445, -4.775, 2.0315        # x <- A x + B (x x^T) x + C (x x^T)^2 x


class Muon(torch.optim.Optimizer):
    """Muon with updates of AdamW's size (arXiv 2502.16982), so that both can share a learning rate.

    Args:
        params: matrices.
        dtype: dtype of the matrix products; 16 bits are precise enough.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0, dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.found_inf: Tensor | None = None        # set by skip_on_overflow; 1.0: the next step changes nothing

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape, weights in group_by_shape(group["params"]).items():
                gradients = self._add_momentum(weights, group["momentum"])              # (n, rows, columns)
                updates = self._orthogonalize(gradients).type_as(weights[0])
                decay = group["lr"] * group["weight_decay"]
                if self.found_inf is not None:
                    updates = updates * (1 - self.found_inf)
                    decay = decay * (1 - self.found_inf)
                torch._foreach_mul_(weights, 1 - decay)
                torch._foreach_add_(weights, updates.unbind(), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _add_momentum(self, weights: list[Tensor], momentum: float) -> Tensor:
        """Update the running means of the gradients; return gradients with Nesterov momentum (n, rows, columns)."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["mean"] = torch.zeros_like(weight)
        means = [self.state[weight]["mean"] for weight in weights]
        grads = torch.stack([weight.grad for weight in weights])                        # (n, rows, columns)
        if self.found_inf is not None:              # the means replace the gradients, so the means do not change
            grads = torch.where(self.found_inf > 0, torch.stack(means), grads)
        torch._foreach_lerp_(means, grads.unbind(), 1 - momentum)
        return grads.lerp_(torch.stack(means), momentum)

    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        """Return orthogonal updates. ShardedMuon (extras/fsdp.py) overrides this."""
        return orthogonalize(matrices, self.dtype)


def skip_on_overflow(optimizers: list[torch.optim.Optimizer], grad_norm: Tensor) -> None:
    """Make the next step of all optimizers change nothing if the gradients overflowed in float16.

    GradScaler.step skips only optimizers with overflows of their own, and waits for the device to step Muon. It sets
    the attribute `found_inf` of PyTorch's fused AdamW in the same way.
    """
    found_inf = 1 - grad_norm.isfinite().float()
    for optimizer in optimizers:
        optimizer.found_inf = found_inf


def group_by_shape(weights: list[Tensor]) -> dict[tuple[int, ...], list[Tensor]]:
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for weight in weights:
        groups.setdefault(tuple(weight.shape), []).append(weight)
    return groups


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of matrices x (n, rows, columns) of any scale close to 1, with products in `dtype`.

    Newton-Schulz iteration: each step applies a polynomial that moves singular values in (0, 1] to about 0.7 to 1.2.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, dtype).mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)       # divide first: tiny values are 0 in float16
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT                                               # (n, rows, rows)
        polynomial = torch.baddbmm(square, square, square, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x


def build_optimizers(model: nn.Module, cfg: SimpleNamespace, backend: Backend, muon_class: type[Muon] = Muon
                     ) -> list[torch.optim.Optimizer]:
    """Return AdamW (arXiv 1711.05101) and, with optimizer "muon", Muon for the matrices of the layers.

    A group's `ratio`, which checkpoints store, multiplies the learning rate. Vectors (norm weights) do not decay.
    """
    matrices = [weight for weight in model.layers.parameters() if weight.dim() > 1]
    matrix_ids = {id(weight) for weight in matrices}
    embeddings = [weight for weight in model.parameters() if weight.dim() > 1 and id(weight) not in matrix_ids]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]

    matrix_group = {"params": matrices, "weight_decay": cfg.weight_decay, "ratio": 1.0}
    adamw_groups = [{"params": embeddings, "weight_decay": cfg.weight_decay, "ratio": cfg.embedding_lr_ratio},
                    {"params": vectors, "weight_decay": 0.0, "ratio": cfg.embedding_lr_ratio}]
    if cfg.optimizer == "adamw":
        adamw_groups.append(matrix_group)

    is_fused = backend.device.type != "mps"
    adamw = torch.optim.AdamW(adamw_groups, cfg.learning_rate, (cfg.beta1, cfg.beta2), fused=is_fused)
    if cfg.optimizer == "adamw":
        return [adamw]
    return [adamw, muon_class([matrix_group], cfg.learning_rate, cfg.momentum, dtype=backend.dtype)]
