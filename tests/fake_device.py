"""A device that does not exist: it finds code that would fail or wait on a GPU, on a machine without one.

    with fake_device() as device:
        model.to(DEVICE)
        ...                                         # any code of the project, with Backend(DEVICE, dtype, "fake")
    assert not device.lines("read")

Tensors on the device have a shape and a dtype, but no values (FakeTensorMode). Tensors on the CPU are real, and values
that come from the device are 1. An operation raises WrongOnDevice if a GPU would refuse it or make the CPU wait for it.
"""
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tinyllm import device as devices

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch cannot register a device from Python", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = (ROOT, ROOT / "tinyllm", ROOT / "extras", ROOT / "tests")
NO_CALLERS = (__file__, devices.__file__)
NAME = "gpu"
DEVICE = torch.device("privateuseone", 0)           # a device that PyTorch leaves to extensions; then called NAME
NOT_YET = -1                                        # value of an asynchronous copy before its event

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default: 1, aten.is_nonzero.default: True, aten.equal.default: True}
# the rules of autocast on CUDA, for the operations of the models
TO_16_BITS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear")
TO_FLOAT32 = ("exp", "log", "rsqrt", "reciprocal", "pow.Tensor_Scalar", "sum", "sum.dim_IntList", "cumsum",
              "softmax.int", "log_softmax.int", "layer_norm", "rms_norm", "nll_loss", "linalg_vector_norm")


class WrongOnDevice(AssertionError):
    """An operation that a GPU would refuse or make the CPU wait for."""


class FakeDevice(TorchDispatchMode):
    """The device, with a record of its work.

    Attributes:
        events: kind and line of each slow operation. "read": the CPU waits for values; "download": asynchronous copy to
            the CPU; "wait": the CPU waits for downloads; "upload": asynchronous copy from pinned memory; "pageable":
            another copy to the device; "float64"; "boolean": a mask that attention would convert in each layer.
        dtypes: operations and the dtypes of their floating-point arguments and results.
        refuses_cpu: True while a CUDA graph is recorded, because a graph does not repeat work of the CPU.
    """

    def __init__(self):
        super().__init__()
        self.events: list[tuple[str, str]] = []
        self.dtypes: set[tuple[str, torch.dtype]] = set()
        self.refuses_cpu = False
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._in_flight: list[Tensor] = []

    def lines(self, kind: str) -> list[str]:
        """Return the lines of the project with events of a kind."""
        return [line for recorded, line in self.events if recorded == kind]

    def record(self, kind: str) -> None:
        self.events.append((kind, caller()))

    def record_event(self, _) -> SimpleNamespace:
        """Return an event. Waiting for it completes the downloads that were started before it."""
        copies, self._in_flight = self._in_flight, []

        def synchronize():
            if copies:
                self.record("wait")
            while copies:
                copies.pop().fill_(1)
        return SimpleNamespace(synchronize=synchronize)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        target = torch.device(kwargs.get("device") or (NAME if any(map(is_on_device, tensors)) else "cpu")).type
        if op.namespace != "aten":
            return op(*args, **kwargs)
        if target == "cpu" and not any(map(is_on_device, tensors)):
            if self.refuses_cpu:
                raise WrongOnDevice(f"{op} runs on the CPU at {caller()}")
            return op(*args, **kwargs)
        if op._can_decompose():                     # under inference_mode, PyTorch leaves that to the mode
            with self:
                return op.decompose(*args, **kwargs)
        if op in READS:
            self.record("read")
            return READS[op]
        if op in (aten._to_copy.default, aten.copy_.default):
            return self._copy(op, target, args, kwargs)
        check_mixture(op, tensors)
        return self._run(op, args, kwargs)

    def _copy(self, op, target, args, kwargs):
        *destination, source = args[:2] if op is aten.copy_.default else args
        is_async = kwargs.get("non_blocking", False) or args[2:] == (True,)
        if is_on_device(source) and (target == "cpu" or destination and not is_on_device(destination[0])):
            self.record("download" if is_async else "read")
            copy = destination[0] if destination else torch.empty(source.shape, dtype=kwargs.get("dtype", source.dtype))
            if is_async:
                self._in_flight.append(copy)
            return copy.fill_(NOT_YET if is_async else 1)
        if not is_on_device(source):
            self.record("upload" if is_async and hasattr(source, "is_fast") else "pageable")
        return self._run(op, args, kwargs)

    def _run(self, op, args, kwargs):
        with self._fakes:
            try:
                result = op(*args, **kwargs)
            except DynamicOutputShapeException as error:
                raise WrongOnDevice(f"{op} waits for a shape at {caller()}") from error
        values = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        dtypes = {value.dtype for value in values if value.is_floating_point() or value.is_complex()}
        self.dtypes |= {(op.name().removeprefix("aten::"), dtype) for dtype in dtypes}
        if dtypes & {torch.float64, torch.complex128}:
            self.record("float64")
        return result

    def attention(self, q, k, v, attn_mask=None, *args, **kwargs):
        """Stand in for F.scaled_dot_product_attention, because CUDA's fused kernels have no operations inside."""
        if not is_on_device(q):
            return F.cpu_attention(q, k, v, attn_mask, *args, **kwargs)
        if torch.is_autocast_enabled(NAME):
            q, k, v = [tensor.to(torch.get_autocast_dtype(NAME)) for tensor in (q, k, v)]
        tensors = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            self.record("boolean")
            tensors.pop()
        self.dtypes |= {("attention", tensor.dtype) for tensor in tensors}
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            raise WrongOnDevice(f"attention of different tensors at {caller()}")
        return FusedAttention.apply(q, k, v)


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *qkv):
        ctx.save_for_backward(*qkv)
        return torch.empty_like(qkv[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def is_on_device(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def check_mixture(op, tensors: list[Tensor]) -> None:
    """Check that all tensors are on the device. An elementwise operation may have a scalar of the CPU."""
    for tensor in tensors:
        if not is_on_device(tensor) and (tensor.dim() or torch.Tag.pointwise not in op.tags):
            raise WrongOnDevice(f"{op} has a tensor on the CPU at {caller()}")


def caller() -> str:
    """Return the innermost line of the project on the stack, except in device.py: "train.py:180 train_step"."""
    frame = sys._getframe(1)
    while (path := Path(frame.f_code.co_filename)).parent not in CODE_FOLDERS or str(path) in NO_CALLERS:
        frame = frame.f_back
    return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


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
        return getattr(getattr(aten, packet), overload or "default")(*args, **kwargs)


class DeviceGenerator(torch.Generator):
    """A generator of any device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def pin(tensor: Tensor) -> Tensor:
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
def fake_device():
    """Run a block with the device."""
    register_device()
    device = FakeDevice()
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False), device:
        patch.setattr(FakeTensorMode, "avoid_device_init", True)
        patch.setattr(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())       # one read, not one per element
        patch.setattr(Tensor, "pin_memory", pin)
        patch.setattr(nn.Module, "to", move_module)
        patch.setattr(torch, "Generator", DeviceGenerator)
        patch.setattr(F, "cpu_attention", F.scaled_dot_product_attention, raising=False)
        patch.setattr(F, "scaled_dot_product_attention", device.attention)
        patch.setattr(devices, "record_event", device.record_event)
        torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor(..., device=DEVICE) copies from the CPU
        try:
            yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
