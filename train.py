"""Step 3 of 4: train the model.

    python train.py --max_iters 20 --eval_interval 10       # a trial: does everything work?
    python train.py --preset cpu_3min                       # a first story; --help lists the presets
    python train.py --max_minutes 60                        # what this machine can do in an hour
    python train.py                                         # the full run; Ctrl-C stops it, nothing is lost
    python train.py                                         # the same command goes on where it stopped
    python train.py --init_from output/ckpt.pt --out_dir output/tuned --data_dir data/tuned   # fine-tune: see README.md
    python train.py --eval_only --init_from output/ckpt.pt  # score a checkpoint on the whole val split
    torchrun --nproc_per_node=2 train.py --gradient_accumulation_steps 2    # two processes, or GPUs, share each step

Writes to output/: ckpt.pt (the best by validation loss) and last.pt (the newest), log.jsonl and clock.jsonl, and
what is drawn out of these, samples.txt and loss.png. A run that was continued is the same, bit for bit, as one that
was not interrupted (on a CPU, with the same number of threads; not with max_minutes, whose schedule follows the
clock). Under torchrun the steps are the same for any number of processes, but for rounding: see tinyllm/distributed.py.
"""
import errno
import io
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from extras import tensor_parallel
from extras.fsdp import full_tensor
from tinyllm import checkpoint, cli, presets
from tinyllm.cli import UserError
from tinyllm.dataset import Task
from tinyllm.distributed import DistributedContext, distributed_context
from tinyllm.estimate import format_hms, print_run_summary
from tinyllm.files import atomic_replace, folder_lock
from tinyllm.machine import peak_memory
from tinyllm.presets import PRESETS
from tinyllm.project import path_flags
from tinyllm.resume import INIT_MODES, RunPlan, is_finished, plan_run, run_settings
from tinyllm.run import TrainRun
from tinyllm.runlog import NEW_CHECKPOINT, NullRunLog, RunLog, archive_run, undo_partial_archive
from tinyllm.watch import check_pending_steps, explain_oom, require_finite

# ---- settings -----------------------------------------------------------------------------------
preset = ""                         # settings for a machine and a time, listed at the end of --help; the rest counts
                                    # where they say nothing
# files
out_dir = "output"                  # one folder for each run
data_dir = "data"                   # where steps 1 and 2 wrote
init_from = "auto"                  # auto: go on with the run in out_dir if its settings are these, else begin one;
                                    # resume: go on, with its own settings; scratch: begin one; or a checkpoint,
                                    # to begin with its weights. An old run is never overwritten, but put aside
# length
max_iters = 100_000                 # steps; 2,000 to 5,000 already make stories with the built-in text
max_minutes = 0.0                   # wall time instead: the schedule fits itself to it; 0: max_iters alone counts
# evaluation
eval_interval = 500                 # steps between evaluations on the whole val split
log_interval = 10                   # steps between lines of the log
eval_only = False                   # score a checkpoint and stop
checkpoint_minutes = 5.0            # last.pt is written at least so often; what a power cut may cost
sample_prompts = "|Once upon a time|One day, Lily met a Shoggoth"   # stories begun at each evaluation, with | between
sample_tokens = 200                 # length of these stories; 0: none
# batch: one step sees batch_size * gradient_accumulation_steps windows
batch_size = 32                     # windows at a time; halve it when memory runs out ...
gradient_accumulation_steps = 1     # ... and double this: the steps stay the same. Processes of torchrun share them
max_seq_len = 256                   # tokens the model can look back on; time and memory grow with it
vocab_size = 0                      # which vocabulary of data_dir, when there are several; 0: the only one
# model: the defaults have 8.5 million parameters; dim 128, n_layers 4 (about 1 million) suits a few CPU minutes
dim = 288
n_layers = 8
n_heads = 6                         # dim / n_heads is best 32 to 128
n_kv_heads = 3                      # n_heads: plain attention; fewer: a smaller cache and faster sampling
hidden_dim = 0                      # width of the feed-forward; 0: 8/3 of dim
multiple_of = 32                    # hidden_dim is rounded up to it
norm_eps = 1e-5
rope_theta = 10000.0                # larger for windows of many thousand tokens
dropout = 0.0                       # 0.1 when the text is small and is seen many times; also with --init_from
# optimizer
optimizer = "muon"                  # muon: for the matrices, and AdamW for the rest; adamw: for all
learning_rate = 6e-3                # smaller models like more, larger less; halve it if the loss jumps
embedding_lr_ratio = 2.0            # so many times learning_rate for the embedding and the gains of the norms
weight_decay = 0.1
beta1 = 0.9                         # of AdamW
beta2 = 0.95
momentum = 0.95                     # of Muon
grad_clip = 1.0                     # longest gradient; 0: do not clip
# learning rate schedule
decay_lr = True                     # linearly down to min_lr
warmup_iters = 100                  # steps up to learning_rate
lr_decay_iters = 0                  # steps down to min_lr; 0: max_iters
min_lr = 0.0
# machine
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16
compile: bool | str = "auto"        # auto: when it saves more time than it takes; True; False
num_workers = 0                     # processes that prepare batches; 0 is fast enough for memory-mapped files
shard = False                       # under torchrun: divide weights and optimizer among the processes, for a model that
                                    # does not fit one GPU; slower, and without stories on the way
