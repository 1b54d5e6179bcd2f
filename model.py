"""A Llama 2 language model (Touvron et al. 2023, arXiv 2307.09288): token ids in, logits out.

    model = Transformer(ModelArgs(dim=288, n_layers=8, n_heads=6, n_kv_heads=3, vocab_size=4096))
    logits = model(tokens)                                  # (B, T, vocab_size)
    loss = model(tokens, targets)                           # scalar, nats per token
    story = model.generate(prompt, max_new_tokens=100, temperature=0.8, top_k=300)

Pre-norm with RMSNorm (arXiv 1910.07467), rotary position embedding (arXiv 2104.09864), grouped-query attention (arXiv
2305.13245), SwiGLU feed-forward (arXiv 2002.05202), no biases, tied input and output embeddings. Parameters have the
names of Meta's release.

This file needs only PyTorch, so you can copy it anywhere. While its code is unchanged, train.py and sample.py run
faster implementations from tinyllm/. After an edit, they run this file.

Shapes below: B batch, T tokens, H heads, K key-value heads, D dim of a head.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelArgs:
    """Hyperparameters of a model. Raises ValueError if they are inconsistent."""
    dim: int = 288                      # width of the residual stream
    n_layers: int = 8
    n_heads: int = 6
    n_kv_heads: int = 3                 # key-value heads; n_heads / n_kv_heads query heads share each of them
    vocab_size: int = 4096
    hidden_dim: int = 0                 # width of the feed-forward; 0: 8/3 of dim, rounded up to multiple_of
    multiple_of: int = 32
    ffn_dim_multiplier: float = 1.0     # scales the width that hidden_dim 0 gives
    norm_eps: float = 1e-5
    max_seq_len: int = 256              # context length in tokens
    dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # see rope_frequencies
    tie_embeddings: bool = True

    def __post_init__(self):
        validate_args(self, "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len", "multiple_of")
        if self.head_dim % 2:
            raise ValueError(f"dim / n_heads = {self.head_dim} is odd; rotary embedding rotates pairs")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward: hidden_dim, or Llama's formula if that is 0."""
        width = int(int(8 * self.dim / 3) * self.ffn_dim_multiplier)
        return self.hidden_dim or math.ceil(width / self.multiple_of) * self.multiple_of


def validate_args(args: Any, *names: str) -> None:
    """Raise ValueError if a named size is not a positive integer, or if n_heads or dropout is invalid."""
    for name in names:
        value = getattr(args, name)
        if type(value) is not int or not 0 < value < 2**31:         # type(), because True is an int
            raise ValueError(f"{name} must be a positive integer below 2**31, not {value!r}")
    if args.dim % args.n_heads:
        raise ValueError(f"dim {args.dim} is not a multiple of n_heads {args.n_heads}")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {args.dropout}")


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


# ---- rotary position embedding ------------------------------------------------------------------

def rope_frequencies(args: ModelArgs) -> Tensor:
    """Return the rotation of each pair of dimensions in radians per token, (D / 2,), float64.

    rope_scaling divides all rotations by `factor` (arXiv 2306.15595), or each by its own entry of `factors`. With
    low_freq_factor, high_freq_factor and original_max_position_embeddings, it is Llama 3.1's scaling
    (meta-llama/llama-models): slow rotations are divided by `factor`, fast ones stay, and others are interpolated.
    """
    pairs = torch.arange(0, args.head_dim, 2, dtype=torch.float64, device="cpu")
    inv_freq = float(args.rope_theta) ** (-pairs / args.head_dim)
    scaling = args.rope_scaling or {}
    if "factors" in scaling:
        return inv_freq / torch.tensor(scaling["factors"], dtype=torch.float64, device="cpu")
    if "low_freq_factor" not in scaling:
        return inv_freq / scaling.get("factor", 1)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = inv_freq / (2 * math.pi) * scaling["original_max_position_embeddings"]      # within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (smooth + (1 - smooth) / scaling["factor"])


