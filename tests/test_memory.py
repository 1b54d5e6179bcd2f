"""The memory of a training step: estimates against reservations of PyTorch's allocator, and counted activations."""
import importlib
from functools import cache

import pytest
import torch
from conftest import ROOT
from torch.autograd.graph import saved_tensors_hooks

from extras.gpt2 import GPT2, GPT2Args
from model import ModelArgs
from tinyllm import cli, kernels, memory
from tinyllm.device import Backend
from tinyllm.presets import PRESETS
from tinyllm.resume import shape_from_settings

KNOWN = {name: preset.settings for name, preset in PRESETS.items()}
GPU_PRESETS = [name for name in PRESETS if name.startswith("gpu")]
CONTEXT = 500e6                     # bytes that CUDA itself takes, at most
WIDE = ["--dim", "512", "--n_heads", "8", "--n_kv_heads", "8", "--batch_size", "128"]
ODD_HEADS = ["--n_heads", "8", "--n_kv_heads", "4", "--optimizer", "adamw"]
HALF = ["--batch_size", "16", "--gradient_accumulation_steps", "2"]
# MB that torch 2.13's allocator reserved for uncompiled and compiled runs, in the CUDA build on a stub runtime whose
# kernels compute nothing; no GPU was used. The chunks of the loss had 4,096 rows.
RESERVED = [
    ("bfloat16", [], 1491, 900), ("float16", [], 1621, 1000), ("float32", [], 2038, 1636),
    ("bfloat16", HALF, 1032, 570), ("bfloat16", WIDE, 7439, 5438)]
ARGS = {"llama": ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=256, max_seq_len=128),
        "dropout": ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=4, vocab_size=256, max_seq_len=128, dropout=0.1),
        "gpt2": GPT2Args(dim=64, n_layers=3, n_heads=4, vocab_size=256, max_seq_len=128)}


def settings(*flags):
    cfg, _ = cli.parse_settings(vars(importlib.import_module("train")), flags, presets=KNOWN)
    return cfg


@cache
def meta_model(args):
    with torch.device("meta"):
        return kernels.build_transformer(args)


def estimate(cfg, dtype, compiled, device="cuda", **options):
    """Return the estimate in bytes for settings and a vocabulary of 4,096."""
    model = meta_model(shape_from_settings(cfg, 4096))
    backend = Backend(torch.device(device), getattr(torch, dtype), "")
    return memory.estimate_memory(model, cfg.optimizer, cfg.batch_size, cfg.gradient_accumulation_steps, backend,
                                  compiled, **options)


@pytest.mark.parametrize("dtype, flags, eager, compiled", RESERVED)
def test_estimate_is_close_to_the_allocator(dtype, flags, eager, compiled):
    cfg = settings(*flags)
    assert estimate(cfg, dtype, False, loss_rows=4096).total == pytest.approx(eager * 1e6, rel=0.1)
    assert estimate(cfg, dtype, True, loss_rows=4096).total == pytest.approx(compiled * 1e6, rel=0.1)


@pytest.mark.parametrize("dtype, flags, in_hardware, reserved", [
    ("bfloat16", [], False, 1908), ("bfloat16", ["--max_seq_len", "1024", "--batch_size", "8"], False, 3496),
    ("float16", ODD_HEADS, False, 2070), ("float16", ODD_HEADS, True, 1439), ("bfloat16", ODD_HEADS, True, 1342)])
