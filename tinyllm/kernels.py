"""Faster implementations of two functions of model.py: attention in bfloat16 on a CPU, and the loss.

They run only while model.py's code is unchanged. After an edit, model.py's own functions run, because the fast
versions may then give different results.
"""
import ast
import hashlib
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model

MODEL_FINGERPRINT = "a8772d8707894733"                   # of model.py; tests/test_kernels.py prints a new one
QUERY_BLOCK = 64                                # queries per block of attention on a CPU
MAX_BLOCKED_LEN = 1024                          # longer sequences use PyTorch's kernel
MAX_LOGITS_ON_CPU = 1 << 20                     # per chunk of the loss: 4 MB in float32, about the cache size
MAX_LOGITS_ON_GPU = 1 << 22                     # 16 MB; larger chunks need fewer launches, but set the peak of memory
MIN_ROWS_ON_GPU = 256                           # each chunk reads and writes grad_weight; short ones too often


# ---- choice of implementation -------------------------------------------------------------------

def build_transformer(args: model.ModelArgs) -> model.Transformer:
    """Build model.py's Transformer with these kernels, or with its own functions if model.py was edited."""
    if model_is_original():
        return model.Transformer(args, causal_attention, LinearCrossEntropy())
    return model.Transformer(args)


def parts_to_compile(transformer: nn.Module) -> list[nn.Module]:
    """Return the modules to compile one by one: the layers, which share compiled code, and a chunk of the loss."""
    parts = list(transformer.layers)
    if isinstance(transformer.loss_fn, LinearCrossEntropy):
        parts.append(transformer.loss_fn.chunk)
    return parts


@cache
def model_is_original() -> bool:
    """True if model.py's code is unchanged. Otherwise print a note once."""
    path = Path(model.__file__)
    if path.is_file() and fingerprint(path.read_bytes()) == MODEL_FINGERPRINT:
        return True
    print("note: model.py was edited, so its own functions run, which are slower than tinyllm/kernels.py and engine.py",
          file=sys.stderr)
    return False


def fingerprint(source: str | bytes) -> str:
    """Return a digest of Python code. Docstrings, comments, layout and the Python version do not change it."""
    return hashlib.sha256(_dump(ast.parse(source)).encode()).hexdigest()[:16]


