"""Tensor parallelism (arXiv 1909.08053): several processes generate together, each with a part of every matrix.

    torchrun --nproc_per_node=2 sample.py --checkpoint big.gguf --interactive

Each process holds some heads of every layer, with their keys and values, and a part of the feed-forward: rows of wq,
wk, wv, w1 and w3, columns of wo and w2. The processes add up their products with wo and w2, so they synchronize twice
per layer. The output layer is split by rows. Embeddings and norms are small, so each process holds them completely.

The main process reads prompts, samples tokens, prints and writes files. It broadcasts each request to its engine (ids
of prompts, new tokens), so processes cannot disagree about a token.
PyTorch's DTensors cannot hold packed float16 and int8 matrices, nor split the fused wq, wk and wv by heads.
"""
import math
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelArgs, Transformer
from tinyllm import compat
from tinyllm.cli import UserError
from tinyllm.device import Backend
from tinyllm.distributed import DistributedContext
from tinyllm.engine import Engine, KVCache, LinearFn
from tinyllm.kernels import model_is_original

NO_TIMEOUT = timedelta(days=1000)       # a wait for the next prompt has no limit; a dead process is detected at once


class TensorParallelGroup:
    """The processes that share a model, and the main process's requests to them."""

    def __init__(self, ranks: DistributedContext):
        self.is_main = ranks.is_main
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        with compat.gloo_prints_to_stderr():
            self.control_group = torch_dist.new_group(backend="gloo", timeout=NO_TIMEOUT)

    def broadcast_request(self, *request: Any) -> tuple[Any, ...]:
        """Broadcast the main process's request and return it in all processes; the others pass nothing."""
        message = [request]
        torch_dist.broadcast_object_list(message, 0, self.control_group, torch.device("cpu"))
        return message[0]

    def engine(self, model: Transformer, backend: Backend, quantize: str) -> "TensorParallelEngine":
        return TensorParallelEngine(model, self, backend, quantize)


class TensorParallelEngine(Engine):
    """An engine with a part of the weights. All processes call `run`; the main process uses it like any engine."""

    def __init__(self, model: Transformer, group: TensorParallelGroup, backend: Backend, quantize: str = ""):
        """Keep only this process's part of the model's weights. Raises UserError if they cannot be split evenly."""
        self.group = group
        shard_weights(model, group)
        super().__init__(model, backend.dtype, quantize, backend.device)
        self.read_ahead = 0                 # the CPU reads each token to broadcast it
        self.n_heads //= group.world_size
        self.n_kv_heads //= group.world_size
        self.output = self._gathered(self.output)

    def _add_layer(self, matrices: tuple[Tensor, ...], make_linear: Callable[[Tensor], LinearFn]) -> None:
        wqkv, wo, w13, w2 = map(make_linear, matrices)
        self.layers.append([wqkv, _all_reduced(wo), w13, _all_reduced(w2)])

    def _gathered(self, linear: LinearFn) -> LinearFn:
        """Return a function that gathers the columns of all processes in the main process."""
        def gathered(x: Tensor) -> Tensor:
            part = linear(x).float()
            parts = [torch.empty_like(part) for _ in range(self.group.world_size)] if self.group.is_main else None
            torch_dist.gather(part, parts)
            return torch.cat(parts, 1)[:, :self.args.vocab_size] if self.group.is_main else part
        return gathered

    def new_cache(self, batch: int, cache_len: int) -> KVCache:
        self.group.broadcast_request("new_cache", batch, cache_len)
        return super().new_cache(batch, cache_len)

    def prefill(self, prompts: list[list[int]], cache: KVCache, rows: list[int]) -> Tensor:
        self.group.broadcast_request("prefill", prompts, rows)
        return super().prefill(prompts, cache, rows)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        self.group.broadcast_request("decode", tokens.tolist())
        return super().decode(tokens, cache)

    def logprobs(self, ids: list[int]) -> Iterator[Tensor]:
        self.group.broadcast_request("logprobs", ids)
        yield from super().logprobs(ids)

    def run(self, main_fn: Callable[[], None]) -> None:
        """Call main_fn() in the main process; the others compute with it until it returns."""
        if not self.group.is_main:
            self._worker_loop()
            return
        try:
            main_fn()
        finally:
            self.group.broadcast_request()

    @torch.inference_mode()
    def _worker_loop(self) -> None:
        """Execute the main process's requests on the cache that it requested last."""
        while request := self.group.broadcast_request():
            match request:
                case "new_cache", batch, cache_len:
                    cache = super().new_cache(batch, cache_len)
                case "prefill", prompts, rows:
                    super().prefill(prompts, cache, rows)
                case "decode", ids:
                    super().decode(self._int_tensor(ids), cache)
                case "logprobs", ids:
                    deque(super().logprobs(ids), maxlen=0)


def shard_weights(model: Transformer, group: TensorParallelGroup) -> None:
    """Replace a model's weights by this process's part."""
    check_divisible(model.args, group.world_size)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, feed_forward.w1, feed_forward.w3):
            linear.weight = _shard(linear.weight, group, 0)
        for linear in (attention.wo, feed_forward.w2):
            linear.weight = _shard(linear.weight, group, 1)
    model.output.weight = _shard(model.output.weight, group, 0)


def check_divisible(args: ModelArgs, world_size: int) -> None:
    """Raise UserError if the model cannot be split evenly."""
    if not isinstance(args, ModelArgs):
        raise UserError("GPT-2 cannot be split over processes\n       run python sample.py without torchrun")
    if not model_is_original():
        raise UserError("model.py was edited, so it cannot be split\n       run python sample.py without torchrun")
    parts = math.gcd(args.n_kv_heads, args.ffn_dim)         # n_heads is a multiple of n_kv_heads
    if parts % world_size:
        fitting = [str(number) for number in range(1, parts + 1) if parts % number == 0]
        raise UserError(f"{world_size} processes cannot share n_heads {args.n_heads}, n_kv_heads {args.n_kv_heads} "
                        f"and a feed-forward of {args.ffn_dim} evenly\n"
                        f"       use torchrun --nproc_per_node={' or '.join(fitting)}")


def _shard(weight: Tensor, group: TensorParallelGroup, dim: int) -> nn.Parameter:
    """Return this process's rows (dim 0) or columns (dim 1), padded with zeros if the vocabulary is uneven."""
    width = -(-weight.shape[dim] // group.world_size)
    begin = min(width * group.rank, weight.shape[dim])
    part = weight.detach().narrow(dim, begin, min(width, weight.shape[dim] - begin))
    if part.shape[dim] < width:
        part = F.pad(part, (0, 0, 0, width - part.shape[dim]))
    return nn.Parameter(part.contiguous(), requires_grad=False)


def _all_reduced(linear: LinearFn) -> LinearFn:
    """Return a function that adds up the products of all processes in float32."""
    def reduced(x: Tensor) -> Tensor:
        part = linear(x).float()
        torch_dist.all_reduce(part)
        return part
    return reduced
