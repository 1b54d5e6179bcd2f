"""Step 3 of 4: train the model.

    python train.py --max_iters 20 --eval_interval 10       # a quick test of everything
    python train.py --preset cpu_3min                       # a first story; --help lists the presets
    python train.py --max_minutes 60                        # train for an hour
    python train.py                                         # the full run; Ctrl-C saves and stops it
    python train.py                                         # the same command resumes it
    python train.py --init_from output/ckpt.pt --out_dir output/tuned --data_dir data/tuned   # fine-tune: docs/data.md
    python train.py --eval_only --init_from output/ckpt.pt  # score a checkpoint on the whole val split
    torchrun --nproc_per_node=2 train.py --gradient_accumulation_steps 2    # two processes, or GPUs, share each step

Writes to output/: ckpt.pt (best validation loss), last.pt (latest), log.jsonl, clock.jsonl, samples.txt and loss.png.
On a CPU with the same number of threads, a resumed run is bit-for-bit identical to an uninterrupted one, unless
max_minutes is set. With torchrun, the number of processes changes results only by rounding (tinyllm/distributed.py).
"""
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tinyllm import cli, presets    # before torch, whose log level cli sets

import torch
from torch import Tensor
from tqdm import tqdm

from tinyllm.dataset import IGNORE_INDEX, Task
from tinyllm.device_errors import explain_device_errors
from tinyllm.distributed import distributed_context
from tinyllm.engine import build_engine
from tinyllm.estimate import estimate_and_compile, estimate_rest, format_hms, run_oom_advice
from tinyllm.machine import peak_memory
from tinyllm.optim import skip_on_overflow
from tinyllm.resume import run_settings
from tinyllm.run import TrainRun, build_run, oom_advice
from tinyllm.runlog import NullRunLog, RunLog
from tinyllm.sampling import SamplingParams
from tinyllm.stops import lock_output_dir, read_pending_metrics, require_finite_weights, save_on_signals

# ---- settings -----------------------------------------------------------------------------------
preset = ""                         # hyperparameters for a machine, listed at the end of --help; flags override them
# files
out_dir = "output"                  # folder of the run; give each run its own
data_dir = "data"                   # folder that steps 1 and 2 wrote to
init_from = "auto"                  # auto: resume the run in out_dir if its settings match, otherwise start a new one;
                                    # resume: resume it with its saved settings; scratch: start over; PATH: start with
                                    # a checkpoint's weights. A new run moves an old one in out_dir to old-1
# length
max_iters = 100_000                 # optimizer steps; 2,000 to 5,000 are enough for stories from the built-in text
max_minutes = 0.0                   # wall time of the run, to which the learning-rate schedule adapts; 0: no limit
# evaluation
eval_interval = 500                 # steps between evaluations on the whole val split
log_interval = 10                   # steps between lines of the log
eval_only = False                   # score a checkpoint on the val split and exit
checkpoint_minutes = 5.0            # save last.pt at least this often: the most you can lose in a power cut
sample_prompts = "|Once upon a time|One day, Lily met a Shoggoth"   # prompts at each evaluation, separated by |
sample_tokens = 200                 # tokens per sample; 0: no samples
# batch: a step trains on batch_size * gradient_accumulation_steps windows
batch_size = 32                     # windows per micro-batch; halve it when memory runs out
gradient_accumulation_steps = 1     # micro-batches per step, over all processes; double it when you halve batch_size
max_seq_len = 256                   # context length in tokens; time and memory grow with it
vocab_size = 0                      # chooses the tokenizer if data_dir has several; 0: the only one
# model: 8.5 million parameters by default; for a few minutes on a CPU, dim 128 and n_layers 4 (about 1 million)
dim = 288                           # width of the model; a wider one learns more per token, but takes longer
n_layers = 8                        # depth of the model
n_heads = 6                         # attention heads; choose dim / n_heads between 32 and 128
n_kv_heads = 3                      # key-value heads; fewer than n_heads: smaller cache, faster sampling
hidden_dim = 0                      # width of the feed-forward network; 0: 8/3 of dim, rounded up to multiple_of
multiple_of = 32                    # round the default hidden_dim up to a multiple of this
norm_eps = 1e-5                     # added to the mean square in RMSNorm; rarely worth changing
rope_theta = 10000.0                # base of the rotary embedding; raise it for contexts of many thousand tokens
dropout = 0.0                       # 0.1 if a small text is read many times; also applies with --init_from
# optimizer
optimizer = "muon"                  # muon: Muon for the matrices, AdamW for the rest; adamw: AdamW for all weights
learning_rate = 6e-3                # peak; higher for small models, lower for large ones; halve it if the loss jumps
embedding_lr_ratio = 2.0            # learning-rate multiplier for the embedding and the norm weights
weight_decay = 0.1                  # decoupled weight decay; norm weights do not decay
beta1 = 0.9                         # AdamW: decay of the average gradient
beta2 = 0.95                        # AdamW: decay of the average squared gradient
momentum = 0.95                     # Muon: decay of the average gradient
grad_clip = 1.0                     # maximum gradient norm; 0: no clipping
# learning-rate schedule
decay_lr = True                     # linear decay to min_lr; False: constant after the warm-up
warmup_iters = 100                  # steps of linear warm-up; the decay starts at step 1 too
lr_decay_iters = 0                  # step at which the decay ends; 0: max_iters
min_lr = 0.0                        # learning rate at the end of the decay
# machine
device = "auto"                     # auto (chosen from the hardware), cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto (chosen from the hardware), float32, bfloat16, float16
compile: bool | str = "auto"        # auto: if it saves more time than it takes; True; False
num_workers = 0                     # processes that prepare batches; 0: none, which is fast enough
shard = False                       # with torchrun: shard weights and optimizer over the processes, for a model that
                                    # does not fit one GPU; slower, and generates no samples
