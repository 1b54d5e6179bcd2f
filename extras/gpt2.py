"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): ids in, logits out.

    model = GPT2(GPT2Args())                            # 124 million parameters
    logits = model(tokens)                              # (B, T, vocab_size)
    engine = GPT2Engine(model)                          # see tinyllm/engine.py

Unlike in model.py, positions are learned, norms subtract the mean, the feed-forward has GELU and no gate, and all
layers but the output have biases. Shapes as in model.py.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer, init_weights, validate_args
from tinyllm.engine import AttentionFn, Engine, LinearFn
from tinyllm.kernels import LinearCrossEntropy, causal_attention


@dataclass(frozen=True)
class GPT2Args:
    """Hyperparameters of a GPT-2. Raises ValueError if they are inconsistent."""
    tie_embeddings: ClassVar[bool] = True
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    vocab_size: int = 50257
    max_seq_len: int = 1024
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        validate_args(self, "dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads


class Attention(nn.Module):
    def __init__(self, args: GPT2Args):
        super().__init__()
        self.args = args
        self.wqkv = nn.Linear(args.dim, 3 * args.dim)
        self.wo = nn.Linear(args.dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.args.head_dim)).transpose(1, 2)          # (B, 3 H, T, D)
        out = causal_attention(*qkv.chunk(3, 1), self.args.dropout if self.training else 0.0)
        return self.wo(out.transpose(1, 2).flatten(-2))                                     # (B, T, dim)


class FeedForward(nn.Module):
    def __init__(self, args: GPT2Args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, 4 * args.dim)
        self.w2 = nn.Linear(4 * args.dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, args: GPT2Args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.LayerNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.LayerNorm(args.dim, args.norm_eps)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class GPT2(nn.Module):
    """The complete model."""

    count_parameters = Transformer.count_parameters

    def __init__(self, args: GPT2Args):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.positions = nn.Embedding(args.max_seq_len, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(GPT2Block(args) for _ in range(args.n_layers))
        self.norm = nn.LayerNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight
        self.loss_fn = LinearCrossEntropy()
        init_weights(self, args.n_layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)

    def load_state_dict(self, weights: dict[str, Tensor], **options: Any) -> Any:
        """Load weights. Positions beyond max_seq_len are dropped."""
        positions = weights["positions.weight"]
        if len(positions) > self.args.max_seq_len:
            weights = {**weights, "positions.weight": positions[:self.args.max_seq_len].clone()}
        return super().load_state_dict(weights, **options)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits, or the loss if targets are given, like Transformer.forward."""
        length = tokens.shape[1]
        if length > self.args.max_seq_len:
            raise ValueError(f"{length} tokens do not fit into max_seq_len {self.args.max_seq_len}")
        positions = self.positions(torch.arange(length, device=tokens.device))              # (T, dim)
        h = self.dropout(self.tok_embeddings(tokens) + positions)                           # (B, T, dim)
        for layer in self.layers:
            h = layer(h)
        h = self.norm(h)
        return self.output(h) if targets is None else self.loss_fn(h, self.output.weight, targets)

    def flops_per_token(self) -> int:
        """Return the operations per token, like Transformer.flops_per_token. Position lookups cost none."""
        attention = self.args.n_layers * self.args.dim * self.args.max_seq_len
        return 6 * (self.count_parameters() - self.positions.weight.numel() + attention)


class GPT2Engine(Engine):
    """A GPT-2 prepared for generation, with position embeddings instead of rotations."""

    def _fuse_weights(self, model: GPT2, make_linear: Callable[[Tensor], LinearFn]) -> None:
        self.embeddings = self._on_device(model.tok_embeddings.weight)
        self.positions = self._on_device(model.positions.weight)
        scale = torch.ones(3 * self.args.dim, device=model.tok_embeddings.weight.device)
        scale[:self.args.dim] = self.args.head_dim ** -0.5                          # scales q; k and v stay
        for layer in model.layers:
            wqkv, wo = layer.attention.wqkv, layer.attention.wo
            w1, w2 = layer.feed_forward.w1, layer.feed_forward.w2
            self.layers.append([
                self._affine(make_linear, wqkv.weight * scale[:, None], wqkv.bias * scale, layer.attention_norm),
                self._affine(make_linear, wo.weight, wo.bias),
                self._affine(make_linear, w1.weight, w1.bias, layer.ffn_norm),
                self._affine(make_linear, w2.weight, w2.bias)])
        self.output = self._affine(make_linear, model.output.weight, torch.zeros(1), model.norm)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32)

    def _affine(self, make_linear: Callable[[Tensor], LinearFn], weight: Tensor, bias: Tensor,
                norm: nn.LayerNorm | None = None) -> LinearFn:
        """Return the function x @ weight.T + bias, with the weight and bias of the norm before it folded in."""
        weight = self._on_device(weight)
        bias = self._on_device(bias)
        if norm:
            bias = bias + weight @ self._on_device(norm.bias)
            weight = weight * self._on_device(norm.weight)
        linear = make_linear(weight.contiguous())
        return lambda x: linear(x) + bias

    def _rope_factors(self, positions: int | slice | Tensor) -> Tensor:
        """Return position embeddings, (..., dim), in place of rotations."""
        return self.positions[positions]

    def _run_layers(self, tokens: Tensor, positions: Tensor, attend: AttentionFn) -> Tensor:
        """Run all layers on tokens (B, T). Returns (B * T, dim), before the final norm."""
        x = (F.embedding(tokens, self.embeddings) + positions).flatten(0, 1)        # (B * T, dim)
        for layer, (wqkv, wo, w1, w2) in enumerate(self.layers):
            qkv = wqkv(self._norm(x)).unflatten(-1, (-1, self.args.head_dim))       # (B * T, 3 H, D)
            x = x + wo(attend(layer, qkv.to(self.cache_dtype)))
            x = x + w2(F.gelu(w1(self._norm(x)), approximate="tanh"))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self.output(self._norm(x)).float()

    def _norm(self, x: Tensor) -> Tensor:
        """Apply LayerNorm (arXiv 1607.06450) without weight and bias, which `_affine` folds in."""
        return F.layer_norm(x, x.shape[-1:], eps=self.args.norm_eps)
