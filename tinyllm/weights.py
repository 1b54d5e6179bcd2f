"""The weights of model.py arranged for writing: few and large matrices, in the format that is asked for."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import RMSNorm, TransformerBlock

LinearFn = Callable[[Tensor], Tensor]                # (rows, in) -> (rows, out)


def fuse_layer_weights(layer: TransformerBlock, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four matrices of a layer: to queries, keys and values; from attention; to both of w1 and w3; w2."""
    attention, feed_forward = layer.attention, layer.feed_forward
    wq, wk, wv, wo, w1, w2, w3 = (to_float32_on(device, part) for part in (
        attention.wq, attention.wk, attention.wv, attention.wo, feed_forward.w1, feed_forward.w2, feed_forward.w3))
    qkv = torch.cat((wq * attention.args.head_dim ** -0.5, wk, wv)) * folded_norm_weight(layer.attention_norm, device)
    return qkv, wo, torch.cat((w1, w3)) * folded_norm_weight(layer.ffn_norm, device), w2


def folded_norm_weight(norm: RMSNorm, device: torch.device) -> Tensor:
    """What the engine's `_norm` leaves out: the gain, and the factor that makes a sum of squares a mean."""
    return to_float32_on(device, norm) * norm.weight.numel() ** 0.5


def to_float32_on(device: torch.device, part: nn.Module) -> Tensor:
    """The weight of a part, on a device, and in float32 before any product."""
    return part.weight.to(device, torch.float32)


def linear(weight: Tensor, dtype: torch.dtype) -> LinearFn:
    """Weights, inputs and results in `dtype`."""
    weight = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight)


def linear_fp16(weight: Tensor, dtype: torch.dtype) -> LinearFn:
    """Weights in float16, everything else in float32, on a CPU (FBGEMM, arXiv 2101.05615)."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
    product = torch.ops.quantized.linear_dynamic_fp16.default._op       # without a look at each argument, in Python
    return lambda x: product(x, packed)


def linear_int8(weight: Tensor, dtype: torch.dtype) -> LinearFn:
    """Weights as 8-bit integers with a scale for each row, inputs and results in bfloat16."""
    if weight.shape[1] % 16:                # PyTorch's kernel reads beyond the end of such rows
        return linear(weight, torch.float32)
    levels, scale = quantize_int8(weight)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), levels, scale)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 levels: the levels, int8, and the scale of each row, bfloat16."""
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    return (weight / scale[:, None]).round().to(torch.int8), scale
