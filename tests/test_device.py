"""The choice of device and dtype on simulated machines."""
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch._inductor.compile_worker.subproc_pool import SubprocException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from tinyllm import compat, device, device_errors, gpu_peaks
from tinyllm.cli import UserError


@pytest.fixture
def machine(monkeypatch):
    """Simulate this hardware."""
    def pretend(cuda=False, bf16=False, capability=(8, 0), mps=False, features=(), fails=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        monkeypatch.setattr(torch.cuda, "set_device", lambda *a: None)
        monkeypatch.setattr(device.shutil, "which", lambda name: None)
        ones = torch.ones

        def on_device(*size, device="cpu"):             # available devices compute
            if fails and device.type != "cpu":
                raise fails
            return ones(*size)
        monkeypatch.setattr(torch, "ones", on_device)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(compat, "cpu_features", lambda: dict.fromkeys(features, True))
    return pretend


@pytest.mark.parametrize("hardware, expected", [
    (dict(cuda=True, bf16=True), ("cuda", torch.bfloat16)),
    (dict(cuda=True, capability=(7, 5)), ("cuda", torch.float16)),
    (dict(cuda=True, capability=(6, 1)), ("cuda", torch.float32)), (dict(mps=True), ("mps", torch.float32)),
    (dict(features=["avx512_bf16"]), ("cpu", torch.bfloat16)), (dict(features=["avx2"]), ("cpu", torch.float32))])
def test_best_available_device(machine, hardware, expected):
    machine(**hardware)
    chosen = device.choose_backend()
    assert (chosen.device.type, chosen.dtype) == expected and str(chosen).count("(") == 1 and chosen.reason
    assert chosen.scaler().is_enabled() == (chosen.dtype == torch.float16)


def test_gpu_that_does_not_compute_is_not_used(machine):
    machine(cuda=True, capability=(6, 1), fails=RuntimeError("CUDA error: invalid device ordinal\nand more"))
    chosen = device.choose_backend()
    assert chosen.device.type == "cpu" and "used: CUDA error: invalid device ordinal; " in chosen.reason
    with pytest.raises(UserError, match="invalid device ordinal.*\n.*--device cpu"):
        device.choose_backend("cuda")


# Texts of PyTorch 2.6 to 2.13, NCCL 2, Triton 3 and CUDA 13, with other numbers and paths
ASYNCHRONOUS = """
Search for `cudaError' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 1.95 GiB"),
    torch.OutOfMemoryError("CUDA out of memory. Allocation was preemptively rejected because it would exceed"),
    RuntimeError(f"CUDA error: out of memory{ASYNCHRONOUS}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1407, '
                 "please report a bug to PyTorch. "),
    RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
                 "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
                 "Failed to CUDA calloc async 608 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("could not create a primitive"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")]
GPU_PROBLEMS = [
    ("no kernel image is available for execution on the device", "does not support the GPU\n .*docs/install.md"),
    ("CUDA driver version is insufficient for CUDA runtime version", "driver is too old.*\n .*update the driver"),
    ("the provided PTX was compiled with an unsupported toolchain.", "driver is too old.*\n .*update the driver"),
    ("CUDA-capable device(s) is/are busy or unavailable", "another process.*\n .*nvidia-smi"),
    ("uncorrectable ECC error encountered", "hardware error\n .*restart"),
    ("uncorrectable NVLink error detected during the execution", "hardware error\n .*restart"),
    ("the launch timed out and was terminated", "display\n .*smaller batches")]
BUGS = ["device-side assert triggered", "an illegal memory access was encountered", "unspecified launch failure",
        "operation not permitted when stream is capturing"]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_gpu_with_full_memory_is_a_user_error(machine, error):
    machine(cuda=True, fails=error)
    with pytest.raises(UserError, match="not enough memory\n.*close other programs that use cuda"):
        device.choose_backend()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_gets_advice(error):
    for advice in "lower --dim", lambda: "lower --dim":
        with pytest.raises(UserError, match="^not enough memory\n       lower --dim$"):
            with device_errors.explain_device_errors(advice):
                raise error


def test_out_of_memory_inside_a_cuda_graph_is_found():
    """The end of the recording then fails too, with another error."""
    with pytest.raises(UserError, match="not enough memory"), device_errors.explain_device_errors(""):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("text, says", GPU_PROBLEMS)
def test_gpu_problem_names_the_fix(machine, text, says):
    error = RuntimeError(f"CUDA error: {text}{ASYNCHRONOUS}")
    with pytest.raises(UserError, match=f"^[^\n]*{says}[^\n]*$"), device_errors.explain_device_errors(""):
        raise error
    machine(cuda=True, fails=error)
    reason = device.choose_backend().reason
    assert re.search(f"GPU cannot be used: .*{says.split(chr(10))[0]}", reason) and "CUDA error" not in reason
    with pytest.raises(UserError, match="--device cuda: the GPU cannot be used: .*\n.*; or use --device cpu"):
        device.choose_backend("cuda")


@pytest.mark.parametrize("path, folder", [("/proc/nope/x", "/proc/nope"), ("/tmp/torchinductor_me/fx", None)])
def test_unusable_cache_of_the_compiler_names_the_setting(monkeypatch, path, folder):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if folder:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    with pytest.raises(UserError, match=f"^Permission denied: {path}\n.*TORCHINDUCTOR_CACHE_DIR"):
        with device_errors.explain_device_errors(""):
            raise PermissionError(13, "Permission denied", path)
    with pytest.raises(PermissionError), device_errors.explain_device_errors(""):
        raise PermissionError(13, "Permission denied", "output/ckpt.pt")


@pytest.mark.parametrize("script", ["train", "sample"])
def test_scripts_set_the_log_level_before_pytorch_reads_it(script):
    code = f"import sys, {script}; names = list(sys.modules); assert names.index('tinyllm.cli') < names.index('torch')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("text", BUGS)
def test_bug_keeps_its_traceback(text):
    error = RuntimeError(f"CUDA error: {text}{ASYNCHRONOUS}")
    with pytest.raises(RuntimeError) as raised, device_errors.explain_device_errors(""):
        raise error
    assert raised.value is error


# ---- failures of the compiler -------------------------------------------------------------------

class Wrapped(RuntimeError):
    """An error inside another one, as PyTorch's BackendCompilerFailed and InductorError."""

    def __init__(self, error: Exception):
        super().__init__(f"backend='inductor' raised:\n{type(error).__name__}: {error}\n\nSet TORCHDYNAMO_VERBOSE=1")
        self.inner_exception = error


PTXAS = """No valid triton configs. PTXASError: PTXAS error: Internal Triton PTX codegen error
`ptxas` stderr:
ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'

Repro command: ptxas -lineinfo -v --gpu-name=sm_121a /tmp/tmpkw7ug6t8.ptx -o /tmp/tmpkw7ug6t8.ptx.o
"""
COMPILER_PROBLEMS = [
    (RuntimeError("Cannot find a working triton installation. Either the package is not installed or it is too old. "
                  "More information on installing Triton can be found at: https://github.com/triton-lang/triton"),
     "triton is missing or too old; install PyTorch again: https"),
    (RuntimeError("Found NVIDIA GeForce GTX 1070 which is too old to be supported by the triton GPU compiler, which "
                  "is used as the backend. Triton only supports devices of CUDA Capability >= 7.0"), "GPU is too old"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set "
                  "triton.knobs.build.impl."), "build-essential"),
    (InvalidCxxCompiler(), "build-essential"),
    (CppCompileError(["g++", "a.cpp"], "a.cpp:2:10: fatal error: Python.h: No such file or directory"), "python3-dev"),
    (CppCompileError(["g++", "a.cpp"], "a.cpp: In function 'void f()':\na.cpp:7:3: error: 'x' was not declared\n"
                     "a.cpp:9:3: error: 'y' was not declared"), "^a.cpp:7:3: error: 'x' was not declared$"),
    (AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up and then run \"/sbin/ldconfig\""),
     "libcuda.so; run sudo ldconfig"),
    (RuntimeError(PTXAS), "does not know this GPU yet; install a newer PyTorch"),
    (RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 131072, "
                          "Hardware limit: 101376. Reducing block sizes or `num_stages` may help."),
     "needs more shared memory than the GPU has"),
    (RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."), "driver"),
    (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/m.c", "-O3"]), "/usr/bin/gcc failed; its message"),
    (PermissionError(13, "Permission denied", "/tmp/cache/73"), "^Permission denied: /tmp/cache/73; set TORCH"),
    (OSError(30, "Read-only file system", "/tmp/cache/73"), "^Read-only file system: /tmp/cache/73; set TORCH"),
    (SubprocException("Traceback (most recent call last):\n  File \"subproc_pool.py\", line 327, in do_job\n"
                      "PermissionError: [Errno 13] Permission denied: '/tmp/cache'\n"), "denied: /tmp/cache; set"),
    (ImportError("/tmp/c.so: failed to map segment from shared object: Operation not permitted"), "another one"),
    (UnicodeDecodeError("gbk", b"\x94 ", 0, 1, "illegal"), "PYTHONUTF8=1"),
    (SubprocException("Traceback (most recent call last):\n  File \"subproc_pool.py\", line 327, in do_job\n"
                      "    result = job()\nValueError: one\n\nDuring handling of the above exception, another\n\n"
                      "triton.compiler.errors.CompilationError: at 5:11: unknown\n"),
     "^triton.compiler.errors.CompilationError: at 5:11: unknown$"),
    (SystemError("a kernel of another processor\nand more"), "^a kernel of another processor$"),
    (AssertionError(), "^AssertionError$")]


@pytest.mark.parametrize("error, says", COMPILER_PROBLEMS, ids=lambda value: f"{value!s:.40}")
def test_compiler_problem_is_one_sentence(error, says):
    for raised in error, Wrapped(error), Wrapped(Wrapped(error)):
        problem = device_errors.compiler_problem(raised)
        assert re.search(says, problem) and "\n" not in problem and len(problem) <= 200


@pytest.mark.parametrize("logs", [None, "+inductor"])
def test_compiler_is_silent_unless_asked(monkeypatch, recwarn, logs):
    """On new GPUs, PyTorch's compiler recommends TF32, and it logs the whole kernel if compiling fails."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("_inductor", "_functorch")]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    if logs:
        monkeypatch.setenv("TORCH_LOGS", logs)
    device_errors.hide_compiler_messages()
    text = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled."
    warnings.warn_explicit(text, UserWarning, "compile_fx.py", 322, module="torch._inductor.compile_fx")
    assert len(recwarn) == bool(logs)
    is_logged = logging.getLogger("torch._inductor.runtime.triton_heuristics").isEnabledFor(logging.ERROR)
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    assert is_logged == bool(logs)


@pytest.mark.parametrize("missing, capability, says", [
    ("", (7, 5), ""), ("", (6, 1), "too old"), ("triton", (8, 0), "triton is missing"),
    ("gcc", (8, 0), "no C compiler"), ("Python.h", (8, 0), "python3-dev")])
def test_what_triton_needs(machine, monkeypatch, tmp_path, missing, capability, says):
    machine(cuda=True, capability=capability)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device, "os", SimpleNamespace(name="posix", environ={}))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: missing != "triton" or None)
    monkeypatch.setattr(device.shutil, "which", lambda name: name if name == "gcc" and missing != "gcc" else None)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: tmp_path)
    if missing != "Python.h":
        (tmp_path / "Python.h").touch()
    reason = device.why_no_triton(torch.device("cuda"))
    assert says in reason if says else reason == ""


# ---- the choice of a device ---------------------------------------------------------------------

@pytest.mark.parametrize("built_for, says", [(None, "a CPU build"), ("13.0", "CUDA 13.0; the NVIDIA driver")])
def test_gpu_that_pytorch_does_not_see_is_reported(machine, monkeypatch, built_for, says):
    machine()
    assert "no GPU, " in device.choose_backend().reason
    monkeypatch.setattr(device.shutil, "which", lambda name: name == "nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert says in device.choose_backend().reason


def test_threads_are_as_many_as_a_container_has_cores(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1] if threads else 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(device, "available_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    device.choose_backend("cpu")
    assert threads == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "2 threads" in device.choose_backend().reason and threads == [2]


def test_mps_uses_float32(machine):
    machine(mps=True)
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(UserError, match="must be float32"):
            device.choose_backend("auto", dtype)


def test_sampling_on_a_cpu_rounds_the_weights_at_most(machine, monkeypatch):
    machine(features=["amx_bf16"])
    monkeypatch.setattr(device, "_has_fbgemm", lambda: False)
    assert device.choose_backend(training=False).dtype == torch.float32
    with pytest.raises(UserError, match="needs a GPU"):
        device.choose_backend("cpu", "float16", training=False)
    monkeypatch.setattr(device, "_has_fbgemm", lambda: True)
    assert device.choose_backend(training=False).dtype == torch.float16


def test_requested_device_and_dtype(machine):
    machine(features=["amx_bf16"])
    assert device.choose_backend("cpu", "float32").dtype == torch.float32
    assert device.choose_backend("cpu", "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name, kind, message", [
    ("cuda", "auto", "sees 0"), ("cuda:3", "auto", "sees 1"), ("mps", "auto", "sees 0"), ("abacus", "auto", "unknown"),
    ("cpu", "float16", "needs a GPU"), ("cpu", "int4", "unknown")])
def test_missing_device_is_an_error(machine, name, kind, message):
    machine(cuda=name == "cuda:3", bf16=True)
    with pytest.raises(UserError, match=message):
        device.choose_backend(name, kind)


# Peaks in TFLOPS from other sources: data sheets and whitepapers (whole and 1-digit figures), hmc-tech.com (RTX 5050),
# and Wikipedia's rates with float16 sums (half) or with sparsity (a quarter)
PEAKS = {
    ("Tesla T4", 40): 65, ("Tesla V100-SXM2-16GB", 80): 125, ("Tesla V100-PCIE-32GB", 80): 112,
    ("NVIDIA A100-SXM4-40GB", 108): 312, ("A100-SXM4-40GB", 108): 312, ("NVIDIA A100 80GB PCIe", 108): 312,
    ("NVIDIA A100-PCIE-40GB", 108): 312, ("NVIDIA A10", 72): 125, ("NVIDIA L4", 58): 121, ("NVIDIA L40S", 142): 362,
    ("NVIDIA H100 80GB HBM3", 132): 989, ("NVIDIA H100 PCIe", 114): 756, ("NVIDIA H200", 132): 989,
    ("NVIDIA B200", 148): 2250,
    ("NVIDIA GeForce RTX 2060", 30): 51.61 / 2, ("NVIDIA GeForce RTX 2060", 34): 57.44 / 2,
    ("NVIDIA GeForce RTX 2060 SUPER", 34): 57.44 / 2, ("NVIDIA GeForce RTX 2070", 36): 59.72 / 2,
    ("NVIDIA GeForce RTX 2070 SUPER", 40): 72.48 / 2, ("GeForce RTX 2080", 46): 80.55 / 2,
    ("NVIDIA GeForce RTX 2080 SUPER", 48): 89.2 / 2, ("NVIDIA GeForce RTX 2080 Ti", 68): 53.8,
    ("NVIDIA GeForce RTX 3050", 20): 72.8 / 4, ("NVIDIA GeForce RTX 3050", 18): 6.774 * 2,
    ("NVIDIA GeForce RTX 3060", 28): 101.9 / 4, ("NVIDIA GeForce RTX 3060 Ti", 38): 129.6 / 4,
    ("NVIDIA GeForce RTX 3070", 46): 162.98 / 4, ("NVIDIA GeForce RTX 3070 Ti", 48): 174 / 4,
    ("NVIDIA GeForce RTX 3080", 68): 238.14 / 4, ("NVIDIA GeForce RTX 3080", 70): 245.1 / 4,
    ("NVIDIA GeForce RTX 3080 Ti", 80): 272.8 / 4, ("NVIDIA GeForce RTX 3090", 82): 71,
    ("NVIDIA GeForce RTX 3090 Ti", 84): 320.9 / 4,
    ("NVIDIA GeForce RTX 4060", 24): 121 / 4, ("NVIDIA GeForce RTX 4060 Ti", 34): 177 / 4,
    ("NVIDIA GeForce RTX 4070", 46): 233 / 4, ("NVIDIA GeForce RTX 4070 SUPER", 56): 284 / 4,
    ("NVIDIA GeForce RTX 4070 Ti", 60): 321 / 4, ("NVIDIA GeForce RTX 4070 Ti SUPER", 66): 353 / 4,
    ("NVIDIA GeForce RTX 4080", 76): 390 / 4, ("NVIDIA GeForce RTX 4080 SUPER", 80): 418 / 4,
    ("NVIDIA GeForce RTX 4090", 128): 165.2,
    ("NVIDIA GeForce RTX 5050", 20): 26.32, ("NVIDIA GeForce RTX 5060", 30): 154 / 4,
    ("NVIDIA GeForce RTX 5060 Ti", 36): 190 / 4, ("NVIDIA GeForce RTX 5070", 48): 247 / 4,
    ("NVIDIA GeForce RTX 5070 Ti", 70): 352 / 4, ("NVIDIA GeForce RTX 5080", 84): 450 / 4,
    ("NVIDIA GeForce RTX 5090", 170): 209.5}
UNKNOWN = [
    ("NVIDIA GeForce RTX 3060 Laptop GPU", 30), ("NVIDIA GeForce RTX 4070 Laptop GPU", 36),
    ("NVIDIA GeForce RTX 2080 with Max-Q Design", 46), ("NVIDIA GeForce RTX 2080 Super", 48),      # laptops, both
    ("NVIDIA GeForce RTX 2080 Super with Max-Q Design", 48), ("NVIDIA GeForce RTX 4090 D", 114),
    ("NVIDIA GeForce RTX 5090 D", 170), ("NVIDIA GeForce RTX 5090 D v2", 170), ("NVIDIA GeForce RTX 3050 OEM", 18),
    ("NVIDIA GeForce RTX 3060", 30), ("NVIDIA GeForce RTX 6090", 200), ("NVIDIA GeForce GTX 1660 Ti", 24),
    ("NVIDIA RTX 6000 Ada Generation", 142), ("NVIDIA RTX A6000", 84), ("NVIDIA TITAN RTX", 72), ("NVIDIA T400", 6),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 14), ("NVIDIA H200 MIG 1g.18gb", 16), ("NVIDIA A100X", 108),
    ("NVIDIA A100-SXM-64GB", 124), ("NVIDIA A800-SXM4-80GB", 108), ("NVIDIA A10G", 80), ("NVIDIA A10-24Q", 72),
    ("NVIDIA L40", 142), ("NVIDIA L20", 92), ("NVIDIA L2", 24), ("NVIDIA H100 NVL", 132), ("NVIDIA H100", 132),
    ("NVIDIA H20", 78), ("NVIDIA H200 NVL", 132), ("NVIDIA H800", 132), ("NVIDIA GH200 480GB", 132),
    ("NVIDIA GB200", 152), ("Tesla V100-SXM3-32GB", 80), ("AMD Instinct MI300X", 304), ("a GPU", 1)]


def share(monkeypatch, name, n_sms, dtype=torch.float16, clock=3_000_000) -> float | None:
    """Return the MFU of 10^12 FLOP/s on a simulated GPU with this clock in kHz."""
    major = 7 if re.search("T4|V100|RTX 20", name) else 8
    gpu = SimpleNamespace(name=name, multi_processor_count=n_sms, major=major)
    if clock:
        gpu.clock_rate = clock
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: gpu)
    return device.Backend(torch.device("cuda"), dtype, "").mfu(1e12)


@pytest.mark.parametrize("name, n_sms", PEAKS)
def test_share_of_gpu_peak(monkeypatch, name, n_sms):
    assert 1 / share(monkeypatch, name, n_sms) == pytest.approx(PEAKS[name, n_sms], rel=0.01)


@pytest.mark.parametrize("name, n_sms", UNKNOWN)
def test_unknown_gpu_has_no_share(monkeypatch, name, n_sms):
    assert share(monkeypatch, name, n_sms) is None


def test_all_peaks_are_tested():
    tested = {name.removeprefix("NVIDIA ") for name, _ in PEAKS}
    assert {f"GeForce {name}" for name in gpu_peaks.GEFORCE_CLOCKS} <= tested
    untested = {"Tesla V100-SXM2-32GB", "Tesla V100-PCIE-16GB", "A100-SXM4-80GB"}       # other sizes of tested ones
    assert set(gpu_peaks.PEAK_TFLOPS) - untested <= tested


@pytest.mark.parametrize("clock", [0, 1_200_000, 1_560_000])
def test_laptop_with_the_name_of_a_card_has_no_share(monkeypatch, clock):
    """The RTX 2060 of a laptop boosts to 1200 or 1560 MHz. Old PyTorch versions do not report clocks (0)."""
    assert share(monkeypatch, "NVIDIA GeForce RTX 2060", 30, clock=clock) is None
    assert share(monkeypatch, "NVIDIA GeForce RTX 3060", 28, clock=clock) is not None


def test_no_share_without_a_known_peak(monkeypatch):
    for name, n_sms in ("Tesla T4", 40), ("Tesla V100-SXM2-16GB", 80), ("NVIDIA GeForce RTX 2080 Ti", 68):
        assert share(monkeypatch, name, n_sms) and not share(monkeypatch, name, n_sms, torch.bfloat16)
    assert share(monkeypatch, "NVIDIA H200", 132, torch.bfloat16) == share(monkeypatch, "NVIDIA H200", 132)
    assert share(monkeypatch, "NVIDIA H200", 132, torch.float32) is None
    assert device.Backend(torch.device("cpu"), torch.bfloat16, "").mfu(1e12) is None


def test_known_share_is_printed_and_not_logged(train_small, monkeypatch, capsys):
    train_small("unknown", "--max_iters", 1)
    assert "MFU" not in capsys.readouterr().out
    monkeypatch.setattr(device.Backend, "mfu", lambda self, flops: 0.42)
    train_small("known", "--max_iters", 1)
    assert "tokens/s  42% MFU  0:00:00 left" in capsys.readouterr().out
    assert Path("known/log.jsonl").read_bytes() == Path("unknown/log.jsonl").read_bytes()


@pytest.mark.parametrize("system, name, place, problem", [
    ("posix", "g++", "/a/torch", ""), ("posix", "clang++", "/a/torch", ""), ("posix", "cl", "/a/torch", "C++ compiler"),
    ("posix", "g++", "/my files/torch", "space"), ("nt", "cl", "C:/my files/torch", ""),
    ("nt", "g++", "C:/torch", "C++ compiler")])
def test_compiler_accepted_by_pytorch(monkeypatch, system, name, place, problem):
    monkeypatch.setattr(torch, "__file__", place)
    monkeypatch.setattr(device, "os", SimpleNamespace(name=system))
    monkeypatch.setattr(device.shutil, "which", lambda found: found if found == name else None)
    found = device.why_no_compiler()
    assert problem in found if problem else found == ""


def test_old_pytorch_is_reported(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu124"))
    compat.check_pytorch.cache_clear()
    with pytest.raises(UserError, match=r"2\.5\.1.*expected 2\.6 or newer\n.*requirements.txt"):
        device.choose_backend()


def test_compiling_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert "python3-dev" in device.why_no_headers()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert device.why_no_headers() == ""
