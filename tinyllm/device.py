"""Choose the device and the dtype from the hardware, and give the reason. Copy tensors without making the CPU wait."""
import importlib.util
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinyllm import compat
from tinyllm.cli import UserError
from tinyllm.device_errors import INSTALL, NO_HEADERS, gpu_problem, is_oom
from tinyllm.gpu_peaks import peak_tflops
from tinyllm.machine import available_cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Backend:
    """A device, the dtype of its matrix products, and the reason for both."""
    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{self.device} with {str(self.dtype).removeprefix('torch.')} ({self.reason})"

    def autocast(self) -> AbstractContextManager:
        """Return a context that computes matrix products in `dtype` and sensitive operations in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler, which keeps float16 gradients from vanishing; disabled for the other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def mfu(self, flops: float) -> float | None:
        """Return the model FLOP utilization (PaLM, arXiv 2204.02311): `flops` per second as a share of the peak.

        Returns None without a known peak, as in float32 or for bfloat16 that the GPU only emulates.
        """
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        gpu = torch.cuda.get_device_properties(self.device)
        if self.dtype == torch.bfloat16 and gpu.major < 8:
            return None
        peak = peak_tflops(gpu)
        return flops / (peak * 1e12) if peak else None


def choose_backend(device: str = "auto", dtype: str = "auto", training: bool = True) -> Backend:
    """Return the Backend for the settings `device` and `dtype`; "auto" picks the best that works.

    Raises UserError if the device does not exist, the dtype does not work on it, or PyTorch is too old.
    """
    compat.check_pytorch()
    if "OMP_NUM_THREADS" not in os.environ:     # PyTorch ignores a container's CPU limit
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    chosen_device, device_reason = _auto_device() if device == "auto" else _named_device(device)
    if chosen_device.type == "cuda":
        torch.cuda.set_device(chosen_device.index or 0)     # NCCL and calls without a device use this one
        # From the H100 on, PyTorch prefers cuDNN's attention, which plans again for each length (not measured).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == "auto":
        chosen_dtype, dtype_reason = _auto_dtype(chosen_device, training)
    else:
        chosen_dtype, dtype_reason = _named_dtype(dtype, chosen_device, training)
    return Backend(chosen_device, chosen_dtype, f"{device_reason}; {dtype_reason}")


def _auto_device() -> tuple[torch.device, str]:
    gpu = next((torch.device(kind) for kind in ("cuda", "mps") if device_count(kind)), None)
    problem = "; ".join(_probe_device(gpu) or ()) if gpu else _why_no_gpu()
    if problem:
        threads = torch.get_num_threads()
        return torch.device("cpu"), f"{problem}, {threads} thread{'s' if threads > 1 else ''}"
    return gpu, torch.cuda.get_device_name() if gpu.type == "cuda" else "Apple GPU"


def _named_device(name: str) -> tuple[torch.device, str]:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown; expected auto, cpu, cuda, cuda:1 or mps") from error
    count = device_count(device.type)
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} was not found: PyTorch {torch.__version__} sees {count} of that kind\n"
                        f"       use --device auto, or install a PyTorch build for your GPU: {INSTALL}")
    if reason := _probe_device(device):
        problem, fix = reason
        raise UserError(f"--device {name}: {problem}\n       {fix}; or use --device cpu")
    return device, "requested"


def device_count(kind: str) -> int:
    """Return the number of devices of a kind that PyTorch can use."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "mps": int(torch.backends.mps.is_available())}.get(kind, 0)


def has_async_copies(device: torch.device) -> bool:
    """True for GPUs other than Apple's: they copy tensors from and to pinned memory while the CPU continues."""
    return device.type not in ("cpu", "mps")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device. A GPU copies from pinned memory, so that the CPU does not wait for it."""
    if not has_async_copies(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a device's tensor on the CPU. A GPU makes it while the CPU continues; `read` waits for it."""

    def __init__(self, tensor: Tensor):
        is_async = has_async_copies(tensor.device)
        self._copy = tensor.to("cpu", non_blocking=is_async)        # from a GPU to pinned memory
        self._event = record_event(tensor.device) if is_async else None

    def read(self) -> Tensor:
        """Return the copy after it is complete."""
        if self._event:
            self._event.synchronize()
            self._event = None
        return self._copy


