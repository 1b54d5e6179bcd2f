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
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fake_backend import NAME, FusedAttention, is_on_device, register_device, stand_ins
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyllm import device as devices

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = (ROOT, ROOT / "tinyllm", ROOT / "extras", ROOT / "tests")
NO_CALLERS = (__file__, devices.__file__)
NOT_YET = -1                                        # value of an asynchronous copy before its event
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default: 1, aten.is_nonzero.default: True, aten.equal.default: True}


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
        has_device = any(map(is_on_device, tensors)) or torch.device(kwargs.get("device") or "cpu").type == NAME
        if op.namespace != "aten" or not has_device:
            if self.refuses_cpu and op.namespace == "aten":
                raise WrongOnDevice(f"{op} runs on the CPU at {caller()}")
            return op(*args, **kwargs)
        if op._can_decompose():                     # under inference_mode, PyTorch leaves that to the mode
            with self:
                return op.decompose(*args, **kwargs)
        if op in READS:
            self.record("read")
            return READS[op]
        if op in (aten._to_copy.default, aten.copy_.default):
            return self._copy(op, args, kwargs)
        check_mixture(op, tensors)
        return self._run(op, args, kwargs)

    def _copy(self, op, args, kwargs):
        is_async = kwargs.get("non_blocking", False) or args[2:] == (True,)
        source = args[1] if op is aten.copy_.default else args[0]
        if not is_on_device(source):
            self.record("upload" if is_async and hasattr(source, "is_fast") else "pageable")
            return self._run(op, args, kwargs)
        if op is aten.copy_.default:
            copy = args[0]
        elif torch.device(kwargs.get("device") or NAME).type == NAME:
            copy = source
        else:
            copy = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return self._run(op, args, kwargs) if is_on_device(copy) else self._download(copy, is_async)

    def _download(self, copy, is_async):
        self.record("download" if is_async else "read")
        if is_async:
            self._in_flight.append(copy)
        return copy.fill_(NOT_YET if is_async else 1)

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


@contextmanager
def fake_device():
    """Run a block with the device."""
    register_device()
    device = FakeDevice()
    with stand_ins() as patch, device:
        patch.setattr(F, "cpu_attention", F.scaled_dot_product_attention, raising=False)
        patch.setattr(F, "scaled_dot_product_attention", device.attention)
        patch.setattr(devices, "record_event", device.record_event)
        yield device
