"""Fine-tuning from the weights of another run."""
from pathlib import Path

import pytest
import torch
from conftest import load_state

from tinyllm import checkpoint
from tinyllm.cli import UserError


def test_fine_tuning_takes_only_the_weights(train_small):
    train_small("base", "--max_iters", 5)
    train_small("tuned", "--init_from", "base/ckpt.pt", "--max_iters", 1, "--learning_rate", 1e-9)
    tuned, base = load_state("tuned"), load_state("base", "ckpt.pt")
    assert tuned["iter_num"] == 1 and tuned["model_args"] == base["model_args"]
    for name, weight in base["model"].items():
        torch.testing.assert_close(tuned["model"][name], weight, rtol=0, atol=1e-7)
    train_small("tuned", "--init_from", "base/ckpt.pt", "--max_iters", 1, "--learning_rate", 1e-9)    # finished
    assert not Path("tuned/old-1").exists()
    Path("base/ckpt.pt").rename("elsewhere.pt")
    train_small("tuned", "--init_from", "base/ckpt.pt", "--max_iters", 2, "--learning_rate", 1e-9)    # needs it no more
    for rate, dim, problem in [(1, 32, "no checkpoint at"), (1e-9, 48, "has dim 32")]:
        with pytest.raises(UserError, match=problem):
            train_small("tuned", "--init_from", "base/ckpt.pt", "--max_iters", 3, "--learning_rate", rate, "--dim", dim)
    Path("elsewhere.pt").rename("base/ckpt.pt")
    assert load_state("tuned")["iter_num"] == 2 and not Path("tuned/old-1").exists()
    train_small("tuned", "--init_from", "base/ckpt.pt", "--max_iters", 1, "--learning_rate", 1e-9, "--dropout", 0.1)
    assert load_state("tuned/old-1")["config"]["dropout"] == 0.0 and load_state("tuned")["config"]["dropout"] == 0.1
    assert load_state("tuned")["model_args"] == {**base["model_args"], "dropout": 0.1}
    for args, problem in [(("--dim", 64), "the checkpoint has dim 32, which cannot change\n"
                           "       remove these settings from the command"),
                          (("--dropout", 1), "dropout must be at least 0 and below 1, not 1.0"),
                          (("--max_seq_len", 0), "max_seq_len must be at least 1 and below 1048576, not 0")]:
        with pytest.raises(UserError) as error:
            train_small("other", "--init_from", "base/ckpt.pt", *args)
        assert str(error.value) == problem
    for window in (16, 64):
        train_small(f"{window}", "--init_from", "base/ckpt.pt", "--max_iters", 1, "--max_seq_len", window)
        assert load_state(f"{window}")["model_args"] == {**base["model_args"], "max_seq_len": window}


def test_checkpoint_may_omit_defaults(train_small):
    train_small("base", "--max_iters", 1)
    saved = load_state("base", "ckpt.pt")
    few = {name: value for name, value in saved["model_args"].items() if name not in ("max_seq_len", "dropout")}
    checkpoint.save_checkpoint("few.pt", {**saved, "model_args": few, "config": {}})
    train_small("out", "--init_from", "few.pt", "--max_iters", 1)
    assert load_state("out")["model_args"] == saved["model_args"]
