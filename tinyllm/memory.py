"""Estimate the memory of a training step before it runs.

The peak is at the end of the forward pass, when all layers hold the tensors that the backward pass needs. Muon's
temporary tensors come on top: they are larger than most activations, so they do not fit the memory that those leave.
tests/test_memory.py compares the estimate with reservations of PyTorch's CUDA allocator.
"""
from dataclasses import dataclass

import torch
from torch import nn

from model import ModelArgs
from tinyllm import kernels
from tinyllm.device import Backend, has_bfloat16
from tinyllm.optim import group_by_shape

FLOAT32 = 4                         # bytes per number
MATRIX_WORKSPACES = 2 * 8.5e6       # cuBLAS, for the threads of the forward and backward pass
HOPPER_WORKSPACES = 2 * 34e6        # the same on H100, H200 and B200
EAGER_LOSS = 21                     # bytes per logit of a chunk: 5 float32 tensors and a mask
FUSED_HEAD_DIM = 8                  # 16-bit kernels of attention take head dims that are multiples of this
GPU_FRAGMENTATION = 1.06            # memory that PyTorch reserves / these tensors: segments stay partly free
CPU_FRAGMENTATION = 1.3             # the same for the C library
CPU_LIBRARIES = 40e6                # threads, kernels and their plans, which a first step loads
CPU_COMPILER = 100e6                # PyTorch's compiler in the same process


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes for weights, gradients and optimizer, and for the activations and temporary tensors of a micro-batch."""
    state: float
    batch: float

    @property
    def total(self) -> float:
        return self.state + self.batch


def estimate_memory(model: nn.Module, optimizer: str, batch_size: int, micro_steps: int, backend: Backend,
                    compiled: bool, world_size: int = 1, is_sharded: bool = False, loss_rows: int = 0
                    ) -> MemoryEstimate:
    """Return the memory of a training step on one device, without a GPU's context.

    Args:
        model: may be on the meta device.
        optimizer: muon or adamw.
        micro_steps: micro-batches of batch_size windows that this device computes in a step.
        loss_rows: rows of a chunk of the loss; 0: as kernels.py chooses.
    """
    weights = FLOAT32 * model.count_parameters()
    gradients = weights
    n_shards = world_size if is_sharded else 1
    state = (weights + gradients + optimizer_bytes(model, optimizer)) / n_shards

    forward = state + activation_bytes(model, batch_size, backend, compiled, loss_rows)
    if world_size == 1 and micro_steps == 1:
        forward -= gradients                # the backward pass creates them; DDP keeps them
    elif world_size > 1 and micro_steps > 1 and not is_sharded:
        forward += gradients                # DDP sums up the first micro-batches outside its buckets
    forward += gathered_bytes(model) if is_sharded else cast_bytes(model, backend)
    peak = max(forward, state) + update_bytes(model, optimizer, backend) / n_shards
    if backend.device.type == "cpu":
        total = CPU_FRAGMENTATION * peak + CPU_LIBRARIES + (CPU_COMPILER if compiled else 0)
    else:
        total = GPU_FRAGMENTATION * (peak + workspace_bytes(backend.device))
    return MemoryEstimate(state, total - state)


def workspace_bytes(device: torch.device) -> float:
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return HOPPER_WORKSPACES
    return MATRIX_WORKSPACES


# ---- weights and optimizer: bytes in total ------------------------------------------------------

def layer_matrices(model: nn.Module) -> list[torch.Tensor]:
    return [weight for weight in model.layers.parameters() if weight.dim() > 1]


def optimizer_bytes(model: nn.Module, optimizer: str) -> int:
    """Return the bytes of the moments: AdamW has two for each weight, Muon one for each of its matrices."""
    moments = 2 * model.count_parameters()
    if optimizer == "muon":
        moments -= sum(weight.numel() for weight in layer_matrices(model))
    return FLOAT32 * moments


def update_bytes(model: nn.Module, optimizer: str, backend: Backend) -> int:
    """Return the bytes of Muon's temporary tensors, which stack matrices of equal shape; fused AdamW has none."""
    if optimizer != "muon":
        return 0
    groups = group_by_shape(layer_matrices(model)).values()
    largest = max(sum(weight.numel() for weight in group) for group in groups)
    # stacks of gradients, of means and of scaled gradients, and one in the dtype of the products
    return largest * (3 * FLOAT32 + backend.dtype.itemsize)


