"""The state of a training run: build, time, save and restore it. train.py has the training loop."""
import math
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm import checkpoint, compat, kernels, optional
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError, format_command
from tinyllm.device import has_async_copies
from tinyllm.device_errors import hide_compiler_messages
from tinyllm.distributed import DistributedContext
from tinyllm.optim import build_optimizers
from tinyllm.resume import RunPlan, init_checkpoint_path, plan_run, run_settings
from tinyllm.runlog import NEW_CHECKPOINT, archive_run

SMALLER_BATCHES = "repeat the command with smaller batches, for the same steps:"
SMALLER_MODEL = "use a smaller model: lower --max_seq_len, --dim or --n_layers"
PER_MACHINE_SETTINGS = ("data_dir", "device", "num_workers")        # may differ between the machines of a run


@dataclass
class TrainState:
    """Progress of a run, as stored in its checkpoints. Old field names must stay readable."""
    iter_num: int = 0                   # optimizer steps done
    position: int = 0                   # windows seen
    best_val_loss: float = math.inf
    seconds: float = 0.0                # wall time up to the checkpoint
    setup: float = 0.0                  # seconds before the first step, which the schedule does not count
    log_lines: int = 0                  # entries of log.jsonl up to this step
    log_sha256: str = ""                # SHA-256 of these entries
    compiled: bool = False


def load_train_state(stored: dict[str, Any]) -> TrainState:
    """Return the stored progress, without fields that only older versions have.

    Raises ValueError for a field of the wrong type, and KeyError without iter_num or position.
    """
    state = TrainState(stored["iter_num"], stored["position"])
    for name, default in asdict(TrainState()).items():
        value = stored.get(name, default)
        if type(value) is not type(default):
            raise ValueError(f"state.{name}")
        setattr(state, name, value)
    return state


def oom_advice(cfg: SimpleNamespace) -> str:
    """Return the settings to try when memory runs out: the largest smaller batch that keeps the steps the same."""
    if cfg.batch_size == 1:
        return "use --device cpu" if cfg.eval_only else SMALLER_MODEL
    factor = next(factor for factor in range(2, cfg.batch_size + 1) if cfg.batch_size % factor == 0)
    smaller = f"--batch_size {cfg.batch_size // factor}"
    if cfg.eval_only:
        return f"evaluate smaller batches: {smaller}"
    accumulation = cfg.gradient_accumulation_steps * factor
    return f"{SMALLER_BATCHES}\n       {smaller} --gradient_accumulation_steps {accumulation}"


def build_run(cfg: SimpleNamespace, overrides: dict[str, Any], ranks: DistributedContext) -> "TrainRun":
    """Check all settings, then build the run: new, resumed, or from the weights of a checkpoint."""
    if cfg.init_from == "scratch" and ranks.was_restarted:
        cfg.init_from = "auto"          # torchrun repeats the command: resume instead of starting over
    with ranks.fail_together():
        plan = plan_run(cfg, overrides, ranks)
        run_class = choose_run_class(cfg, ranks)
    if ranks.world_size > 1:
        with ranks.fail_together():
            check_same_plan(plan)
    return run_class(plan)


def choose_run_class(cfg: SimpleNamespace, ranks: DistributedContext) -> type["TrainRun"]:
    if cfg.shard and ranks.world_size > 1:
        compat.require_pytorch(compat.OLDEST_FOR_SHARD, "--shard")
        return optional.load("fsdp").ShardedRun
    return TrainRun


def check_same_plan(plan: RunPlan) -> None:
    """Raise UserError if settings, text, weights or chosen dtype differ between this rank and the main process."""
    settings = {name: value for name, value in run_settings(plan.cfg).items() if name not in PER_MACHINE_SETTINGS}
    weights = checkpoint.weights_checksum(plan.ckpt) if plan.ckpt else 0
    checksum = zlib.crc32(repr([settings, plan.shard_set.sha256, plan.backend.dtype, weights]).encode())
    if checksum != plan.ranks.broadcast_from_main(checksum):
        raise UserError(f"process {plan.ranks.rank} has other settings, text, dtype or checkpoint than process 0\n"
                        "       run the same command on all machines, with shared or equal data and output folders, "
                        "and a --dtype that all support")


