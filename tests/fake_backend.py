"""Registers a device that does not exist with PyTorch. fake_device.py runs code on it."""
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch cannot register a device from Python", allow_module_level=True)

NAME = "gpu"
DEVICE = torch.device("privateuseone", 0)       # PyTorch's name for the device of an extension, until it is registered

# the rules of autocast on CUDA, for the operations of the models
TO_16_BITS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear")
TO_FLOAT32 = ("exp", "log", "rsqrt", "reciprocal", "pow.Tensor_Scalar", "sum", "sum.dim_IntList", "cumsum",
              "softmax.int", "log_softmax.int", "layer_norm", "rms_norm", "nll_loss", "linalg_vector_norm")


@cache
def register_device() -> list[torch.library.Library]:
    """Register the device, with CUDA's autocast. Returns objects that must stay alive."""
    # Autograd counts devices once. If it started threads for this one, this process could not fork, as other tests do.
    torch.ones(1, requires_grad=True).sum().backward()
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch.gpu.rng_state = [0]
    torch.gpu.get_rng_state = lambda _: torch.tensor(torch.gpu.rng_state, dtype=torch.uint8)
    torch.gpu.set_rng_state = lambda state, _: setattr(torch.gpu, "rng_state", state.tolist())
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    rules = torch.library.Library("aten", "IMPL")
    for name in TO_16_BITS + TO_FLOAT32:
        rules.impl(name, partial(run_in_dtype, name), "AutocastPrivateUse1")
    return [others, rules]


def run_in_dtype(name: str, *args, **kwargs):
    """Run an operation under autocast."""
    dtype = torch.get_autocast_dtype(NAME) if name in TO_16_BITS else torch.float32
    packet, _, overload = name.partition(".")

    def cast(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() and is_on_device(tensor) else tensor
    args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return getattr(getattr(torch.ops.aten, packet), overload or "default")(*args, **kwargs)


def is_on_device(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


# ---- stand-ins for parts of PyTorch -------------------------------------------------------------

class DeviceGenerator(torch.Generator):
    """A generator of any device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class FusedAttention(torch.autograd.Function):
    """Attention in one operation, as on CUDA."""

    @staticmethod
    def forward(ctx, *qkv):
        ctx.save_for_backward(*qkv)
        return torch.empty_like(qkv[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def pin_memory(tensor: Tensor) -> Tensor:
    """Return ordinary memory with an attribute."""
    copy = tensor.clone()
    copy.is_fast = True
    return copy


def move_module(module: nn.Module, *args) -> nn.Module:
    """Do what Module.to does. It would set the data of parameters, which FakeTensorMode does not allow."""
    moved = {None: None}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight not in moved:
                moved[weight] = nn.Parameter(weight.detach().to(*args), weight.requires_grad)
            part._parameters[name] = moved[weight]
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(*args)
    return module


@contextmanager
def stand_ins():
    """Replace these parts of PyTorch during the block. Yields a MonkeyPatch for more."""
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        patch.setattr(FakeTensorMode, "avoid_device_init", True)
        patch.setattr(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())       # one read, not one per element
        patch.setattr(Tensor, "pin_memory", pin_memory)
        patch.setattr(nn.Module, "to", move_module)
        patch.setattr(torch, "Generator", DeviceGenerator)
        torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor(..., device=DEVICE) copies from the CPU
        try:
            yield patch
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
