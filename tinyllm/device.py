"""Where the numbers are crunched and in which format, chosen by what the machine has, with the reason."""
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllm.cli import UserError
from tinyllm.machine import available_cores

OUT_OF_MEMORY = "out of memory|can't allocate memory|ALLOC_FAILED|Invalid buffer size|could not create a primitive"
INSTALL = "https://pytorch.org/get-started"
NOT_UTF8 = "PyTorch's compiler reads its own files in the system's encoding, and cannot; PYTHONUTF8=1 lets it"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# 16-bit products with sums in float32 and without sparsity, 10^12 operations a second: NVIDIA's data sheets
PEAK_TFLOPS = {r"\bB200\b": 2250, r"\bH200\b": 989, r"\bH100 PCIe": 756, r"\bH100\b": 989, r"\bA100\b": 312,
               r"\bL40S\b": 362, r"\bL4\b": 121, r"\bV100\b": 125, r"\bT4\b": 65, r"\bRTX 4090$": 165,
               r"\bRTX 3090$": 71}


@dataclass(frozen=True)
class Backend:
    """A device, the format of its matrix products, and why these were chosen."""
    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{self.device} with {str(self.dtype).removeprefix('torch.')} ({self.reason})"

    def autocast(self) -> AbstractContextManager:
        """Matrix products in `dtype`, everything delicate in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def mfu(self, flops: float) -> float | None:
        """Model FLOP utilisation (PaLM, arXiv 2204.02311): `flops` a second, as a share of what the device can do.

        None for a device or a format whose peak is not known here.
        """
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        whole = not re.search(r"\b(MIG|NVL)\b", name)             # a part of a GPU, or another model of that name
        peaks = [peak for pattern, peak in PEAK_TFLOPS.items() if whole and re.search(pattern, name)]
        return flops / (peaks[0] * 1e12) if peaks else None

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps float16 gradients from vanishing; does nothing for the other formats."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose_backend(device: str = "auto", dtype: str = "auto", training: bool = True) -> Backend:
    """Turn the settings `device` and `dtype` into a Device; "auto" picks the best that is there.

    Raises:
        UserError: when the device is not there, or the format does not work on it, or PyTorch is too old.
    """
    if torch.__version__ < (2, 13):
        raise UserError(f"PyTorch {torch.__version__} is too old for this; pip install -r requirements.txt")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))        # PyTorch does not see a container's share
    where, why = _device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where.index or 0)             # for NCCL, and for whatever names no device
        # from the H100 on it comes first, and plans anew for each length of a text (read in PyTorch, not measured)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == "auto":
        chosen, format_why = _dtype(where, training)
    elif dtype in DTYPES:
        chosen, format_why = DTYPES[dtype], "as asked"
    else:
        raise UserError(f"--dtype {dtype} is unknown; use auto, {', '.join(DTYPES)}")
    if chosen == torch.float16 and where.type == "cpu" and (training or not _has_fbgemm()):
        raise UserError("--dtype float16 needs a GPU here; use auto, bfloat16 or float32 on the CPU")
    if chosen != torch.float32 and where.type == "mps":
        raise UserError("--dtype must be float32 on Apple's GPU: in 16 bits its attention looks at later tokens too "
                        "(pytorch/pytorch, issue 195910)")
    return Backend(where, chosen, f"{why}; {format_why}")


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        gpu = next((torch.device(kind) for kind in ("cuda", "mps") if device_count(kind)), None)
        problem = _probe_device(gpu) if gpu else _no_gpu()
        if problem:
            threads = torch.get_num_threads()
            return torch.device("cpu"), f"{problem}, {threads} thread{'s' * (threads > 1)}"
        return gpu, torch.cuda.get_device_name() if gpu.type == "cuda" else "Apple GPU"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda, cuda:1 or mps") from error
    if (device.index or 0) >= device_count(device.type):
        raise UserError(f"--device {name} is not there: PyTorch {torch.__version__} sees {device_count(device.type)} "
                        f"of that kind\n       use --device auto, or install a PyTorch for your GPU: {INSTALL}")
    if problem := _probe_device(device):
        raise UserError(f"--device {name}: {problem}\n       use --device cpu, or {INSTALL}")
    return device, "as asked"


def device_count(kind: str) -> int:
    """How many devices of a kind PyTorch can use."""
    return {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
            "mps": int(torch.backends.mps.is_available())}.get(kind, 0)


def _probe_device(device: torch.device) -> str:
    """Why nothing can be computed on a device; empty when it can. A GPU may be too old for this build of PyTorch.

    Raises UserError when its memory is full, since that passes.
    """
    try:
        with explain_oom(f"close what else uses {device}, or use --device cpu"):
            torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return f"the GPU cannot be used ({first:.100}); for an old one there is another PyTorch, see README"
    return ""


def _no_gpu() -> str:
    if not shutil.which("nvidia-smi"):
        return "no GPU"
    return ("no GPU for this PyTorch, which is made for CPUs; for NVIDIA's see README" if torch.version.cuda is None
            else f"no GPU for PyTorch with CUDA {torch.version.cuda}; is NVIDIA's driver older than that?")


@contextmanager
def explain_oom(advice: str) -> Iterator[None]:
    """Turn PyTorch's errors about memory into a UserError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_oom(error):
            raise
        raise UserError(f"there is not enough memory\n       {advice}") from error


def is_oom(error: BaseException) -> bool:
    """Whether an error, also of the libraries that PyTorch calls, says that memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(re.search(OUT_OF_MEMORY, str(error)))


def _dtype(device: torch.device, training: bool) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "it has bfloat16"
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return torch.float16, "it has no bfloat16; gradients are scaled"
        return torch.float32, "too old for 16-bit products"
    if device.type == "cpu" and training:
        has = torch.cpu.get_capabilities()
        for feature in ("amx_bf16", "avx512_bf16"):
            if has.get(feature):
                return torch.bfloat16, f"it has {feature}"
        return torch.float32, "no 16-bit products in hardware"
    if device.type == "cpu" and _has_fbgemm():
        return torch.float16, "for the weights; all else is float32"
    return torch.float32, "exact" if device.type == "cpu" else "the safe choice there"


def _has_fbgemm() -> bool:
    """Whether this PyTorch multiplies weights in float16 with float32 on a CPU: on x86 it does."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def why_no_headers() -> str:
    """Why compiled kernels cannot be called from Python; empty when they can."""
    there = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return "" if there else "Python's own headers are not there (Debian and Ubuntu: python3-dev)"


def why_no_compiler() -> str:
    """Why torch.compile cannot be had on a CPU; empty when it can. On Windows it takes Microsoft's C++ compiler."""
    if not any(map(shutil.which, ("cl",) if os.name == "nt" else ("c++", "g++", "clang++"))):
        return "there is no C++ compiler"
    if os.name == "posix" and " " in torch.__file__:        # which stands unquoted in the linker's command
        return "PyTorch is in a folder with a space in its name"
    return ""