seed = 1337                         # random seed of weights, batches, dropout and samples
# ---- end of settings ----------------------------------------------------------------------------

MOVED_FLAGS = {"doctor": "python -m tools.doctor {data_dir} {out_dir}",
               "compare": "python -m tools.compare {values} {out_dir}"}
SAMPLE_TEMPERATURE = 0.8                # of the samples at each evaluation


def main() -> None:
    preset_settings = {name: preset.settings for name, preset in presets.PRESETS.items()}
    with distributed_context() as ranks:
        with ranks.fail_together():
            cfg, overrides = cli.parse_settings(globals(), epilog=presets.presets_table(), presets=preset_settings,
                                                moved=MOVED_FLAGS)
        if cfg.eval_only:
            with explain_device_errors(partial(oom_advice, cfg)):
                print_scores(evaluate(build_run(cfg, overrides, ranks)))
        else:
            with lock_output_dir(cfg.out_dir, ranks), explain_device_errors(partial(oom_advice, cfg)):
                run = build_run(cfg, overrides, ranks)
                with explain_device_errors(partial(run_oom_advice, run)):
                    run_training(run)


def run_training(run: TrainRun) -> None:
    """Train until the run ends, or report that it is already finished."""
    if run.reached_limit():
        if run.state.best_val_loss == math.inf:                 # ckpt.pt was lost
            evaluate_and_keep_best(run, open_log(run))
        print_already_finished(run)
        return
    estimate_and_compile(run)
    run.sync_clock_and_stop()
    if not run.has_checkpoint:
        run.save_first_state()
    with save_on_signals(run):
        train(run)
    print_result(run)


# ---- the loop -----------------------------------------------------------------------------------

def train(run: TrainRun) -> None:
    """Take steps until the run is finished or a signal asks it to stop."""
    cfg, state = run.cfg, run.state
    log = open_log(run)
    batches = training_batches(run)
    run.model.train()
    is_last_step = False
    timer_start, timer_step = time.perf_counter(), state.iter_num
    while not is_last_step:
        lr, loss, grad_norm = train_step(run, batches)
        run.pending_metrics.append((loss, grad_norm))

        run.sync_clock_and_stop()
        is_finished = run.reached_limit()
        is_last_step = is_finished or run.stop_signal > 0
        should_log = state.iter_num % cfg.log_interval == 0 or state.iter_num == 1
        should_eval = state.iter_num % cfg.eval_interval == 0
        should_save = should_eval or is_last_step or run.checkpoint_is_due()
        if not should_log and not should_save:
            continue

        with run.ranks.fail_together():
            loss, grad_norm = read_pending_metrics(run)          # waits for the device
        if should_log:
            seconds_per_step = (time.perf_counter() - timer_start) / (state.iter_num - timer_step)
            log_step(run, log, loss, lr, grad_norm, seconds_per_step)
        if should_eval:
            evaluate_and_keep_best(run, log)
        state.log_lines, state.log_sha256 = len(log.entries), log.sha256
        if is_finished and not should_eval:                     # not in log_lines: an extended run would not have it
            evaluate_and_keep_best(run, log)
        if should_save:
            save_latest(run, log, is_finished)
        timer_start, timer_step = time.perf_counter(), state.iter_num


def training_batches(run: TrainRun) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield micro-batches x, y (batch_size, max_seq_len) on the device, endlessly, from the run's position."""
    cfg = run.cfg
    return Task.iter_batches(run.shard_set, "train", cfg.batch_size, run.model.args.max_seq_len, seed=cfg.seed,
                             position=run.state.position, device=run.backend.device, num_workers=cfg.num_workers,
                             rank=run.ranks.rank, world_size=run.ranks.world_size)