seed = 1337
# ---- end of settings ----------------------------------------------------------------------------

HANGUP = getattr(signal, "SIGHUP", None)        # Windows has none
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *[HANGUP] * bool(HANGUP))
MOVED_FLAGS = {"doctor": "python -m tools.doctor", "compare": "python -m tools.compare output output/old-1"}
PER_MACHINE_SETTINGS = ("data_dir", "device", "num_workers")        # settings that may differ where several share a run


def main() -> None:
    with distributed_context() as dist:
        cfg, given = dist.all_or_none(lambda: cli.parse_settings(globals(), epilog=presets.presets_table(), presets={
            name: preset.settings for name, preset in PRESETS.items()}, moved=MOVED_FLAGS))
        if cfg.eval_only:
            plan = dist.all_or_none(lambda: plan_run(cfg, given, dist))
            dist.all_or_none(lambda: check_ranks_agree(plan))
            with explain_oom(cfg):
                print_scores(TrainRun(plan).evaluate())
        else:
            with lock_output_dir(cfg.out_dir, dist):
                run_training(cfg, given, dist)


@contextmanager
def lock_output_dir(out_dir: str, dist: DistributedContext) -> Iterator[None]:
    """Keep other runs from a folder, and make it tidy. The first process does that, and the others wait for it."""
    with ExitStack() as held:
        dist.on_main(lambda: held.enter_context(folder_lock(out_dir)))
        dist.on_main(lambda: undo_partial_archive(out_dir))
        yield


def run_training(cfg: SimpleNamespace, given: dict[str, Any], dist: DistributedContext) -> None:
    """Begin or go on with a run, and see it to its end."""
    if cfg.init_from == "scratch" and dist.was_restarted:
        cfg.init_from = "auto"          # scratch was for the first time
    plan = dist.all_or_none(lambda: plan_run(cfg, given, dist))
    dist.all_or_none(lambda: check_ranks_agree(plan))
    ended = not plan.resumed or is_finished(plan.saved)
    with explain_oom(cfg):
        run = TrainRun(plan)
    if plan.resumed:
        check_best_checkpoint(run)
        run.state.best_val_loss = dist.broadcast_from_main(run.state.best_val_loss)
    if run.finished():
        if ended and run.state.best_val_loss == math.inf:       # its best was lost
            evaluate_and_keep_best(run, open_record(run))
        print_already_finished(run, ended)
    else:
        with explain_oom(cfg, run):
            print_run_summary(run)
        run.sync_clock_and_stop()
        if not plan.resumed:
            start_new_run(run)
        with save_on_signals(run), explain_oom(cfg, run):
            train(run)
        print_summary(run)


