"""A Llama 2 language model (Touvron et al. 2023, arXiv 2307.09288): ids in, logits out.

    model = Transformer(ModelArgs(dim=288, n_layers=8, n_heads=6, n_kv_heads=3, vocab_size=4096))
    logits = model(tokens)                                  # (B, T, vocab_size)
    loss = model(tokens, targets)                           # scalar, nats per token
    story = model.generate(prompt, max_new_tokens=100, temperature=0.8, top_k=300)

RMSNorm before each part (arXiv 1910.07467), rotary position embedding (arXiv 2104.09864), attention
with shared key-value heads (arXiv 2305.13245), SwiGLU feed-forward (arXiv 2002.05202), no biases, the
input embedding reused as the output layer. Parameters have the names of Meta's release.

Shapes below: B batch, T tokens, H heads, K key-value heads, D dim of a head.
"""
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERY_BLOCK, MAX_BLOCKED_LEN = 64, 1024         # queries at a time in attention on a CPU, and the longest sequence for it
LARGEST_ROPE = 1 << 27                  # window times dim of a head: a million tokens of 128
MAX_LOGITS_PER_CHUNK = (1 << 20, 1 << 24)   # on a CPU: 4 MB in float32, about its cache; on a GPU: 64 MB


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model. Raises ValueError, naming the numbers, where they do not fit together."""
    dim: int = 288
    n_layers: int = 8
    n_heads: int = 6
    n_kv_heads: int = 3             # fewer than n_heads: groups of heads share keys and values
    vocab_size: int = 4096
    hidden_dim: int = 0             # of the feed-forward; 0: 8/3 of dim, rounded up to multiple_of
    multiple_of: int = 32
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-5
    max_seq_len: int = 256
    dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None     # see rope_frequencies
    tie_embeddings: bool = True

    def __post_init__(self):
        problems = invalid_fields(self, ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len",
                                        "multiple_of"), ("norm_eps", "rope_theta", "ffn_dim_multiplier"))
        if type(self.hidden_dim) is not int or not 0 <= self.hidden_dim < 2**31:
            problems.append(f"hidden_dim must be a whole number from 0 on, not {self.hidden_dim!r}")
        if problems:
            raise ValueError("; ".join(problems))
        if self.max_seq_len * self.head_dim > LARGEST_ROPE:
            raise ValueError(f"max_seq_len {self.max_seq_len} x dim / n_heads {self.head_dim} is above {LARGEST_ROPE}")
        if self.head_dim % 2:
            raise ValueError(f"dim / n_heads = {self.head_dim} is odd; rotary embedding turns pairs")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rope_scaling is not None and not _is_valid_rope_scaling(self):
            raise ValueError(f"rope_scaling cannot be {self.rope_scaling!r:.80}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward: hidden_dim, or as Llama computes it."""
        width = int(int(8 * self.dim / 3) * self.ffn_dim_multiplier)
        return self.hidden_dim or -(-width // self.multiple_of) * self.multiple_of


def invalid_fields(args: Any, whole: tuple[str, ...], real: tuple[str, ...]) -> list[str]:
    """What is wrong with the numbers of a shape: with whole ones, others above 0, and dropout; else with the heads."""
    wrong = [f"{name} must be a whole number from 1 on, not {value!r}" for name in whole
             if type(value := getattr(args, name)) is not int or not 0 < value < 2**31]
    wrong += [f"{name} must be above 0 and a number that float32 can hold, not {value!r}" for name in real
              if not isinstance(value := getattr(args, name), int | float) or not 0 < value < 1e38]
    if not 0 <= args.dropout < 1:
        wrong.append(f"dropout must be in [0, 1), not {args.dropout}")
    if not wrong and args.dim % args.n_heads:
        wrong.append(f"dim {args.dim} is not a multiple of n_heads {args.n_heads}")
    return wrong


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Radians per token of each pair of dimensions, shape (D / 2,), float64.

    With rope_scaling they are slowed down: all by `factor` (arXiv 2306.15595), or each pair by its own of
    `factors`; or, with low_freq_factor, high_freq_factor and original_max_position_embeddings too, as in Llama
    3.1 (meta-llama/llama-models): waves longer than the original context / low_freq_factor by factor, those
    shorter than the original context / high_freq_factor not, and between them it goes over smoothly.
    """
    pairs = torch.arange(0, args.head_dim, 2, dtype=torch.float64, device="cpu")
    speed = float(args.rope_theta) ** (-pairs / args.head_dim)
    scale = args.rope_scaling or {}
    if "factors" in scale:
        speed = speed / torch.tensor(scale["factors"], dtype=torch.float64, device="cpu")
    elif "low_freq_factor" not in scale:
        speed = speed / scale.get("factor", 1)
    else:
        low, high = scale["low_freq_factor"], scale["high_freq_factor"]
        turns = speed / (2 * math.pi) * scale["original_max_position_embeddings"]    # in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (keep + (1 - keep) / scale["factor"])
    return speed


def _is_valid_rope_scaling(args: ModelArgs) -> bool:
    """Whether there is a frequency for each pair."""
    if not isinstance(args.rope_scaling, dict):
        return False
    try:
        speed = rope_frequencies(args)
    except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError):
        return False
    return len(speed) == args.head_dim // 2 and bool((speed.isfinite() & (speed > 0)).all())


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair of neighbours in the last dimension by its angle.

    Meta's layout: pairs are (0, 1), (2, 3), ... Hugging Face pairs (0, D/2), (1, D/2 + 1), ...; its
    weights have the rows of wq and wk in another order, and give the same result.

    Args:
        x: (B, T, H, D).
        rope: (2, 1, T, 1, D / 2), cosines and sines, float32.
    """
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)      # each (B, T, H, D / 2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Attention of whole sequences, each token looking at itself and what is before it.

    Args:
        q: (B, H, T, D); k, v: (B, K, T, D), each shared by H / K heads.
        scale: of the scores; 1 / sqrt(D) when None.
    Returns:
        (B, H, T, D).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cuda" and q.dtype != torch.bfloat16:
        # the kernel of GPUs without bfloat16 that keeps no (T, T) scores knows no groups
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] > MAX_BLOCKED_LEN:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1, dropout_p=dropout,
                                              scale=scale)
    # PyTorch's fused kernel is slow in bfloat16 on a CPU. Plain products of a block of queries with the keys up to
    # its end are faster, and leave out most of what the mask would hide. Heads that share keys are one longer block.
    q = (q * (scale or q.shape[-1] ** -0.5)).unflatten(1, (-1, groups))             # (B, K, H / K, T, D)
    out = []
    for begin in range(0, q.shape[3], QUERY_BLOCK):
        block = q[:, :, :, begin:begin + QUERY_BLOCK]
        end = begin + block.shape[3]
        hidden = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device)[:, None]
        scores = block.flatten(2, 3) @ k[:, :, :end].mT                             # (B, K, H / K * block, end)
        scores = scores.float().unflatten(2, (groups, -1)).masked_fill(hidden, -math.inf)
        weights = F.dropout(scores.softmax(-1).to(v.dtype), dropout)
        out.append((weights.flatten(2, 3) @ v[:, :, :end]).unflatten(2, (groups, -1)))
    return torch.cat(out, 3).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        split = (-1, self.args.head_dim)
        q = apply_rope(self.wq(x).unflatten(-1, split), rope).transpose(1, 2)      # (B, H, T, D)
        k = apply_rope(self.wk(x).unflatten(-1, split), rope).transpose(1, 2)      # (B, K, T, D)
        v = self.wv(x).unflatten(-1, split).transpose(1, 2)                         # (B, K, T, D)
        out = causal_attention(q, k, v, self.args.dropout if self.training else 0.0)        # (B, H, T, D)
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
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class LinearCrossEntropy(nn.Module):
    """Mean cross-entropy, in nats, of the logits h @ weight.T, which never exist all at once.

    They are by far the largest array of a small model. Here they are made for a few rows at a time and turned
    into gradients on the spot, while the processor has them at hand (as in Liger Kernel, arXiv 2410.10989).
    """

    def __init__(self):
        super().__init__()
        self.part = CrossEntropyChunk()        # a module by itself, to be compiled once for all parts

    def forward(self, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h: (B, T, dim); weight: (vocab_size, dim); targets: (B, T), -1 is not scored."""
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        return _FusedLinearCrossEntropy.apply(h.flatten(0, 1).to(dtype), weight.to(dtype), targets.flatten(), self.part)


class CrossEntropyChunk(nn.Module):
    def forward(self, h: Tensor, weight: Tensor, targets: Tensor, grad_weight: Tensor | None
                ) -> tuple[Tensor, Tensor | None]:
        """Sum of the losses of some rows, and its gradient for h; the one for weight is added to grad_weight.

        h: (rows, dim); weight: (vocab_size, dim); targets: (rows,), -1 is not scored. Without grad_weight, the loss
        alone.
        """
        scored, target = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]     # (rows, 1)
        logits = (h @ weight.T).float()                                             # (rows, vocab_size)
        top = logits.amax(-1, keepdim=True)                                         # (rows, 1)
        odds = (logits - top).exp()                                                 # (rows, vocab_size)
        total = odds.sum(-1, keepdim=True)                                          # (rows, 1)
        loss = ((total.log() + top - logits.gather(1, target)) * scored).sum()
        if grad_weight is None:
            return loss, None
        # probabilities, less 1 at the targets; compared, since to scatter would end the loop that is compiled
        hit = torch.arange(len(weight), device=h.device) == target
        grad = (odds * (scored / total) - (hit & scored).float()).to(h.dtype)
        grad_weight += grad.T @ h
        return loss, grad @ weight


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, part: CrossEntropyChunk) -> Tensor:
        rows = MAX_LOGITS_PER_CHUNK[h.device.type != "cpu"] // len(weight)
        rows = 1 << max(rows, 1).bit_length() - 1           # a power of two, so that parts are mostly of one size
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if any(ctx.needs_input_grad) else None
        losses, grads = zip(*(part(few, weight, some, grad_weight)
                              for few, some in zip(h.split(rows), targets.split(rows))))
        count = (targets >= 0).sum()
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grads), grad_weight.to(weight.dtype), count)
        return torch.stack(losses).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_weight, count = ctx.saved_tensors
        scale = (grad / count).to(grad_h.dtype)
        return grad_h * scale, grad_weight * scale, None, None


def init_weights(model: nn.Module, n_layers: int) -> None:
    """Give a new model its weights: normal with std 0.02; `wo` and `w2`, which add to the residual stream of
    2 * n_layers terms, with std 0.02 / sqrt(2 * n_layers) (GPT-2, Radford et al. 2019). Biases are 0, norms stay 1."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.dim() > 1:
            scaled = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if scaled else 0.02)