def train_step(run: TrainRun, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
    """Take one optimizer step; return its learning rate, loss and gradient norm.

    Loss and norm stay on the device, because reading them would wait for the GPU.
    """
    lr = get_lr(run)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]

    total_loss = torch.zeros((), device=run.backend.device)
    run.ranks.seed(run.cfg.seed, run.state.iter_num)
    for micro_step in range(run.micro_steps_per_rank):
        x, y = next(batches)                                    # (batch_size, max_seq_len) each
        is_last = micro_step == run.micro_steps_per_rank - 1
        with run.gradient_sync(is_last):
            with run.backend.autocast():
                loss = run.wrapped_model(x, y)                  # linear_cross_entropy, or its faster form (kernels.py)
            loss = loss / run.micro_steps_per_rank
            run.scaler.scale(loss).backward()
        total_loss += loss.detach()

    grad_norm = update_weights(run)
    run.state.iter_num += 1
    run.state.position += run.windows_per_step
    return lr, total_loss, grad_norm


def update_weights(run: TrainRun) -> Tensor:
    """Clip the gradients and step the optimizers; return the gradient norm before clipping."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grad_norm = run.clip_gradients()
    if run.scaler.is_enabled():
        skip_on_overflow(run.optimizers, grad_norm)
    for optimizer in run.optimizers:
        optimizer.step()
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return grad_norm


def get_lr(run: TrainRun) -> float:
    """Return the learning rate of the next step: linear warm-up, then linear decay to min_lr (arXiv 2502.15938)."""
    cfg = run.cfg
    warmup = min(1.0, (run.state.iter_num + 1) / (cfg.warmup_iters + 1))
    decay = 1 - run.progress() if cfg.decay_lr else 1.0
    return warmup * (cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * decay)


# ---- evaluation ---------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(run: TrainRun) -> dict[str, float]:
    """Return the scores on the whole val split, which the ranks share. The batch size does not change its windows."""
    batches = Task.iter_split(run.shard_set, "val", run.cfg.batch_size, run.model.args.max_seq_len,
                              device=run.backend.device, rank=run.ranks.rank, world_size=run.ranks.world_size)
    hide_bar = None if run.ranks.is_main else True             # None: tqdm shows the bar only on a terminal
    losses, counts = [], []                                     # tensors: reading each number would wait for the device
    run.model.eval()
    for x, y in tqdm(batches, unit=" batches", desc="evaluating", leave=False, disable=hide_bar):
        with run.eager_mode(), run.backend.autocast():
            losses.append(run.model(x, y))
        counts.append((y != IGNORE_INDEX).sum())
    run.model.train()

    losses = torch.stack(losses).tolist()
    counts = torch.stack(counts).tolist()
    nats = sum(loss * count for loss, count in zip(losses, counts) if count)        # a rank's last batch may be empty
    sums = torch.tensor([nats, sum(counts)], dtype=torch.float64)
    nats, n_tokens = run.ranks.sum(sums).tolist()
    val_loss = nats / n_tokens
    return {"val_loss": val_loss, "perplexity": math.exp(min(val_loss, 700)),
            "bpb": nats / math.log(2) / run.shard_set.total("val", "bytes")}


def generate_samples(run: TrainRun) -> list[str]:
    """Return the sample prompts with their continuations, drawn with the same random numbers each time."""
    if not run.cfg.sample_tokens or not run.ranks.is_main or run.is_sharded:
        return []
    tokenizer = run.tokenizer
    sequences = [tokenizer.encode_prompt(prompt) for prompt in run.cfg.sample_prompts.split("|")]
    params = SamplingParams(temperature=SAMPLE_TEMPERATURE, seed=run.cfg.seed)
    engine = build_engine(run.model)
    for step in engine.generate(sequences, run.cfg.sample_tokens, params, [tokenizer.eos_id]):
        for sequence, token in zip(sequences, step.tokens):
            if token is not None:
                sequence.append(token)
    return [tokenizer.decode(sequence) for sequence in sequences]


def evaluate_and_keep_best(run: TrainRun, log: RunLog | NullRunLog) -> None:
    """Evaluate, generate samples, and write ckpt.pt if the model is the best so far."""
    with run.ranks.fail_together():
        require_finite_weights(run)
    start_seconds = run.seconds()
    scores = evaluate(run)
    samples = generate_samples(run)
    run.sync_clock_and_stop()
    with run.ranks.fail_together():
        log.write({"iter": run.state.iter_num, **scores, "tokens": run.tokens_seen, "samples": samples},
                  {"seconds": run.seconds()})
        log.write_reports(presets.expected_curve(run.cfg.preset))
    print_scores(scores)
    print_expected_score(run)
    if scores["val_loss"] < run.state.best_val_loss:
        run.state.best_val_loss = scores["val_loss"]
        run.save("ckpt.pt")
    run.sync_clock_and_stop()
    run.eval_seconds = run.seconds() - start_seconds


def save_latest(run: TrainRun, log: RunLog | NullRunLog, is_finished: bool) -> None:
    """Write last.pt, from which the run can be resumed."""
    if is_finished and run.state.iter_num < run.cfg.max_iters:
        run.state.seconds += max(60 * run.cfg.max_minutes - run.seconds(), 0)      # the run then counts as finished
    with run.ranks.fail_together():
        require_finite_weights(run)
        log.sync()
    run.save("last.pt")


# ---- logging ------------------------------------------------------------------------------------

def open_log(run: TrainRun) -> RunLog | NullRunLog:
    if not run.ranks.is_main:
        return NullRunLog()
    header = {"config": run_settings(run.cfg), "model_args": asdict(run.model.args),
              "parameters": run.model.count_parameters(), "device": str(run.backend.device),
              "dtype": str(run.backend.dtype)}
    return RunLog(Path(run.cfg.out_dir), header, run.state.log_lines, run.state.log_sha256)


def log_step(run: TrainRun, log: RunLog | NullRunLog, loss: float, lr: float, grad_norm: float,
             seconds_per_step: float) -> None:
    step = run.state.iter_num
    speed = run.tokens_per_step / seconds_per_step
    log.write({"iter": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": run.tokens_seen},
              {"seconds": run.seconds(), "tokens_per_second": speed})
    mfu = run.backend.mfu(speed / run.ranks.world_size * run.model.flops_per_token())
    mfu_text = f"{mfu:.0%} MFU  " if mfu else ""
    print(f"step {step:,}  loss {loss:.4f}  lr {lr:.2e}  gradient {grad_norm:.2f}  {speed:,.0f} tokens/s  {mfu_text}"
          f"{format_hms(estimate_rest(run, seconds_per_step)[0])} left", flush=True)


def print_scores(scores: dict[str, float]) -> None:
    print("val loss {val_loss:.4f}  perplexity {perplexity:.2f}  bits per byte {bpb:.4f}".format(**scores), flush=True)


def print_expected_score(run: TrainRun) -> None:
    if expected := presets.expected_bpb(run.cfg.preset, run.seconds() / 60):
        print(f"for comparison: {run.cfg.preset} reached {expected:.3f} bits per byte by this time, on "
              f"{presets.MEASURED_ON}; other text gives other scores")


def print_already_finished(run: TrainRun) -> None:
    """Print that the run is finished, and the commands that extend it or start over."""
    cfg, state = run.cfg, run.state
    minutes = state.seconds / 60
    if state.iter_num >= cfg.max_iters:
        longer = {"max_iters": 2 * state.iter_num}
    else:
        longer = {"max_minutes": math.ceil(2 * minutes)}
    resume = cli.format_command("train", run.ranks.launch_command, init_from="resume", out_dir=cfg.out_dir, **longer)
    print(f"the run in {cfg.out_dir} is finished: {state.iter_num:,} steps in {minutes:.1f} minutes\n"
          f"resume:     {resume}\n"
          "start over: repeat the first command with --init_from scratch or another --out_dir")


def print_result(run: TrainRun) -> None:
    """Print the result and the next command. If a signal stopped the run, exit with its status."""
    cfg = run.cfg
    step = run.state.iter_num
    on_gpu = run.backend.device.type == "cuda"
    peak = torch.cuda.max_memory_reserved(run.backend.device) if on_gpu else peak_memory()
    if peak:
        print(f"peak {'GPU memory' if on_gpu else 'memory'}: {peak / 1e6:,.0f} MB")
    if run.stop_signal and not run.reached_limit():
        resume = cli.format_command("train", run.ranks.launch_command, init_from="resume", out_dir=cfg.out_dir)
        print(f"saved step {step:,} in {cfg.out_dir}/last.pt\nresume: {resume}")
        sys.exit(128 + run.stop_signal)
    print(f"done: {step:,} steps in {format_hms(run.seconds())}, best val loss {run.state.best_val_loss:.4f}")
    if cfg.sample_tokens and not run.is_sharded:
        print(f"samples of each evaluation: {cfg.out_dir}/samples.txt")
    next_command = cli.format_command("sample", checkpoint=f"{cfg.out_dir}/ckpt.pt", interactive=bool(run.chat) or "")
    print(f"next: {next_command}")


if __name__ == "__main__":
    cli.run_script(main)