def record_event(device: torch.device) -> torch.cuda.Event:
    """Return an event that marks the end of all work that the GPU has been given so far."""
    return torch.cuda.current_stream(device).record_event()


def _probe_device(device: torch.device) -> tuple[str, str] | None:
    """Return why a device cannot compute, and the fix, or None. A GPU may be too old for this PyTorch build.

    Raises UserError if its memory is full, because that is temporary.
    """
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, MemoryError) as error:
        if is_oom(error):
            raise UserError(f"not enough memory\n       close other programs that use {device}, or use --device cpu"
                            ) from error
        first_line = str(error).splitlines()[0]
        problem, fix = gpu_problem(error) or (f"{first_line:.100}", "for old GPUs see docs/install.md")
        return f"the GPU cannot be used: {problem}", fix
    return None


def _why_no_gpu() -> str:
    if not shutil.which("nvidia-smi"):
        return "no GPU"
    if torch.version.cuda is None:
        return "no GPU, because this PyTorch is a CPU build; for NVIDIA GPUs see docs/install.md"
    return f"no GPU for PyTorch with CUDA {torch.version.cuda}; the NVIDIA driver may be too old"


def _named_dtype(name: str, device: torch.device, training: bool) -> tuple[torch.dtype, str]:
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is unknown; expected auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu" and (training or not _has_fbgemm()):
        raise UserError("--dtype float16 needs a GPU here; expected auto, bfloat16 or float32 on a CPU")
    if name != "float32" and device.type == "mps":
        raise UserError("--dtype must be float32 on Apple GPUs, where 16-bit attention looks at later tokens "
                        "(pytorch/pytorch, issue 195910)")
    if name == "bfloat16" and not has_bfloat16(device):
        return torch.bfloat16, "requested, but not in the hardware of this GPU"
    return DTYPES[name], "requested"


def _auto_dtype(device: torch.device, training: bool) -> tuple[torch.dtype, str]:
    if device.type == "mps":
        return torch.float32, "16-bit attention is wrong on Apple GPUs"
    if device.type == "cuda":
        if has_bfloat16(device):
            return torch.bfloat16, "bfloat16 in hardware"
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return torch.float16, "no bfloat16 in hardware; gradients are scaled"
        return torch.float32, "GPU too old for 16-bit products"
    if not training:
        return (torch.float16, "float16 weights, float32 for the rest") if _has_fbgemm() else (torch.float32, "exact")
    for feature in ("amx_bf16", "avx512_bf16"):
        if compat.cpu_features().get(feature):
            return torch.bfloat16, f"the CPU has {feature}"
    return torch.float32, "no 16-bit products in hardware"


def has_bfloat16(device: torch.device) -> bool:
    """True unless an NVIDIA GPU only emulates bfloat16, as before compute capability 8.0."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _has_fbgemm() -> bool:
    """True if this PyTorch multiplies float16 weights with float32 on a CPU, as on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def why_no_headers() -> str:
    """Return the reason why compiled kernels cannot be called from Python, or ""."""
    return "" if Path(sysconfig.get_path("include"), "Python.h").is_file() else NO_HEADERS


def why_no_triton(device: torch.device) -> str:
    """Return the reason why torch.compile does not work on an NVIDIA GPU, or ""."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is too old for PyTorch's compiler"
    if not importlib.util.find_spec("triton"):
        return "the package triton is missing"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if os.name == "posix" and not any(map(shutil.which, compilers)):        # on Windows, triton has its own
        return "no C compiler was found"
    return why_no_headers()


def why_no_compiler() -> str:
    """Return the reason why torch.compile does not work on a CPU, or ""."""
    compilers = ("cl",) if os.name == "nt" else ("c++", "g++", "clang++")   # cl is Microsoft's
    if not any(map(shutil.which, compilers)):
        return "no C++ compiler was found"
    if os.name == "posix" and " " in torch.__file__:        # the linker command does not quote the path
        return "the path of PyTorch contains a space"
    return ""