def test_attention_without_a_fused_kernel_stores_scores(monkeypatch, dtype, flags, in_hardware, reserved):
    """in_hardware: whether the GPU has bfloat16. A T4 has not; heads of 36 do not fit its float16 kernel."""
    monkeypatch.setattr(memory, "has_bfloat16", lambda device: in_hardware)
    assert estimate(settings(*flags), dtype, False).total == pytest.approx(reserved * 1e6, rel=0.1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_default_training_fits_2_gb(dtype, compiled):
    assert estimate(settings(), dtype, compiled).total + CONTEXT < 2 * 2**30


@pytest.mark.parametrize("name", GPU_PRESETS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gpu_presets_leave_a_fifth_free(name, dtype, compiled):
    available = PRESETS[name].gpu_gb * 2**30 - CONTEXT
    assert estimate(settings("--preset", name), dtype, compiled).total < 0.8 * available


def test_docs_have_the_estimates():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in ["", *GPU_PRESETS]:
        flags = ["--preset", name] if name else []
        pairs = [[estimate(settings(*flags), dtype, compiled).total / 1e6 for compiled in (False, True)]
                 for dtype in ("bfloat16", "float16", "float32")]
        cells = " | ".join(f"{eager:,.0f}, {compiled:,.0f}" for eager, compiled in pairs)
        assert f"| {cells} |" in page, (name, cells)


@pytest.mark.parametrize("kind, dtype", [
    ("llama", torch.float32), ("llama", torch.bfloat16), ("dropout", torch.float32), ("gpt2", torch.float32),
    ("gpt2", torch.bfloat16)])
def test_kept_activations_are_counted(kind, dtype):
    """Count with autograd's hooks, on a CPU, the tensors that one layer keeps."""
    args = ARGS[kind]
    model = GPT2(args) if kind == "gpt2" else kernels.build_transformer(args)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()
    h = torch.zeros(4, 128, 64, requires_grad=True)
    rope = [] if kind == "gpt2" else [model.rope[:, None, :, None]]
    backend = Backend(torch.device("cpu"), dtype, "")
    with saved_tensors_hooks(note, lambda tensor: tensor), backend.autocast():
        model.layers[0](h, *rope)
    weights = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    casts = memory.cast_bytes(model, backend)
    counted = sum(size for storage, size in kept.items() if storage not in weights) - casts / args.n_layers
    assert counted / h[..., 0].numel() == pytest.approx(memory.layer_bytes(args, backend, compiled=False), rel=0.1)


def test_parts_of_the_state():
    """A weight has a gradient, and two moments with AdamW or one with Muon; sharding divides all of them."""
    cfg = settings("--n_layers", "2")
    model = meta_model(shape_from_settings(cfg, 4096))
    matrices = sum(weight.numel() for weight in model.layers.parameters() if weight.dim() > 1)
    n_params = model.count_parameters()
    assert estimate(cfg, "float32", False).state == 16 * n_params - 4 * matrices
    assert estimate(settings("--n_layers", "2", "--optimizer", "adamw"), "float32", False).state == 16 * n_params
    sharded = estimate(cfg, "float32", False, world_size=4, is_sharded=True)
    assert sharded.state == (16 * n_params - 4 * matrices) / 4


@pytest.mark.parametrize("options, copies", [
    ({"world_size": 1}, 0), ({"world_size": 2}, 1), ({"world_size": 2, "is_sharded": True}, 0)])
def test_several_micro_batches_under_ddp_hold_gradients_twice(options, copies):
    """With no_sync, gradients are not in DDP's buckets; docs/scaling.md counts 20 bytes per parameter instead of 16."""
    cfg = settings("--optimizer", "adamw")
    model = meta_model(shape_from_settings(cfg, 4096))
    backend = Backend(torch.device("cuda"), torch.float32, "")
    one, two = [memory.estimate_memory(model, "adamw", 8, micro_steps, backend, False, **options).total
                for micro_steps in (1, 2)]
    kept_by_one = 4 * model.count_parameters() if options["world_size"] == 1 else 0     # more micro-batches keep them
    growth = copies * 4 * model.count_parameters() + kept_by_one
    assert two - one == pytest.approx(memory.GPU_FRAGMENTATION * growth)


@pytest.mark.parametrize("flags", [
    ["--batch_size", "64"], ["--gradient_accumulation_steps", "2"], ["--dropout", "0.1"], ["--n_kv_heads", "6"],
    ["--max_seq_len", "512"], ["--n_layers", "9"], ["--hidden_dim", "1024"]])
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_grows_with_settings(flags, compiled):
    assert estimate(settings(), "bfloat16", compiled).total < estimate(settings(*flags), "bfloat16", compiled).total


def test_muon_needs_memory_for_its_stacks():
    """Without activations, the stacks are more than the moments that AdamW has in addition."""
    totals = {}
    for optimizer in ("muon", "adamw"):
        cfg = settings("--optimizer", optimizer, "--batch_size", "1", "--max_seq_len", "8")
        totals[optimizer] = estimate(cfg, "float32", False).total
    assert totals["muon"] > totals["adamw"]
