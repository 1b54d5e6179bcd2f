"""Answering with several processes, each with a part of every matrix: tensor parallelism (arXiv 1909.08053).

    torchrun --nproc_per_node=2 sample.py --checkpoint big.gguf --interactive

Of each layer a process has some of the heads, with their keys and values, and some of the feed-forward: rows of
wq, wk, wv, w1 and w3, columns of wo and w2. What it makes with these two is a part of a sum: twice in a layer, all add
up what they have. The output layer is divided by rows; embeddings and norms are small, and whole in each.

The first process reads, chooses the tokens, prints and writes files. The others get from it what they need to compute
along: the ids of the prompts, then each token. So nobody can disagree about a token, and the others never ask how a
token is chosen, nor when a text is over.

PyTorch's parallelize_module is not used: what engine.py computes with are packed matrices, in float16 and int8 of a
kind that no DTensor can hold, and wq, wk and wv in one, which it could not divide by heads. With plain matrices in
float32, a feed-forward of dim 288 took about three times the processor's time with DTensors (a throw-away script).
"""
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelArgs, Transformer
from tinyllm.cli import UserError
from tinyllm.device import Backend
from tinyllm.distributed import DistributedContext
from tinyllm.engine import Engine, Step
from tinyllm.sampling import SamplingParams, sample_token
from tinyllm.weights import LinearFn

NO_TIMEOUT = timedelta(days=1000)          # how long the others wait for the next prompt; a dead one is noticed at once
GREEDY = SamplingParams(temperature=0)        # needs no random numbers
STOP_TOKEN = -1                               # said in place of a token


class TensorParallelGroup:
    """The processes that answer together, and what they say to each other besides sums."""

    def __init__(self, dist: DistributedContext):
        self.dist, self.is_main = dist, dist.is_main
        self.control_group = torch_dist.new_group(backend="gloo", timeout=NO_TIMEOUT)

    def broadcast_request(self, *request: Any) -> tuple[Any, ...]:
        """What the first process requests, in all of them; the others give nothing."""
        said = [request]
        torch_dist.broadcast_object_list(said, 0, self.control_group, torch.device("cpu"))
        return said[0]

    def engine(self, model: Transformer, where: Backend, quantize: str) -> "TensorParallelEngine":
        return TensorParallelEngine(model, self, where, quantize)

    def tokens(self, tokens: list[int] | int) -> list[int]:
        """The tokens of the first process, in all of them; the others give how many there are."""
        said = torch.tensor(tokens) if self.is_main else torch.empty(tokens, dtype=torch.int64)
        torch_dist.broadcast(said, 0, self.control_group)
        return said.tolist()


class _StopGeneration(Exception):
    """The first process wants no further tokens."""