class TrainRun:
    """Model, optimizers, progress and clock of a run. extras/fsdp.py has a subclass for sharded models.

    Attributes:
        model: the model that is evaluated and saved.
        wrapped_model: the same model for training; its backward pass averages the gradients over all ranks.
        state: the progress in plain numbers; model, optimizers and scaler hold everything else.
    """
    is_sharded = False

    def __init__(self, plan: RunPlan):
        self.cfg = plan.cfg
        self.backend = plan.backend
        self.ranks = plan.ranks
        self.shard_set = plan.shard_set
        self.tokenizer = plan.tokenizer
        self.state = TrainState()
        self.eval_seconds = 0.0             # duration of the last evaluation
        self.synced_seconds = 0.0           # from start_time to the last sync_clock_and_stop
        self.local_stop_signal = 0          # the signal that asked this process to stop
        self.stop_signal = 0                # the same on all ranks, set by sync_clock_and_stop
        self.pending_metrics: list[tuple[Tensor, Tensor]] = []      # loss and gradient norm of steps not yet checked
        self.has_checkpoint = plan.is_resumed       # last.pt belongs to this run
        self._build(plan)
        if plan.is_resumed:
            self._resume(plan.ckpt)
        plan.ckpt = None                    # free the memory: the model has its own copy
        self.start_time = time.perf_counter()
        self.last_save_seconds = self.seconds()     # run time at the last save of last.pt
        self.last_saved_step = self.state.iter_num  # step of this save

    def _build(self, plan: RunPlan) -> None:
        torch.manual_seed(self.cfg.seed)
        with self.ranks.fail_together():
            if plan.ckpt:
                self.model = checkpoint.build_model(plan.ckpt, source=init_checkpoint_path(plan.cfg))
            else:
                self.model = checkpoint.new_model(plan.args)
        self.chat = plan.ckpt.get("chat", "") if plan.ckpt else ""          # chat template of the initial checkpoint
        self.wrapped_model = self.wrap_model()
        self.optimizers = self.build_optimizers()
        self.scaler = self.backend.scaler()

    # ---- overridden by ShardedRun ------------------------------------------------------------

    def wrap_model(self) -> nn.Module:
        """Move the model to the device; wrap it in DDP if several ranks share each step."""
        self.model.to(self.backend.device)
        if self.ranks.world_size == 1:
            return self.model
        return compat.wrap_in_ddp(self.model)

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, self.cfg, self.backend)

    def gradient_sync(self, is_last: bool) -> AbstractContextManager:
        """Return a context that averages gradients over all ranks only after a step's last micro-batch."""
        if self.ranks.world_size == 1 or is_last:
            return nullcontext()
        return self.wrapped_model.no_sync()

    def clip_gradients(self) -> Tensor:
        """Clip the gradient norm to cfg.grad_clip; return the norm before clipping."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)

    # ---- batch and clock ---------------------------------------------------------------------

    @property
    def micro_steps_per_rank(self) -> int:
        """Number of micro-batches per step on this rank."""
        return self.cfg.gradient_accumulation_steps // self.ranks.world_size

    @property
    def windows_per_step(self) -> int:
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.model.args.max_seq_len

    @property
    def tokens_seen(self) -> int:
        return self.state.position * self.model.args.max_seq_len

    def seconds(self) -> float:
        """Return the wall time of the run, over all resumes. Several ranks use the main process's last time."""
        if self.ranks.world_size > 1:
            return self.state.seconds + self.synced_seconds
        return self.state.seconds + (time.perf_counter() - self.start_time)

    def sync_clock_and_stop(self) -> None:
        """Share the main process's clock, and any rank's stop signal, with all ranks."""
        elapsed = time.perf_counter() - self.start_time if self.ranks.is_main else 0.0
        self.synced_seconds, stop_signal = self.ranks.max(elapsed, self.local_stop_signal)
        self.stop_signal = int(stop_signal)

    def reached_limit(self) -> bool:
        """True if max_iters is reached, or max_minutes leaves only enough time for a final evaluation."""
        max_seconds = 60 * self.cfg.max_minutes
        is_late = max_seconds > 0 and self.seconds() + self.eval_seconds >= max_seconds
        return is_late or self.state.iter_num >= self.cfg.max_iters

    def progress(self) -> float:
        """Return the finished fraction of the run: of its steps or of its time, whichever is larger."""
        progress = self.state.iter_num / (self.cfg.lr_decay_iters or self.cfg.max_iters)
        if self.cfg.max_minutes:
            span = 60 * self.cfg.max_minutes - self.eval_seconds - self.state.setup
            progress = max(progress, (self.seconds() - self.state.setup) / max(span, 1e-9))
        return min(progress, 1.0)

    # ---- compile -----------------------------------------------------------------------------

    def compile(self) -> None:
        """Compile the layers, which share one compilation, and the chunks of the loss."""
        hide_compiler_messages()
        options = {"fallback_random": self.backend.device.type == "cpu"}    # faster dropout on a CPU
        for part in kernels.parts_to_compile(self.model):
            part.compile(dynamic=False, options=options)
        self.state.compiled = True

    def eager_mode(self) -> AbstractContextManager:
        """Return a context that runs a compiled model uncompiled: each new shape would compile it again."""
        return torch.compiler.set_stance("force_eager") if self.state.compiled else nullcontext()

    # ---- save and restore --------------------------------------------------------------------

    def checkpoint_is_due(self) -> bool:
        return self.seconds() - self.last_save_seconds > 60 * self.cfg.checkpoint_minutes

    def save(self, name: str) -> None:
        """Write a checkpoint to out_dir, from the main process."""
        ckpt = self.checkpoint_dict()
        with self.ranks.fail_together():
            if self.ranks.is_main:
                checkpoint.save_checkpoint(Path(self.cfg.out_dir, name), ckpt)
        if name == "last.pt":
            self.last_save_seconds = self.seconds()
            self.last_saved_step = self.state.iter_num

    def save_first_state(self) -> None:
        """Save a new run before its first step, then archive the old run. From then on, the new one can be resumed."""
        if self.cfg.init_from == "scratch":
            print("note:   --init_from scratch starts over each time; --init_from resume resumes this run")
        self.state.setup = self.seconds()
        self.save(NEW_CHECKPOINT)
        with self.ranks.fail_together():
            if self.ranks.is_main:
                archive_run(self.cfg.out_dir)

    def checkpoint_dict(self) -> Checkpoint:
        state = replace(self.state, seconds=self.seconds())
        device = self.backend.device
        gpu_rng = [torch.get_device_module(device).get_rng_state(device)] if has_async_copies(device) else []
        return {
            **checkpoint.model_state(self.model),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "iter_num": state.iter_num,
            "best_val_loss": state.best_val_loss,
            "config": run_settings(self.cfg),
            "tokenizer": self.tokenizer.model,
            "tokenizer_sha256": self.tokenizer.sha256,
            "data_sha256": self.shard_set.sha256,
            "chat": self.chat,
            "state": asdict(state),
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": gpu_rng},
        }

    def _resume(self, ckpt: Checkpoint) -> None:
        with self.ranks.fail_together():
            try:
                self.load_training_state(ckpt)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                path = f"{self.cfg.out_dir}/last.pt"
                command = format_command("train", out_dir=self.cfg.out_dir, init_from=path)
                raise UserError(f"{path} is from another version, or damaged ({error!r:.200})\n"
                                f"       start a new run with its weights: {command}") from error
        has_best = self.ranks.broadcast_from_main(self.has_best_checkpoint())
        if not has_best and self.state.best_val_loss < math.inf:
            print(f"note: {self.cfg.out_dir}/ckpt.pt is missing, damaged or from another run\n"
                  "      the next evaluation writes it again")
            self.state.best_val_loss = math.inf

    def has_best_checkpoint(self) -> bool:
        """True if ckpt.pt is intact and has this run's text and model."""
        try:
            ckpt = checkpoint.load_checkpoint(Path(self.cfg.out_dir, "ckpt.pt"))
            args = checkpoint.load_model_args(ckpt)
        except UserError:
            return False
        return args == self.model.args and ckpt.get("data_sha256") == self.shard_set.sha256

    def load_training_state(self, ckpt: Checkpoint) -> None:
        """Restore everything but the model. Raises any error that _resume catches if the checkpoint does not fit."""
        self.state = load_train_state(ckpt["state"])
        for optimizer, optimizer_state in zip(self.optimizers, ckpt["optimizer"], strict=True):
            self.restore_optimizer(optimizer, optimizer_state["state"])
        if ckpt["scaler"]:                  # empty unless the run was saved in float16
            self.scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"]["cpu"])
        device = self.backend.device
        if ckpt["rng"]["cuda"] and has_async_copies(device):
            torch.get_device_module(device).set_rng_state(ckpt["rng"]["cuda"][0], device)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Any]]) -> None:
        """Load saved moments. Learning rate and decay keep their current values: the settings may have changed."""
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        for weight, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim() and value.shape != weight.shape:
                    raise ValueError("optimizer")
