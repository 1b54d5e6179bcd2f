"""The float16 GradScaler with two optimizers, on a CPU. It skips steps whose gradients overflow."""
import math

import pytest
import torch
from conftest import assert_same

import train


@pytest.mark.parametrize("overflow, clip", [(math.inf, 1.0), (math.nan, 1.0), (math.inf, 0.0)])
def test_overflow_skips_both_optimizers(planned_run, overflow, clip):
    """In float16 the embedding, which AdamW updates, overflows first."""
    run = planned_run("--dtype", "float32", "--grad_clip", clip)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    batches = train.Task.iter_batches(run.shard_set, "train", run.cfg.batch_size, 32, seed=1)
    train.train_step(run, batches)                                       # Muon has its momentum now
    weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.model.tok_embeddings.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([5]), overflow))
    train.train_step(run, batches)
    assert_same(weights, dict(run.model.state_dict()))
    assert run.scaler.get_scale() == 32.0


def test_float16_resumes_a_run_without_a_scaler(planned_run):
    run = planned_run()
    saved = run.checkpoint_dict()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    run.load_training_state(saved)
    assert run.scaler.get_scale() == 64.0