def print_already_finished(run: TrainRun, ended: bool) -> None:
    """What a run did that has nothing left to do, and how to go on with it nevertheless, or to begin it anew.

    ended: whether it had come to its own end; else this command only asks for less than was done.
    """
    cfg, steps = run.cfg, run.state.iter_num
    after = f", after {run.state.seconds / 60:.1f} minutes" if steps < cfg.max_iters else ""
    what = "is finished, with" if ended else "is to go on for longer than this command asks for, and is at"
    twice = 2 * max(cfg.max_iters, steps)
    longer = math.ceil(2 * max(cfg.max_minutes, run.state.seconds / 60) * 10) / 10
    more = {"max_minutes": f"{longer:g}"} if cfg.max_minutes else {"max_iters": twice}
    more = more if ended else {}
    usual = {**globals(), **(PRESETS[cfg.preset].settings if cfg.preset else {})}
    own = {name: value for name, value in vars(cfg).items() if value != usual[name]}
    text = path_flags(run.data.folder.with_suffix(".model"))
    anew = {"init_from": "scratch"} if cfg.init_from in INIT_MODES else {"out_dir": f"{cfg.out_dir}-2"}
    print(f"the run in {cfg.out_dir} {what} step {steps:,}{after}\ngo on with it: "
          + cli.format_command("train", run.dist.launch_command, init_from="resume", out_dir=cfg.out_dir, **more)
          + "\nbegin anew:    " + cli.format_command("train", run.dist.launch_command, **{**own, **text, **anew}))


def check_ranks_agree(plan: RunPlan) -> None:
    """Raise UserError when this process has other settings, text or weights than the first one."""
    if plan.dist.size == 1:
        return
    settings = {name: value for name, value in run_settings(plan.cfg).items() if name not in PER_MACHINE_SETTINGS}
    own = {"other settings": zlib.crc32(repr(settings).encode()), "other text": zlib.crc32(plan.data.sha256.encode()),
           "another dtype": zlib.crc32(repr(plan.backend.dtype).encode()),        # auto, on unequal GPUs
           "another checkpoint": checkpoint.state_checksum(plan.saved) if plan.saved else 0}
    differ = [what for what, number in own.items() if number != plan.dist.broadcast_from_main(number)]
    if differ:
        raise UserError(f"process {plan.dist.rank} has {' and '.join(differ)} than process 0\n       the same command "
                        "must be typed on all machines, with the same data and output folders, shared or copied, "
                        "and a --dtype that all can")


def start_new_run(run: TrainRun) -> None:
    """Write the first state of a new run. From here on there is one to go on with, and saving is known to work."""
    if run.cfg.init_from == "scratch":
        print("note:   with --init_from scratch, the same command begins anew each time; --init_from resume goes on")
    source = Path(run.cfg.init_from)
    if source.parent.resolve() == Path(run.cfg.out_dir).resolve() and source.is_file():
        print(f"note:   {source}, with which this run begins, is put aside with the old run; "
              "another --out_dir leaves it where it is")
    run.state.setup = run.seconds()
    run.save(NEW_CHECKPOINT)
    if run.dist.is_main:
        archive_run(run.cfg.out_dir)
        atomic_replace(Path(run.cfg.out_dir, NEW_CHECKPOINT), Path(run.cfg.out_dir, "last.pt"))


def check_best_checkpoint(run: TrainRun) -> None:
    """Let the next evaluation write ckpt.pt when it is not there, damaged, or another's."""
    path = Path(run.cfg.out_dir) / "ckpt.pt"
    try:
        if run.state.best_val_loss < math.inf and checkpoint.load_checkpoint(path).get("data_sha256") != run.data.sha256:
            raise UserError(f"{path} is of another text than this run")
    except UserError as error:
        print(f"note: {error}\n      the next evaluation writes another")
        run.state.best_val_loss = math.inf


# ---- the loop -----------------------------------------------------------------------------------