def cast_bytes(model: nn.Module, backend: Backend) -> int:
    """Return the bytes of the 16-bit copies that autocast makes of the matrices."""
    if backend.dtype == torch.float32:
        return 0
    matrices = [*layer_matrices(model), model.output.weight]
    return backend.dtype.itemsize * sum(weight.numel() for weight in matrices)


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that fully_shard gathers at a time: all outside the layers, and two layers."""
    layers = sum(weight.numel() for weight in model.layers.parameters())
    return FLOAT32 * (model.count_parameters() - layers + 2 * layers // len(model.layers))


# ---- activations --------------------------------------------------------------------------------

def activation_bytes(model: nn.Module, batch_size: int, backend: Backend, compiled: bool, loss_rows: int = 0) -> float:
    """Return the bytes of all activations at the end of the forward pass, in total."""
    args = model.args
    n_tokens = batch_size * args.max_seq_len
    # after the layers: the last residual stream and its norm in float32, the input of the loss and its gradient
    last = args.dim * 2 * (FLOAT32 + backend.dtype.itemsize)
    per_token = args.n_layers * layer_bytes(args, backend, compiled) + last

    rows = loss_rows or kernels.chunk_rows(args.vocab_size, backend.device.type)
    if not isinstance(model.loss_fn, kernels.LinearCrossEntropy):
        rows = n_tokens                                             # an edited model.py has all logits at once
    logits = min(rows, n_tokens) * args.vocab_size
    loss = logits * (2 * backend.dtype.itemsize if compiled else EAGER_LOSS)        # compiled: logits and gradients
    output_gradient = FLOAT32 * args.vocab_size * args.dim
    return n_tokens * per_token + loss + output_gradient


def layer_bytes(args: ModelArgs, backend: Backend, compiled: bool) -> float:
    """Return the bytes per token that a layer keeps for its backward pass."""
    if isinstance(args, ModelArgs):
        residuals, numbers = llama_layer(args, backend, compiled)
    else:
        residuals, numbers = gpt2_layer(args, compiled)
    masks = 2 * args.dim if args.dropout else 0             # a byte for each number that dropout may drop
    return FLOAT32 * residuals * args.dim + backend.dtype.itemsize * numbers + masks + attention_bytes(args, backend)


def llama_layer(args: ModelArgs, backend: Backend, compiled: bool) -> tuple[int, int]:
    """Return how many residual streams a Llama's layer keeps, and the other numbers per token outside attention.

    Compiled, it keeps two norms, wo's output, w1's and w3's output and their product, and computes the rest again.
    """
    if compiled:
        return 1, 3 * args.dim + 3 * args.ffn_dim
    norms = 2
    if backend.dtype != torch.float32:
        norms = 5                       # autocast copies them for each of wq, wk, wv, w1 and w3
    residuals = 2
    if backend.device.type == "cpu":
        residuals = 4                   # there, an RMSNorm also keeps its result without the weight
    return residuals, norms * args.dim + 4 * args.ffn_dim           # also w1's output after SiLU


def gpt2_layer(args: ModelArgs, compiled: bool) -> tuple[int, int]:
    """Return the same for a GPT-2: two norms, w1's output and its GELU; compiled, also wo's output."""
    return (1, 11 * args.dim) if compiled else (2, 10 * args.dim)


def has_fused_attention(args: ModelArgs, backend: Backend) -> bool:
    """False if an NVIDIA GPU computes attention with plain products, which store all scores.

    Before compute capability 8.0, the fused kernel takes no bfloat16, and in float16 only multiples of FUSED_HEAD_DIM.
    """
    if backend.dtype == torch.float32 or has_bfloat16(backend.device):
        return True
    return backend.dtype == torch.float16 and args.head_dim % FUSED_HEAD_DIM == 0


def attention_bytes(args: ModelArgs, backend: Backend) -> float:
    """Return the bytes per token that attention keeps: queries, keys, values, output and scores."""
    itemsize = backend.dtype.itemsize
    n_rep = args.n_heads // args.n_kv_heads
    if kernels.repeats_kv(n_rep, backend.device.type, backend.dtype):
        n_rep = 1
    queries_and_output = 2 * args.dim
    keys_and_values = 2 * args.dim / n_rep
    scores = FLOAT32 * args.n_heads                                 # the logarithm of their sum
    on_cpu = backend.device.type == "cpu"
    if on_cpu and backend.dtype == torch.bfloat16 and args.max_seq_len <= kernels.MAX_BLOCKED_LEN:
        n_keys = (args.max_seq_len + kernels.QUERY_BLOCK) / 2       # mean over the blocks of queries
        keys_and_values *= n_keys / kernels.QUERY_BLOCK             # each block copies them
        scores = (FLOAT32 + itemsize) * args.n_heads * n_keys
    elif on_cpu and args.dropout:
        scores = 3 * FLOAT32 * args.n_heads * args.max_seq_len      # dropout has no fused kernel on a CPU
    elif not on_cpu and not has_fused_attention(args, backend):
        scores = (FLOAT32 + itemsize) * args.n_heads * args.max_seq_len         # softmax and its 16-bit copy
    elif not on_cpu and itemsize == 2 and args.head_dim % FUSED_HEAD_DIM:
        queries_and_output += 4 * args.dim                          # copies with a larger head
    return itemsize * (queries_and_output + keys_and_values) + scores
