"""The float16 GradScaler with two optimizers, on a CPU. It skips steps whose gradients overflow."""
import copy
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
    before = copy.deepcopy([run.model.state_dict(), [optimizer.state_dict() for optimizer in run.optimizers]])
    run.model.tok_embeddings.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([5]), overflow))
    train.train_step(run, batches)
    after = [run.model.state_dict(), [optimizer.state_dict() for optimizer in run.optimizers]]
    before[1] = without_lr(before[1])
    assert_same(before, [after[0], without_lr(after[1])])
    assert run.scaler.get_scale() == 32.0


def without_lr(states):
    """Return the states of optimizers without the learning rate, which the schedule changes."""
    for state in states:
        for group in state["param_groups"]:
            del group["lr"]
    return states


def test_scaled_gradients_give_the_same_step(planned_run):
    """The scale is a power of two, so the gradients keep all their bits."""
    plain = planned_run("--dtype", "float32")
    scaled = planned_run("--dtype", "float32")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for run in (plain, scaled):
        batches = train.Task.iter_batches(run.shard_set, "train", run.cfg.batch_size, 32, seed=1)
        for _ in range(3):
            train.train_step(run, batches)
    torch.testing.assert_close(dict(scaled.model.state_dict()), dict(plain.model.state_dict()), atol=1e-7, rtol=1e-6)


def test_float16_resumes_a_run_without_a_scaler(planned_run):
    run = planned_run()
    saved = run.checkpoint_dict()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    run.load_training_state(saved)
    assert run.scaler.get_scale() == 64.0