def _dump(node: Any) -> str:
    """Return a syntax tree as text without empty fields, so that all Python versions give the same text."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    children = [f"{name}={_dump(fields[name])}" for name in sorted(fields)]
    return f"{type(node).__name__}({','.join(children)})"


# ---- attention ----------------------------------------------------------------------------------

def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Compute model.causal_attention with the fastest kernel. scale: factor of the scores; None: 1 / sqrt(D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= MAX_BLOCKED_LEN:
        return _blocked_attention(q, k, v, dropout, scale or q.shape[-1] ** -0.5)
    n_rep = q.shape[1] // k.shape[1]
    if repeats_kv(n_rep, q.device.type, q.dtype):
        k, v = k.repeat_interleave(n_rep, 1), v.repeat_interleave(n_rep, 1)
        n_rep = 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n_rep > 1, dropout_p=dropout, scale=scale)


def repeats_kv(n_rep: int, device_type: str, dtype: torch.dtype) -> bool:
    """True if heads that share keys get copies of them.

    On GPUs without bfloat16, the kernel that never stores (T, T) scores does not support shared heads.
    """
    return n_rep > 1 and device_type == "cuda" and dtype != torch.bfloat16


def _blocked_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    """Compute attention for one block of queries at a time, with the keys up to the block's end.

    On a CPU, PyTorch's fused kernel is slow in bfloat16. Plain matrix products are faster, and blocks skip most of the
    masked scores. Heads that share keys form one longer block.
    """
    n_rep = q.shape[1] // k.shape[1]
    q = (q * scale).unflatten(1, (-1, n_rep))                                           # (B, K, H / K, T, D)
    blocks = []
    for begin in range(0, q.shape[3], QUERY_BLOCK):
        block = q[:, :, :, begin:begin + QUERY_BLOCK]                                   # (B, K, H / K, block, D)
        end = begin + block.shape[3]
        hidden = torch.arange(end) > torch.arange(begin, end)[:, None]                  # (block, end)
        scores = block.flatten(2, 3) @ k[:, :, :end].mT                                 # (B, K, H / K * block, end)
        scores = scores.float().unflatten(2, (n_rep, -1)).masked_fill(hidden, -math.inf)
        weights = F.dropout(scores.softmax(-1).to(v.dtype), dropout)                    # (B, K, H / K, block, end)
        blocks.append((weights.flatten(2, 3) @ v[:, :, :end]).unflatten(2, (n_rep, -1)))
    return torch.cat(blocks, 3).flatten(1, 2)                                           # (B, H, T, D)


# ---- loss ---------------------------------------------------------------------------------------

class LinearCrossEntropy(nn.Module):
    """model.linear_cross_entropy in chunks, because all logits would be by far the largest tensor of a small model.

    The logits of a chunk become gradients while they are in the cache (as in Liger Kernel, arXiv 2410.10989).
    """

    def __init__(self):
        super().__init__()
        self.chunk = CrossEntropyChunk()        # a separate module, compiled once for all chunks

    def forward(self, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss. h: (B, T, dim); weight: (vocab_size, dim); targets: (B, T), -1 is ignored."""
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        h = h.flatten(0, 1).to(dtype)                                                   # (B * T, dim)
        needs_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
        return _FusedLinearCrossEntropy.apply(h, weight.to(dtype), targets.flatten(), self.chunk, needs_grad)


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Return the rows of a chunk of the loss: a power of 2, so that the shapes of chunks repeat."""
    if device_type == "cpu":
        return _power_of_2(MAX_LOGITS_ON_CPU // vocab_size)
    return max(_power_of_2(MAX_LOGITS_ON_GPU // vocab_size), MIN_ROWS_ON_GPU)


def _power_of_2(limit: int) -> int:
    """Return the largest power of 2 up to a limit; 1 for smaller limits."""
    return 1 << max(limit, 1).bit_length() - 1


class CrossEntropyChunk(nn.Module):
    def forward(self, h: Tensor, weight: Tensor, targets: Tensor, grad_weight: Tensor | None
                ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss of some rows and its gradient for h; add its gradient for weight to grad_weight.

        h: (rows, dim); weight: (vocab_size, dim); targets: (rows,), -1 is ignored. grad_weight None: no gradients.
        """
        loss_mask = (targets >= 0)[:, None]                                             # (rows, 1)
        target = targets.clamp(min=0)[:, None]                                          # (rows, 1)
        logits = (h @ weight.T).float()                                                 # (rows, vocab_size)
        max_logit = logits.amax(-1, keepdim=True)                                       # (rows, 1)
        exp_logits = (logits - max_logit).exp()                                         # (rows, vocab_size)
        sum_exp = exp_logits.sum(-1, keepdim=True)                                      # (rows, 1)
        loss = ((sum_exp.log() + max_logit - logits.gather(1, target)) * loss_mask).sum()
        if grad_weight is None:
            return loss, None
        # softmax - one_hot(targets); == instead of scatter keeps it one fused loop
        is_target = torch.arange(len(weight), device=h.device) == target                # (rows, vocab_size)
        grad = (exp_logits * (loss_mask / sum_exp) - (is_target & loss_mask).float()).to(h.dtype)
        grad_weight += grad.T @ h
        return loss, grad @ weight


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, chunk: CrossEntropyChunk, needs_grad: bool
                ) -> Tensor:
        rows = chunk_rows(len(weight), h.device.type)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        losses, grads = [], []
        for h_chunk, target_chunk in zip(h.split(rows), targets.split(rows)):
            loss, grad = chunk(h_chunk, weight, target_chunk, grad_weight)
            losses.append(loss)
            grads.append(grad)
        count = (targets >= 0).sum()
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grads), grad_weight.to(weight.dtype), count)
        return torch.stack(losses).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_h, grad_weight, count = ctx.saved_tensors
        scale = (grad / count).to(grad_h.dtype)
        return grad_h * scale, grad_weight * scale, None, None, None
