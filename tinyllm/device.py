"""Choose the device and the dtype from the hardware, and give the reason."""
import importlib.util
import logging
import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllm import compat
from tinyllm.cli import UserError
from tinyllm.machine import available_cores

INSTALL = "https://pytorch.org/get-started"
NOT_UTF8 = "PyTorch's compiler cannot read its own files in the system's encoding; set PYTHONUTF8=1"
NO_HEADERS = "Python's own headers are missing (Debian and Ubuntu: python3-dev)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Parts of the messages of PyTorch and its libraries when memory runs out. NVML then fails in some containers.
OUT_OF_MEMORY = ("out of memory|can't allocate memory|ALLOC(ATION)?_FAILED|Invalid buffer size|"
                 "could not create a primitive|Storage size calculation overflowed|"
                 "Failed to CUDA (calloc|malloc|host alloc)|NVML_SUCCESS == .*CUDACachingAllocator")
# Errors of a GPU that the user can fix: a part of CUDA's message; problem and fix
GPU_PROBLEMS = {
    "no kernel image is available": "this PyTorch build does not support the GPU; see docs/install.md",
    "driver version is insufficient|unsupported toolchain":
        "the NVIDIA driver is too old for this PyTorch; update the driver, or see docs/install.md",
    "busy or unavailable": "another process uses the GPU exclusively; find it with nvidia-smi, or use --device cpu",
    "uncorrectable ECC error|uncorrectable NVLink error|hardware stack error":
        "the GPU reports a hardware error; restart the machine, or choose another GPU: --device cuda:1",
    "the launch timed out": "the system stops long computations on a GPU with a display; use smaller batches"}
# Failures of PyTorch's compiler that the user can fix: a part of the message; problem and fix
COMPILER_PROBLEMS = {
    r"\[(?:Errno (?:13|28|30|122)|WinError 5)\] ([^:\n]+): '([^'\n]+)":      # no access, disk full or read-only
        r"\1: \2; set TORCHINDUCTOR_CACHE_DIR to another folder",
    r"failed to map segment": "programs do not run from the cache folder; set TORCHINDUCTOR_CACHE_DIR to another one",
    r"Cannot find a working triton": f"the package triton is missing or too old; install PyTorch again: {INSTALL}",
    r"too old to be supported by the triton": "the GPU is too old for PyTorch's compiler",
    r"Failed to find C compiler|No working C\+\+ compiler|Compiler: .* is not found":
        "no C++ compiler was found; install gcc and g++ (Debian and Ubuntu: build-essential)",
    r"Python\.h: No such file": NO_HEADERS,
    r"libcuda\.so cannot found": "triton does not find the NVIDIA driver's libcuda.so; run sudo ldconfig",
    r"not defined for option 'gpu-name'": f"triton does not know this GPU yet; install a newer PyTorch: {INSTALL}",
    r"unsupported toolchain": "the NVIDIA driver is too old for triton; update the driver",
    r"out of resource: ([\w ]+)": r"a compiled kernel needs more \1 than the GPU has",
    r"Command '\['(\S+?)', .*returned non-zero exit status": r"\1 failed; its message is above"}

# Peaks of dense 16-bit matrix products with float32 sums, as PyTorch computes them. Names as in the driver's list of
# supported GPUs (README of NVIDIA/open-gpu-kernel-modules), without "NVIDIA".
# Data-center GPUs, in 10^12 FLOP/s, from NVIDIA's data sheets; half of each figure that is given with sparsity.
PEAK_TFLOPS = {
    "Tesla V100-SXM2-16GB": 125, "Tesla V100-SXM2-32GB": 125, "Tesla V100-PCIE-16GB": 112, "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65, "A100-SXM4-40GB": 312, "A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "A100 80GB PCIe": 312,
    "A10": 125, "L4": 121, "L40S": 362, "H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "B200": 2250}
# Desktop GeForce cards: number of multiprocessors (SMs) and boost clock in MHz, from TechPowerUp's database. With
# GEFORCE_FLOPS they give the peaks in NVIDIA's whitepapers: 53.8 TFLOPS for the RTX 2080 Ti, 71 for the 3090 and 165.2
# for the 4090. These are half of the peaks with float16 sums, which advertisements show.
GEFORCE_FLOPS = 512                 # per SM and clock, RTX 20 to 50
GEFORCE_CLOCKS = {
    "RTX 2060": {30: 1680, 34: 1650}, "RTX 2060 SUPER": {34: 1650},
    "RTX 2070": {36: 1620}, "RTX 2070 SUPER": {40: 1770},
    "RTX 2080": {46: 1710}, "RTX 2080 SUPER": {48: 1815}, "RTX 2080 Ti": {68: 1545},
    "RTX 3050": {18: 1470, 20: 1777}, "RTX 3060": {28: 1777}, "RTX 3060 Ti": {38: 1665},
    "RTX 3070": {46: 1725}, "RTX 3070 Ti": {48: 1770}, "RTX 3080": {68: 1710, 70: 1710}, "RTX 3080 Ti": {80: 1665},
    "RTX 3090": {82: 1695}, "RTX 3090 Ti": {84: 1860},
    "RTX 4060": {24: 2460}, "RTX 4060 Ti": {34: 2535}, "RTX 4070": {46: 2475}, "RTX 4070 SUPER": {56: 2475},
    "RTX 4070 Ti": {60: 2610}, "RTX 4070 Ti SUPER": {66: 2610}, "RTX 4080": {76: 2505}, "RTX 4080 SUPER": {80: 2550},
    "RTX 4090": {128: 2520},
    "RTX 5050": {20: 2572}, "RTX 5060": {30: 2497}, "RTX 5060 Ti": {36: 2572}, "RTX 5070": {48: 2512},
    "RTX 5070 Ti": {70: 2452}, "RTX 5080": {84: 2617}, "RTX 5090": {170: 2407}}


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


def peak_tflops(gpu: Any) -> float | None:
    """Return the peak of a GPU in 10^12 FLOP/s, or None if it is not in the tables.

    gpu: the result of torch.cuda.get_device_properties.
    """
    name = gpu.name.removeprefix("NVIDIA ")
    if name in PEAK_TFLOPS:
        return PEAK_TFLOPS[name]
    card = name.removeprefix("GeForce ")
    clock = GEFORCE_CLOCKS.get(card, {}).get(gpu.multi_processor_count)
    if clock is None:
        return None
    # Laptops share names of the RTX 20 series; their clocks are at least 7% lower. Old PyTorch does not know clocks.
    if card.startswith("RTX 20") and getattr(gpu, "clock_rate", 0) < 0.97 * 1000 * clock:       # kHz
        return None
    return gpu.multi_processor_count * clock * GEFORCE_FLOPS / 1e6


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
    problem = _probe_device(gpu) if gpu else _why_no_gpu()
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
    if problem := _probe_device(device):
        raise UserError(f"--device {name}: {problem}\n       use --device cpu, or another PyTorch build: {INSTALL}")
    return device, "requested"


def device_count(kind: str) -> int:
    """Return the number of devices of a kind that PyTorch can use."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "mps": int(torch.backends.mps.is_available())}.get(kind, 0)


def has_async_copies(device: torch.device) -> bool:
    """True if a device can copy tensors while the CPU continues: on all GPUs but Apple's, which read pinned memory."""
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


def _probe_device(device: torch.device) -> str:
    """Return the reason why a device cannot compute, or "". A GPU may be too old for this PyTorch build.

    Raises UserError if its memory is full, because that is temporary.
    """
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, MemoryError) as error:
        if is_oom(error):
            raise UserError(f"not enough memory\n       close other programs that use {device}, or use --device cpu"
                            ) from error
        if problem := gpu_problem(error):
            return f"the GPU cannot be used: {problem}"
        first_line = str(error).splitlines()[0]
        return f"the GPU cannot be used ({first_line:.100}); for old GPUs see docs/install.md"
    return ""