class TensorParallelEngine(Engine):
    """An engine with a part of the weights: the first process uses it as any other, all call `work`."""

    def __init__(self, model: Transformer, team: TensorParallelGroup, where: Backend, quantize: str = ""):
        """Takes most of its weights away from the model. Raises UserError when the team cannot divide them."""
        self.team, self.writing = team, 0               # how many texts are being written
        shard_weights(model, team.dist)
        super().__init__(model, where.dtype, quantize, device=where.device)
        self.n_heads, self.n_kv_heads = (number // team.dist.size for number in (self.n_heads, self.n_kv_heads))

    def _pack_weights(self, model: Transformer, pack: Callable[[Tensor], LinearFn]) -> None:
        super()._pack_weights(model, pack)
        self.layers = [[qkv, _all_reduced(out), up, _all_reduced(down)] for qkv, out, up, down in self.layers]
        self.output = self._gathered(self.output)

    def _gathered(self, product: LinearFn) -> LinearFn:
        """In the first process, all columns of what each has a part of; the others go on with their part."""
        def gathered(x: Tensor) -> Tensor:
            part = product(x).float()
            parts = [torch.empty_like(part) for _ in range(self.team.dist.size)] if self.team.is_main else None
            torch_dist.gather(part, parts)
            return torch.cat(parts, 1)[:, :self.args.vocab_size] if parts else part
        return gathered

    def generate(self, prompts: list[list[int]], max_new_tokens: int, sampling: SamplingParams = SamplingParams(),
                 ends: Collection[int] = (), rows: list[int] | None = None) -> Iterator[Step]:
        """As Engine.generate, for the first process."""
        self.team.broadcast_request(prompts, max_new_tokens)
        self.writing = len(prompts)
        try:
            for step in super().generate(prompts, max_new_tokens, sampling, ends, rows):
                yield step
                self.team.tokens([token or 0 for token in step.tokens])     # of what has ended, nothing is used
        finally:
            self._say_over()

    def _say_over(self) -> None:
        """End the texts that the others compute along with, if there are any."""
        if count := self.writing:
            self.writing = 0
            self.team.tokens([STOP_TOKEN] * count)

    def read(self, ids: list[int]) -> Iterator[Tensor]:
        """As Engine.read, for the first process."""
        self.team.broadcast_request(ids)
        yield from super().read(ids)

    def run(self, lead: Callable[[], None]) -> None:
        """Call lead() in the first process; the others compute along until it has returned."""
        if not self.team.is_main:
            return self._worker_loop()
        try:
            lead()
        finally:
            self._say_over()                            # an error may keep what was being written from being closed
            self.team.broadcast_request()

    def _worker_loop(self) -> None:
        while request := self.team.broadcast_request():
            if len(request) == 1:                       # ids to read
                deque(super().read(*request), 0)
                continue
            with suppress(_StopGeneration):
                deque(super().generate(*request, GREEDY), 0)
                self._choose(*request)                  # the last thing that is said is OVER

    def _choose(self, logits: Tensor, *how: Any) -> Tensor:
        if self.team.is_main:
            return sample_token(logits, *how)
        tokens = self.team.tokens(len(logits))
        if tokens[0] == STOP_TOKEN:
            raise _StopGeneration
        return torch.tensor(tokens, device=self.device)


def shard_weights(model: Transformer, dist: DistributedContext) -> None:
    """Leave a model the part of its weights that this process computes with."""
    check_divisible(model.args, dist)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, feed_forward.w1, feed_forward.w3):
            linear.weight = _shard(linear.weight, dist, 0)
        for linear in (attention.wo, feed_forward.w2):
            linear.weight = _shard(linear.weight, dist, 1)
    model.output.weight = _shard(model.output.weight, dist, 0)


def check_divisible(args: ModelArgs, dist: DistributedContext) -> None:
    """Raise UserError when there is no equal part for each process."""
    if not isinstance(args, ModelArgs):
        raise UserError("a GPT-2 is not divided among processes; use python sample.py, without torchrun")
    parts = math.gcd(args.n_kv_heads, args.ffn_dim)         # n_heads is a multiple of n_kv_heads
    if parts % dist.size:
        fitting = [str(number) for number in range(1, parts + 1) if parts % number == 0]
        raise UserError(f"{dist.size} processes cannot share n_heads {args.n_heads}, n_kv_heads {args.n_kv_heads} and "
                        f"a feed-forward of {args.ffn_dim} evenly\n       use torchrun --nproc_per_node="
                        f"{' or '.join(fitting)}")


def _shard(weight: Tensor, dist: DistributedContext, dim: int) -> nn.Parameter:
    """This process's part of the rows (dim 0) or columns (1). A vocabulary may come out uneven: zeros fill it up."""
    width = -(-weight.shape[dim] // dist.size)
    begin = min(width * dist.rank, weight.shape[dim])
    part = weight.detach().narrow(dim, begin, min(width, weight.shape[dim] - begin))
    if missing := width - part.shape[dim]:
        part = F.pad(part, (0, 0, 0, missing))
    return nn.Parameter(part.contiguous(), requires_grad=False)


def _all_reduced(product: LinearFn) -> LinearFn:
    """The sum of what the processes make of their parts, in float32."""
    def summed(x: Tensor) -> Tensor:
        part = product(x).float()
        torch_dist.all_reduce(part)
        return part
    return summed
