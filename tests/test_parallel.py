"""torchrun: any number of processes takes the same steps, and dead processes end the run."""
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as torch_dist
from conftest import ROOT, TINY, assert_same, assert_same_run, load_state, read_log, start_script

import train
from tinyllm import cli, compat, distributed, resume, run
from tinyllm.cli import UserError
from tinyllm.dataset import IGNORE_INDEX, Task
from tinyllm.device import Backend
from tinyllm.distributed import DistributedContext
from tinyllm.run import check_same_plan

pytestmark = pytest.mark.skipif(os.name == "nt", reason="PyTorch's torchrun does not start on Windows")

OPTIONS = [*TINY, "--gradient_accumulation_steps", "4", "--dtype", "float32", "--lr_decay_iters", "12",
           "--eval_interval", "4"]
TRAIN_WITH_SIGNAL = '''
import os, sys
sys.path.insert(0, {root!r})
import train
from tinyllm import cli

def send_signal(run, batches, step=train.train_step):
    """Send process 1 a signal before its step, unless torchrun has started it again."""
    if run.ranks.rank == 1 and run.state.iter_num == {at} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), {number})
    return step(run, batches)

train.train_step = send_signal
cli.run_script(train.main)
'''


def torchrun(processes: int, script: Path, *args, restarts: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               f"--max_restarts={restarts}", script, *args]
    return subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8", timeout=120)