def rope_table(args: ModelArgs) -> Tensor:
    """Return the cosine and sine of each position and pair, (2, max_seq_len, D / 2)."""
    positions = torch.arange(args.max_seq_len, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, rope_frequencies(args))                     # (max_seq_len, D / 2)
    return torch.stack((angles.cos(), angles.sin())).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair of adjacent elements in the last dimension by the angle for its position.

    x: (B, T, H, D); rope: (2, 1, T, 1, D / 2), cosines and sines, float32. Pairs are (0, 1), (2, 3), ... as in Meta's
    code. Hugging Face pairs (0, D/2), (1, D/2 + 1), ... and permutes the rows of wq and wk to match.
    """
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)                     # each (B, T, H, D / 2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


# ---- layers -------------------------------------------------------------------------------------

def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v with a causal mask: each token attends to itself and the tokens before it.

    q: (B, H, T, D); k, v: (B, K, T, D), one head for every H / K query heads. Returns (B, H, T, D).
    """
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, attention_fn: Callable[..., Tensor] = causal_attention):
        super().__init__()
        self.args = args
        self.attention_fn = attention_fn
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        per_head = (-1, self.args.head_dim)
        q = apply_rope(self.wq(x).unflatten(-1, per_head), rope).transpose(1, 2)    # (B, H, T, D)
        k = apply_rope(self.wk(x).unflatten(-1, per_head), rope).transpose(1, 2)    # (B, K, T, D)
        v = self.wv(x).unflatten(-1, per_head).transpose(1, 2)                      # (B, K, T, D)
        out = self.attention_fn(q, k, v, self.args.dropout if self.training else 0.0)       # (B, H, T, D)
        return self.wo(out.transpose(1, 2).flatten(-2))                             # (B, T, dim)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, attention_fn: Callable[..., Tensor] = causal_attention):
        super().__init__()
        self.attention = Attention(args, attention_fn)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


# ---- the model ----------------------------------------------------------------------------------

def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of the logits h @ weight.T.

    h: (B, T, dim); weight: (vocab_size, dim); targets: (B, T), -1 is ignored.
    """
    logits = F.linear(h, weight).float()                                            # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def init_weights(model: nn.Module, n_layers: int) -> None:
    """Initialize weights ~ N(0, 0.02^2); norm weights stay 1.

    `wo` and `w2`, which add to the residual stream, have std 0.02 / sqrt(2 * n_layers) (GPT-2, Radford et al. 2019).
    """
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            is_residual = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if is_residual else 0.02)


class Transformer(nn.Module):
    """The complete model. attention_fn and loss_fn may replace causal_attention and linear_cross_entropy."""

    def __init__(self, args: ModelArgs, attention_fn: Callable[..., Tensor] = causal_attention,
                 loss_fn: Callable[..., Tensor] = linear_cross_entropy):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args, attention_fn) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.loss_fn = loss_fn
        self.register_buffer("rope", rope_table(args), persistent=False)
        init_weights(self, args.n_layers)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, vocab_size) of tokens (B, T), or with targets the mean cross-entropy in nats.

        targets: (B, T), the next token at each position; -1 is ignored.
        """
        length = tokens.shape[1]
        if length > self.args.max_seq_len:
            raise ValueError(f"{length} tokens do not fit into max_seq_len {self.args.max_seq_len}")
        rope = self.rope[:, None, :length, None]                                    # (2, 1, T, 1, D / 2)
        h = self.dropout(self.tok_embeddings(tokens))                               # (B, T, dim)
        for layer in self.layers:
            h = layer(h, rope)
        h = self.norm(h)
        return self.output(h) if targets is None else self.loss_fn(h, self.output.weight, targets)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Continue prompts of equal length: ids (B, T) become (B, T + max_new_tokens).

        This is the reference implementation; tinyllm/engine.py is many times faster and has more options.
        temperature 0 takes the most probable token; top_k > 0 samples from the k most probable tokens only.
        """
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1]                                            # (B, vocab_size)
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)                        # (B, 1)
            else:
                top_logits, top_ids = logits.float().topk(min(top_k or logits.shape[1], logits.shape[1]))
                choice = torch.multinomial((top_logits / temperature).softmax(-1), 1)
                next_token = top_ids.gather(1, choice)
            tokens = torch.cat((tokens, next_token), dim=1)
        return tokens

    def count_parameters(self) -> int:
        """Return the number of parameters; tied ones count once."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self) -> int:
        """Return the floating-point operations, forward and backward, per training token of a full window."""
        attention = self.args.n_layers * self.args.n_heads * self.args.head_dim * self.args.max_seq_len
        lookups = 0 if self.args.tie_embeddings else self.tok_embeddings.weight.numel()         # no products
        return 6 * (self.count_parameters() - lookups + attention)