def train(run: TrainRun) -> None:
    """Take steps until the run is finished, or a signal asks to stop."""
    cfg, state = run.cfg, run.state
    record = open_record(run)
    batches = Task.iter_batches(run.data, "train", cfg.batch_size, run.model.args.max_seq_len, seed=cfg.seed,
                                position=state.position, device=run.backend.device, num_workers=cfg.num_workers,
                                rank=run.dist.rank, world_size=run.dist.size)
    run.model.train()
    mark, marked, ends = time.perf_counter(), state.iter_num, False
    while not ends:
        # 1. one update of the weights
        lr, *numbers = train_step(run, batches)
        run.pending_metrics.append(numbers)

        # 2. what is due now
        run.sync_clock_and_stop()
        finished = run.finished()
        ends = finished or bool(run.stop_signal)
        logs = state.iter_num % cfg.log_interval == 0 or state.iter_num == 1
        evaluates = state.iter_num % cfg.eval_interval == 0
        saves = evaluates or run.stop_signal or run.seconds() - run.saved_at > 60 * cfg.checkpoint_minutes
        if not (logs or saves or ends):
            continue
        loss, norm, jumps = run.dist.all_or_none(lambda: check_pending_steps(run))        # stops when they are not finite

        # 3. log
        log_loss_spikes(run, record, jumps)
        if logs:
            log_step(run, record, loss, lr, norm, (time.perf_counter() - mark) / (state.iter_num - marked))

        # 4. evaluate; what only the end of the run brings is not part of its log
        if evaluates:
            evaluate_and_keep_best(run, record)
        state.log_lines, state.log_sha256 = len(record.entries), record.sha256
        if finished and not evaluates:
            evaluate_and_keep_best(run, record)

        # 5. save
        if finished and state.iter_num < cfg.max_iters:
            state.seconds += max(60 * cfg.max_minutes - run.seconds(), 0)       # what is left of it will not be used
        if saves or ends:
            record.sync()
            run.save("last.pt")
        mark, marked = time.perf_counter(), state.iter_num


def open_record(run: TrainRun) -> RunLog | NullRunLog:
    """The log, whose first line says what run it is."""
    if not run.dist.is_main:
        return NullRunLog()
    facts = {"config": run_settings(run.cfg), "model_args": asdict(run.model.args),
             "parameters": run.model.count_parameters(), "device": str(run.backend.device), "dtype": str(run.backend.dtype)}
    return RunLog(Path(run.cfg.out_dir), facts, run.state.log_lines, run.state.log_sha256)


def log_loss_spikes(run: TrainRun, record: RunLog | NullRunLog, jumps: list[dict[str, Any]]) -> None:
    for jump in jumps:
        record.write(jump, {"seconds": run.seconds()})
        print("step {iter:,}: the loss jumped to {jump:.4f} from about {usual:.4f}; windows {windows[0]:,} to "
              "{windows[1]:,} in training order; harmless if it falls again".format(**jump), flush=True)


def log_step(run: TrainRun, record: RunLog | NullRunLog, loss: float, lr: float, norm: float, seconds: float) -> None:
    """Log a step; `seconds` is what it and those before it took, each."""
    speed = run.tokens_per_step / seconds
    record.write({"iter": run.state.iter_num, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": run.tokens},
                 {"seconds": run.seconds(), "tokens_per_second": speed})
    mfu = run.backend.mfu(speed / run.dist.size * run.model.flops_per_token())
    print(f"step {run.state.iter_num:,}  loss {loss:.4f}  lr {lr:.2e}  gradient {norm:.2f}  {speed:,.0f} tokens/s  "
          + (f"{mfu:.0%} MFU  " if mfu else "") + f"{format_hms(run.seconds_left(seconds))} left", flush=True)


def train_step(run: TrainRun, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
    """One optimizer step; returns its learning rate, its loss and the length of its gradient."""
    cfg, device = run.cfg, run.backend.device
    lr = run.learning_rate()
    for group in [group for optimizer in run.optimizers for group in optimizer.param_groups]:
        group["lr"] = lr * group["lr_scale"]
    total = torch.zeros((), device=device)
    run.dist.seed(cfg.seed, run.state.iter_num)
    for following in reversed(range(run.micro_steps_per_rank)):
        x, y = next(batches)                                    # (batch_size, max_seq_len) each
        with run.dist.no_sync(run.ddp_model, more=following > 0):
            with run.backend.autocast():
                loss = run.ddp_model(x, y)
            loss = loss / run.micro_steps_per_rank                         # so that the sum is the mean
            run.scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf))
    # A scaler skips the step of an optimizer whose gradients overflow; none shall go without the other.
    if not run.scaler.is_enabled() or norm.isfinite():
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    run.state.iter_num += 1
    run.state.position += cfg.batch_size * cfg.gradient_accumulation_steps
    return lr, total, norm