def _why_no_gpu() -> str:
    if not shutil.which("nvidia-smi"):
        return "no GPU"
    if torch.version.cuda is None:
        return "no GPU, because this PyTorch is a CPU build; for NVIDIA GPUs see docs/install.md"
    return f"no GPU for PyTorch with CUDA {torch.version.cuda}; the NVIDIA driver may be too old"


@contextmanager
def explain_device_errors(oom_advice: str | Callable[[], str]) -> Iterator[None]:
    """Turn errors of PyTorch that the user can fix into a UserError. oom_advice: the fix when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_oom(error):
            advice = oom_advice if isinstance(oom_advice, str) else oom_advice()
            raise UserError(f"not enough memory\n       {advice}") from error
        if problem := gpu_problem(error):
            raise UserError(problem.replace("; ", "\n       ")) from error
        raise


def is_oom(error: BaseException) -> bool:
    """True if an error of PyTorch, or of a library that it calls, means that memory ran out."""
    return any(isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or re.search(OUT_OF_MEMORY, str(cause))
               for cause in error_chain(error))


def error_chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and the errors that led to it, such as out of memory while a CUDA graph was recorded."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def gpu_problem(error: BaseException) -> str:
    """Return the problem and the fix of GPU_PROBLEMS for an error; "" for other errors, such as bugs."""
    problems = [problem for pattern, problem in GPU_PROBLEMS.items() if re.search(pattern, str(error))]
    return problems[0] if problems else ""


def compiler_problem(error: BaseException) -> str:
    """Return in one sentence why compiling failed, with the fix if COMPILER_PROBLEMS has one."""
    while hasattr(error, "inner_exception"):        # PyTorch wraps the compiler's error
        error = error.inner_exception
    if isinstance(error, UnicodeError):
        return NOT_UTF8
    for pattern, problem in COMPILER_PROBLEMS.items():
        if match := re.search(pattern, str(error)):
            return match.expand(problem)
    return f"{_telling_line(error):.200}"


def _telling_line(error: BaseException) -> str:
    """Return a C++ compiler's first error, the last line of a subprocess's traceback, or the first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    compiler_errors = [line for line in lines if re.search(r"\berror: ", line)]
    python_errors = [line for line in lines if re.match(r"[\w.]+(?:Error|Exception): ", line)]
    return [*compiler_errors, *reversed(python_errors), lines[0]][0]


def hide_compiler_messages() -> None:
    """Hide warnings and logs of PyTorch's compiler, unless TORCH_LOGS is set. Its errors go to compiler_problem."""
    if "TORCH_LOGS" not in os.environ:
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|functorch)\b")
        for name in ("torch._inductor", "torch._functorch"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _named_dtype(name: str, device: torch.device, training: bool) -> tuple[torch.dtype, str]:
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is unknown; expected auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu" and (training or not _has_fbgemm()):
        raise UserError("--dtype float16 needs a GPU here; expected auto, bfloat16 or float32 on a CPU")
    if name != "float32" and device.type == "mps":
        raise UserError("--dtype must be float32 on Apple GPUs, where 16-bit attention looks at later tokens "
                        "(pytorch/pytorch, issue 195910)")
    return DTYPES[name], "requested"


def _auto_dtype(device: torch.device, training: bool) -> tuple[torch.dtype, str]:
    if device.type == "mps":
        return torch.float32, "16-bit attention is wrong on Apple GPUs"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
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
