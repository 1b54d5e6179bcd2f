"""Translate errors of PyTorch, CUDA and compilers that the user can fix. Bugs keep their traceback."""
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tinyllm.cli import UserError

INSTALL = "https://pytorch.org/get-started"
NOT_UTF8 = "PyTorch's compiler cannot read its own files in the system's encoding; set PYTHONUTF8=1"
NO_HEADERS = "Python's own headers are missing (Debian and Ubuntu: python3-dev)"

# Patterns in the messages of PyTorch and its libraries when memory runs out. In some containers, an NVML call fails
# instead.
OUT_OF_MEMORY = ("out of memory|can't allocate memory|ALLOC(ATION)?_FAILED|Invalid buffer size|"
                 "could not create a primitive|Storage size calculation overflowed|"
                 "Failed to CUDA (calloc|malloc|host alloc)|NVML_SUCCESS == .*CUDACachingAllocator")
# Errors of a GPU that the user can fix: pattern in CUDA's message, problem and fix
GPU_PROBLEMS = {
    "no kernel image is available": ("this PyTorch build does not support the GPU", "see docs/install.md"),
    "driver version is insufficient|unsupported toolchain":
        ("the NVIDIA driver is too old for this PyTorch", "update the driver, or see docs/install.md"),
    "busy or unavailable": ("another process uses the GPU exclusively", "find it with nvidia-smi"),
    "uncorrectable ECC error|uncorrectable NVLink error|hardware stack error":
        ("the GPU reports a hardware error", "restart the machine, or choose another GPU: --device cuda:1"),
    "the launch timed out": ("the system stops long computations on a GPU with a display", "use smaller batches")}
# Failures of PyTorch's compiler that the user can fix: pattern in the message; problem and fix
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


@contextmanager
def explain_device_errors(oom_advice: str | Callable[[], str]) -> Iterator[None]:
    """Turn errors of PyTorch that the user can fix into a UserError. oom_advice: the fix when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_oom(error):
            advice = oom_advice if isinstance(oom_advice, str) else oom_advice()
            raise UserError(f"not enough memory\n       {advice}") from error
        if reason := gpu_problem(error):
            raise UserError("\n       ".join(reason)) from error
        raise
    except OSError as error:            # importing PyTorch's compiler, also for an optimizer, creates its cache folder
        if not _is_in_compiler_cache(error.filename):
            raise
        raise UserError(f"{error.strerror}: {error.filename}\n"
                        "       set TORCHINDUCTOR_CACHE_DIR to a folder that can be written") from error


def _is_in_compiler_cache(path: str | None) -> bool:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return "torchinductor_" in str(path)            # PyTorch's default: torchinductor_USER
    return path is not None and Path(path).is_relative_to(folder)


def is_oom(error: BaseException) -> bool:
    """True if an error of PyTorch, or of a library that it calls, means that memory ran out."""
    return any(isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or re.search(OUT_OF_MEMORY, str(cause))
               for cause in error_chain(error))


def error_chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and the errors that led to it, such as out of memory while a CUDA graph was recorded."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def gpu_problem(error: BaseException) -> tuple[str, str] | None:
    """Return the problem and the fix of GPU_PROBLEMS for an error; None for other errors, such as bugs."""
    for pattern, reason in GPU_PROBLEMS.items():
        if re.search(pattern, str(error)):
            return reason
    return None


def compiler_problem(error: BaseException) -> str:
    """Return in one sentence why compiling failed, with the fix if COMPILER_PROBLEMS has one."""
    while hasattr(error, "inner_exception"):        # PyTorch wraps the compiler's error
        error = error.inner_exception
    if isinstance(error, UnicodeError):
        return NOT_UTF8
    for pattern, problem in COMPILER_PROBLEMS.items():
        if match := re.search(pattern, str(error)):
            return match.expand(problem)
    return f"{_most_specific_line(error):.200}"


def _most_specific_line(error: BaseException) -> str:
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
