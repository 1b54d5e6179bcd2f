"""GPU checks on a machine without one: synchronization, and tensors on the wrong device."""
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from model import ModelArgs, Transformer
from tinyllm.distributed import SINGLE_PROCESS
from tinyllm.engine import Engine
from tinyllm.optim import build_optimizers
from tinyllm.run import TrainRun, TrainState

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=32)
GPU = torch.device("meta")      # a device that is not the CPU; it keeps shapes, and refuses to mix


def test_training_step_does_not_synchronize(planned_run):
    """Reading a number synchronizes with the GPU. On the meta device it is an error."""
    plan = planned_run("--dtype", "bfloat16", "--gradient_accumulation_steps", 2)
    with FakeTensorMode():
        run = object.__new__(TrainRun)
        run.cfg, run.backend, run.ranks, run.state = plan.cfg, plan.backend, SINGLE_PROCESS, TrainState()
        run.model = run.wrapped_model = Transformer(plan.model.args)
        run.optimizers, run.scaler = build_optimizers(run.model, run.cfg, run.backend), plan.backend.scaler()
        run.start_time, run.eval_seconds = 0.0, 0.0
        x = torch.zeros(4, 32, dtype=torch.int64)
        for _ in range(2):                                  # the first step creates the optimizer state
            _, loss, norm = train.train_step(run, iter([(x, x)] * 2))
        with pytest.raises(DataDependentOutputException):
            (loss + norm).item()


@pytest.mark.parametrize("lengths", [[5, 5], [3, 0]])
def test_decode_step_allocates_on_the_device(lengths, monkeypatch):
    """The sequences may differ in length."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    engine = Engine(Transformer(ARGS), torch.bfloat16, device=GPU)
    cache = engine.new_cache(2, 16)
    assert engine.prefill([[1, 2, 3], [4]], cache, [0, 1]).shape == (2, 300)
    cache.lengths = lengths
    tokens = torch.zeros(2, dtype=torch.int64, device=GPU)
    logits = engine.decode(tokens, cache)
    assert logits.shape == (2, 300) and logits.device == GPU and engine.cache_dtype == torch.bfloat16
    engine.rope = torch.ones(32, 1, 4, dtype=torch.complex64)           # a table that was left behind
    with pytest.raises(RuntimeError, match="device"):
        engine.decode(tokens, cache)
