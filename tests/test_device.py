"""The choice of device and dtype on simulated machines."""
import re
from pathlib import Path
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
    assert {f"GeForce {name}" for name in device.GEFORCE_CLOCKS} <= tested
    untested = {"Tesla V100-SXM2-32GB", "Tesla V100-PCIE-16GB", "A100-SXM4-80GB"}       # other sizes of tested ones
    assert set(device.PEAK_TFLOPS) - untested <= tested


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
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cu128"))
    with pytest.raises(UserError, match="2.8.0.*\n.*requirements.txt"):
        device.choose_backend()


def test_compiling_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert "python3-dev" in device.why_no_headers()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert device.why_no_headers() == ""