def evaluate_and_keep_best(run: TrainRun, record: RunLog | NullRunLog) -> None:
    """Evaluate, write stories, and keep the model if it is the best so far."""
    run.dist.all_or_none(lambda: require_finite(run))
    began = run.seconds()
    scores, samples = run.evaluate(), run.generate_samples()
    run.sync_clock_and_stop()
    record.write({"iter": run.state.iter_num, **scores, "tokens": run.tokens, "samples": samples},
                 {"seconds": run.seconds()})
    record.write_reports(presets.expected_curve(run.cfg.preset))
    print_scores(scores)
    if expected := presets.expected_bpb(run.cfg.preset, run.seconds() / 60):
        print(f"for comparison: {run.cfg.preset} was at {expected:.3f} bits per byte by now, with "
              f"{presets.MEASURED_ON}; other text has other figures")
    if scores["val_loss"] < run.state.best_val_loss:
        run.state.best_val_loss = scores["val_loss"]
        run.save("ckpt.pt")
    run.sync_clock_and_stop()
    run.eval_seconds = run.seconds() - began


@contextmanager
def save_on_signals(run: TrainRun) -> Iterator[None]:
    """Let Ctrl-C, a polite kill and a closed terminal end the run after its step; a second one ends it at once."""
    def stop(number: int, frame: Any) -> None:
        run.requested_signal = number
        # a terminal that closes sends it twice, itself and through the shell
        signal.signal(number, signal.SIG_IGN if number == HANGUP else before[number])
        if number == HANGUP:
            redirect_to_devnull(1, 2)
        print("\nstopping after this step; what is done will be saved", flush=True)
    # what is ignored stays so: a run under nohup shall go on
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        with redirect_stdout(StopOnClosedStdout(run)):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnClosedStdout(io.TextIOBase):
    """Standard output while a run is on. When its reader is gone, a terminal or `| head`, the run is asked to stop."""

    def __init__(self, run: TrainRun):
        self.run, self.stream = run, sys.stdout

    def write(self, text: str) -> int:
        return self._unless_gone(self.stream.write, text) or len(text)

    def flush(self) -> None:
        if not self.stream.closed:              # as it may be when Python tidies up
            self._unless_gone(self.stream.flush)

    def _unless_gone(self, action: Callable[..., Any], *args: str) -> Any:
        try:
            return action(*args)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            redirect_to_devnull(*(1, 2) if error.errno == errno.EIO else (1,))
            self.run.requested_signal = self.run.requested_signal or signal.SIGTERM


def redirect_to_devnull(*outputs: int) -> None:
    """Let what is printed from now on, also by libraries, go nowhere instead of failing. 1: output, 2: errors."""
    for number in outputs:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def print_summary(run: TrainRun) -> None:
    out = run.cfg.out_dir
    if run.backend.device.type == "cuda":
        print(f"peak of the GPU's memory: {torch.cuda.max_memory_reserved(run.backend.device) / 1e6:,.0f} MB")
    elif peak := peak_memory():
        print(f"peak of memory: {peak / 1e6:,.0f} MB")
    if run.stop_signal and not run.finished():
        print(f"saved step {run.state.iter_num:,} in {out}/last.pt\ngo on: "
              + cli.format_command("train", run.dist.launch_command, init_from="resume", out_dir=out))
        sys.exit(128 + run.stop_signal)
    print(f"done: {run.state.iter_num:,} steps in {format_hms(run.seconds())}, best val loss {run.state.best_val_loss:.4f}\n"
          + (f"stories on the way: {out}/samples.txt\n" if run.cfg.sample_tokens and not run.is_sharded else "")
          + "next: " + cli.format_command("sample", sample_launcher(run), checkpoint=f"{out}/ckpt.pt",
                                        interactive=bool(run.chat) or ""))


def sample_launcher(run: TrainRun) -> str:
    """What starts sample.py: several processes where the model was divided, and can be for writing."""
    try:
        tensor_parallel.check_divisible(run.model.args, run.dist)
    except UserError:
        return "python"
    return run.dist.launch_command if run.is_sharded else "python"


def print_scores(scores: dict[str, float]) -> None:
    print("val loss {val_loss:.4f}  perplexity {perplexity:.2f}  bits per byte {bpb:.4f}".format(**scores), flush=True)


if __name__ == "__main__":
    cli.run_script(main)
