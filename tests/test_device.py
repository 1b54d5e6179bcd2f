"""The choice of device and dtype on simulated machines."""
from types import SimpleNamespace

import pytest
import torch

from tinyllm import device
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
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
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


def test_gpu_too_old_for_pytorch_is_not_used(machine):
    machine(cuda=True, capability=(6, 1), fails=RuntimeError("CUDA error: no kernel image is available\nand more"))
    chosen = device.choose_backend()
    assert chosen.device.type == "cpu" and "(CUDA error: no kernel image is available)" in chosen.reason
    with pytest.raises(UserError, match="no kernel image is available.*\n.*--device cpu"):
        device.choose_backend("cuda")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(
    "CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), MemoryError(),
    RuntimeError("could not create a primitive")])
def test_gpu_with_full_memory_is_a_user_error(machine, error):
    machine(cuda=True, fails=error)
    with pytest.raises(UserError, match="not enough memory\n.*close other programs that use cuda"):
        device.choose_backend()


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


@pytest.mark.parametrize("name, mfu", [("NVIDIA H200", 0.5), ("NVIDIA A100-SXM4-80GB", 494.5 / 312),
                                       ("NVIDIA H100 PCIe", 494.5 / 756), ("NVIDIA GeForce RTX 3090", 494.5 / 71),
                                       ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A10", None),
                                       ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA H100 NVL", None)])
def test_share_of_gpu_peak(machine, monkeypatch, name, mfu):
    machine(cuda=True, bf16=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: name)
    assert device.choose_backend().mfu(494.5e12) == (mfu and pytest.approx(mfu))


def test_no_share_without_a_known_peak(machine, monkeypatch):
    machine(cuda=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H200")
    assert device.choose_backend("cuda", "float32").mfu(1e12) is None
    assert device.choose_backend("cpu").mfu(1e12) is None


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
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cu128"))
    with pytest.raises(UserError, match="2.8.0.*\n.*requirements.txt"):
        device.choose_backend()


def test_compiling_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert "python3-dev" in device.why_no_headers()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert device.why_no_headers() == ""