class Transformer(nn.Module):
    """The whole model."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.loss = LinearCrossEntropy()
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        places = torch.arange(args.max_seq_len, dtype=torch.float64, device="cpu")
        angles = torch.outer(places, rope_frequencies(args))                        # (max_seq_len, D / 2)
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin())).float(), persistent=False)
        init_weights(self, args.n_layers)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute logits, or the loss if there are targets.

        Args:
            tokens: (B, T) ids.
            targets: (B, T) the ids that should come next; -1 is not scored.
        Returns:
            logits (B, T, vocab_size); with targets the mean cross-entropy in nats.
        Raises:
            ValueError: when the tokens do not fit into max_seq_len.
        """
        length = tokens.shape[1]
        if length > self.args.max_seq_len:
            raise ValueError(f"{length} tokens do not fit into max_seq_len {self.args.max_seq_len}")
        rope = self.rope[:, None, :length, None]                                    # (2, 1, T, 1, D / 2)
        h = self.dropout(self.tok_embeddings(tokens))                               # (B, T, dim)
        for layer in self.layers:
            h = layer(h, rope)
        h = self.norm(h)
        if targets is None:
            return self.output(h)
        return self.loss(h, self.output.weight, targets)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Continue prompts of equal length: (B, T) ids become (B, T + max_new_tokens).

        The plain form, to read and to compare with; engine.py is many times faster and has more to offer.
        temperature 0 takes the likeliest token; top_k > 0 draws from the k likeliest only.
        """
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1]                                            # (B, vocab_size)
            if temperature == 0:
                fresh = logits.argmax(-1, keepdim=True)                             # (B, 1)
            else:
                best, ids = logits.float().topk(min(top_k or logits.shape[1], logits.shape[1]))
                fresh = ids.gather(1, torch.multinomial((best / temperature).softmax(-1), 1))
            tokens = torch.cat((tokens, fresh), dim=1)
        return tokens

    def count_parameters(self) -> int:
        """Number of weights; those that are used twice count once."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self) -> int:
        """Floating point operations to train on one token: products with the weights, and causal attention over
        max_seq_len tokens, forward and backward."""
        attention = self.args.n_layers * self.args.n_heads * self.args.head_dim * self.args.max_seq_len
        products = self.count_parameters() - (0 if self.args.tie_embeddings else self.tok_embeddings.weight.numel())
        return 6 * (products + attention)
