"""Where the numbers are crunched and in which format, chosen by what the machine has, with the reason."""
import os
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from settings import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# 16-bit products with sums in float32 and without sparsity, 10^12 operations a second: NVIDIA's data sheets
PEAK_TFLOPS = {r"\bB200\b": 2250, r"\bH200\b": 989, r"\bH100 PCIe": 756, r"\bH100\b": 989, r"\bA100\b": 312,
               r"\bL40S\b": 362, r"\bL4\b": 121, r"\bV100\b": 125, r"\bT4\b": 65, r"\bRTX 4090$": 165,
               r"\bRTX 3090$": 71}


@dataclass(frozen=True)
class Device:
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


def choose(device: str = "auto", dtype: str = "auto", training: bool = True) -> Device:
    """Turn the settings `device` and `dtype` into a Device; "auto" picks the best that is there.

    Raises:
        UserError: when the device is not there, or the format does not work on it.
    """
    where, why = _device(device)
    if dtype == "auto":
        chosen, format_why = _dtype(where, training)
    elif dtype in DTYPES:
        chosen, format_why = DTYPES[dtype], "as asked"
    else:
        raise UserError(f"--dtype {dtype} is unknown; use auto, {', '.join(DTYPES)}")
    if chosen == torch.float16 and where.type == "cpu" and (training or not _has_fbgemm()):
        raise UserError("--dtype float16 needs a GPU here; use auto, bfloat16 or float32 on the CPU")
    return Device(where, chosen, f"{why}; {format_why}")


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        return torch.device("cpu"), f"no GPU, {torch.get_num_threads()} threads"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda, cuda:1 or mps") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise UserError(f"--device {name} is not there: PyTorch {torch.__version__} sees {count.get(device.type, 0)} "
                        f"of that kind\n       use --device auto, or install a PyTorch for your GPU")
    return device, "as asked"


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


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU. On Windows it takes that of Microsoft."""
    return any(map(shutil.which, ("cl",) if os.name == "nt" else ("c++", "g++", "clang++")))