def train_in_forks(processes: int, *args) -> subprocess.CompletedProcess:
    """Train in processes with torchrun's environment. Forks save seconds of imports each."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        patch.setenv("WORLD_SIZE", str(processes))
        for rank in range(processes):
            patch.setenv("RANK", str(rank))
            started.append(start_script("train", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate(timeout=120) for process in started]
    errors = "".join(error for _, error in outputs)
    return subprocess.CompletedProcess(args, max(abs(process.returncode) for process in started), outputs[0][0], errors)


def script_with_signal(number: int, at: int) -> Path:
    """Return a script that trains and sends a signal to process 1 after `at` steps."""
    path = Path(f"signal_{number}.py")
    path.write_text(TRAIN_WITH_SIGNAL.format(root=str(ROOT), number=number, at=at), encoding="utf-8")
    return path


def assert_near(one: str, two: str) -> None:
    """Check that logs and weights are equal up to rounding."""
    for a, b in zip(read_log(one)[1:], read_log(two)[1:], strict=True):
        assert a.keys() == b.keys() and a["iter"] == b["iter"] and a["tokens"] == b["tokens"]
        for name in {"loss", "lr", "grad_norm", "val_loss", "bpb"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a, b)
    for name, weight in load_state(one)["model"].items():
        torch.testing.assert_close(weight, load_state(two)["model"][name], rtol=1e-4, atol=2e-6, msg=name)


def test_one_two_and_four_processes_take_the_same_steps(train_small, project):
    """Two processes stop after a signal to one; one process resumes the run, and four finish it."""
    train_small("whole", *OPTIONS, "--max_iters", 12)
    files = ["--data_dir", project, "--out_dir", "parts"]
    two = torchrun(2, script_with_signal(15, at=4), *files, *OPTIONS, "--max_iters", 12)
    assert "saved step 5 in parts/last.pt" in two.stdout and load_state("parts")["iter_num"] == 5, two.stderr
    assert two.stdout.count("step 3 ") == 1 and "error:" not in two.stderr
    train_small("parts", *OPTIONS, "--max_iters", 8)
    four = train_in_forks(4, *files, *OPTIONS, "--max_iters", 12)
    assert four.returncode == 0 and "shared by 4 processes" in four.stdout, four.stderr
    assert_near("whole", "parts")
    assert load_state("parts")["state"]["position"] == 12 * 16


def test_a_killed_process_ends_all_and_torchrun_resumes_exactly(project):
    options = ["--data_dir", project, *OPTIONS, "--max_iters", 8, "--dropout", 0.2]
    whole = train_in_forks(2, "--out_dir", "whole", *options)
    parts = torchrun(2, script_with_signal(9, at=6), "--out_dir", "parts", *options, restarts=1)
    assert whole.returncode == parts.returncode == 0, parts.stderr
    assert "process 0 of 2 exits: another one has ended" in parts.stderr
    assert "after the 4 steps that are done" in parts.stdout and "Traceback" not in parts.stderr
    assert_same_run("whole", "parts")
    assert_same(load_state("whole", "ckpt.pt"), load_state("parts", "ckpt.pt"))


def test_old_pytorch_does_not_shard(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cu128"))
    with pytest.raises(UserError, match=r"2\.8\.0\+cu128 is too old for --shard; expected 2\.11 or newer\n"):
        run.choose_run_class(SimpleNamespace(shard=True), DistributedContext(0, 2, 0))
    assert run.choose_run_class(SimpleNamespace(shard=False), DistributedContext(0, 2, 0)) is run.TrainRun


@pytest.mark.skipif(torch.__version__ < compat.OLDEST_FOR_SHARD, reason="PyTorch is too old for --shard")
def test_a_sharded_model_takes_the_same_steps(train_small, project):
    """One process with the full model, then two with uneven shards, then one again."""
    options = [*OPTIONS, "--hidden_dim", 45, "--n_layers", 1]
    train_small("whole", *options, "--max_iters", 12)
    train_small("parts", *options, "--max_iters", 4)
    two = torchrun(2, ROOT / "train.py", "--data_dir", project, "--out_dir", "parts", *options, "--shard", "True",
                   "--max_iters", 8)
    assert two.returncode == 0 and "after the 4 steps that are done" in two.stdout, two.stderr
    assert "each with a part of the model" in two.stdout
    train_small("parts", *options, "--max_iters", 12)
    assert_near("whole", "parts")


def test_single_process_needs_no_group(train_small, monkeypatch):
    monkeypatch.setattr(torch_dist, "init_process_group", lambda *_, **__: pytest.fail("a group of one"))
    monkeypatch.setattr(torch_dist, "all_reduce", lambda *_, **__: pytest.fail("a message to nobody"))
    train_small("out", "--max_iters", 1)
    assert not torch_dist.is_initialized() and load_state("out")["iter_num"] == 1


def test_indivisible_micro_batches_are_refused(project):
    def plan(n_micro: int):
        args = ["--data_dir", str(project), *TINY, "--gradient_accumulation_steps", str(n_micro)]
        cfg, overrides = cli.parse_settings(vars(train), args)
        return resume.plan_run(cfg, overrides, DistributedContext(0, 4))
    with pytest.raises(UserError, match="gradient_accumulation_steps must be a multiple of 4.*, not 6"):
        plan(6)
    assert plan(8).cfg.gradient_accumulation_steps == 8


def test_processes_share_an_evaluation(project):
    data = resume.load_data(SimpleNamespace(data_dir=str(project), vocab_size=0), None)[0]
    whole = list(Task.iter_split(data, "val", 3, 32))
    parts = [list(Task.iter_split(data, "val", 3, 32, rank=rank, world_size=4)) for rank in range(4)]
    for number, (x, y) in enumerate(whole):
        assert_same([x, y], list(parts[number % 4][number // 4]))
    assert {len(part) for part in parts} == {-(-len(whole) // 4)} and len(whole) % 4 == 2
    for x, y in [parts[2][-1], parts[3][-1]]:
        assert x.shape == (1, 32) and (x >= 0).all() and (y == IGNORE_INDEX).all()


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "device_count", lambda kind: 2)
    assert [DistributedContext(rank, 2, rank).device("auto") for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert DistributedContext(5, 8, 1).device("cuda") == "cuda:1" and DistributedContext().device("cuda:1") == "cuda:1"
    for name, rank in (("auto", 2), ("cuda:1", 1)):
        with pytest.raises(UserError, match="2 GPUs are not enough.*\n.*nproc_per_node=2"):
            DistributedContext(rank, 3, rank).device(name)
    monkeypatch.setattr(distributed, "device_count", lambda kind: 0)
    assert DistributedContext(1, 2, 1).device("auto") == "auto"        # choose_backend explains the choice


def test_random_numbers_depend_on_step_and_rank():
    def numbers(seed, step, rank):
        DistributedContext(rank, 2).seed(seed, step)
        return torch.rand(4)
    assert torch.equal(numbers(1, 2, 0), numbers(1, 2, 0))
    others = [numbers(1, 2, 1), numbers(1, 3, 0), numbers(2, 2, 0)]
    assert not any(torch.equal(numbers(1, 2, 0), other) for other in others)
    assert DistributedContext().seed(1, 2) is None and not torch.equal(torch.rand(4), numbers(1, 2, 0))


class OneOfTwo(DistributedContext):
    """A rank that receives what rank 0 has broadcast."""
    received: list[float] = []

    def broadcast_from_main(self, value):
        if self.is_main:
            self.received[:] = [value]
        return self.received[0]


def test_processes_with_other_settings_or_files_are_refused():
    def check(rank, rate=0.1, device="cpu", text="a", weight=1.0, dtype=torch.bfloat16):
        cfg = SimpleNamespace(learning_rate=rate, device=device, out_dir="output")
        ckpt = {"model": {"w": torch.full((3,), weight, dtype=torch.bfloat16)}, "optimizer": [{"m": torch.ones(2)}]}
        backend = Backend(torch.device(device), dtype, "for a test")
        shards = SimpleNamespace(sha256=text)
        check_same_plan(resume.RunPlan(cfg, backend, shards, None, None, ckpt, True, OneOfTwo(rank, 2)))
    check(0)
    check(1, device="cuda")
    for change in ({"rate": 0.2}, {"text": "b"}, {"weight": 1.5}, {"dtype": torch.float16}):
        with pytest.raises(UserError, match="^process 1 has other settings, text, dtype or checkpoint than process 0"):
            check(1, **change)


def test_restart_after_a_death_resumes_in_spite_of_scratch(train_small, monkeypatch):
    """A run that torchrun starts again after a death would otherwise start over."""
    train_small("out", "--max_iters", 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_small("out", "--max_iters", 4, "--init_from", "scratch")
    assert load_state("out")["iter_num"] == 4 and not Path("out/old-1").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    train_small("out", "--max_iters", 4, "--init_from", "scratch")
    assert Path("out/old-1").exists()
