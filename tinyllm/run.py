"""What a training is made of, built from a plan: how far it is, how long it may go on, how it scores, what it saves.

train.py takes its steps.
"""
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from extras.fsdp import full_state_dict, shard_like, shard_model
from model import Transformer
from tinyllm import checkpoint
from tinyllm.cli import UserError, format_command
from tinyllm.dataset import IGNORE_INDEX, Task
from tinyllm.engine import build_engine
from tinyllm.optim import Muon
from tinyllm.resume import RunPlan, init_checkpoint_path, run_settings
from tinyllm.sampling import SamplingParams
from tinyllm.watch import require_finite

SAMPLE_TEMPERATURE = 0.8        # of the stories that are written on the way


@dataclass
class State:
    """Where a run is. With weights, optimizer and random numbers it is all that the run needs to go on."""
    iter_num: int = 0                   # optimizer steps done
    position: int = 0                   # windows seen
    best_val_loss: float = math.inf
    seconds: float = 0.0                # wall time of the earlier parts of the run
    setup: float = 0.0                  # seconds of it before the first step
    log_lines: int = 0                  # entries of the log that belong to the steps done,
    log_sha256: str = ""                # and their digest
    usual_loss: float = 0.0             # average of the last losses, and of how far they rise above it: see watch.py
    usual_rise: float = 0.0
    compiled: bool = False


class TrainRun:
    """A training under way, as the functions of train.py and this folder are given it.

    Attributes:
        model: what is evaluated and saved; where it is `divided`, the part of this process.
        wrapped: the same as it is trained; its backward pass brings the gradients of the processes together.
        state: where it is, in plain numbers; what else a step changes is in the model, the optimizers and the scaler.
    """

    def __init__(self, plan: RunPlan):
        """Build it as planned: new, from saved weights, or as a saved run was when it stopped."""
        self.cfg, self.backend, self.data, self.vocabulary = plan.cfg, plan.backend, plan.data, plan.vocabulary
        self.dist = plan.dist
        torch.manual_seed(self.cfg.seed)
        self.model = self.dist.all_or_none(lambda: checkpoint.build_model(plan.saved, name=init_checkpoint_path(plan.cfg))
                                        if plan.saved else Transformer(plan.args))
        self.ddp_model = (shard_model(self.model, self.backend, self.dist) if self.is_sharded else
                        self.dist.wrap(self.model.to(self.backend.device)))
        self.chat = plan.saved.get("chat", "") if plan.saved else ""        # the form of messages it was taught
        self.optimizers = build_optimizers(self)
        self.scaler = self.backend.scaler()
        self.state = State()
        if plan.resumed:
            self.dist.all_or_none(lambda: self.load_checkpoint_dict(plan.saved))
        plan.saved = None               # what was in it is in the model, and would not fit twice
        self.start_time, self.synced_seconds = time.perf_counter(), 0.0    # met: seconds since, when the processes last met
        self.saved_at = self.seconds()
        self.last_saved_step = self.state.iter_num           # of last.pt; 0: there is none of this run
        self.pending_metrics: list[list[Tensor]] = []             # loss and gradient length of steps that nobody looked at yet
        self.eval_seconds = 0.0              # seconds that an evaluation takes
        self.requested_signal = self.stop_signal = 0      # the signal that asked this process to stop, and all of them

    def load_checkpoint_dict(self, saved: dict[str, Any]) -> None:
        """Go on where a saved run stopped. Raises UserError when the file has not what that takes."""
        try:
            self.state = State(**saved["state"])
            if [*map(type, vars(self.state).values())] != [*map(type, vars(State()).values())]:
                raise ValueError("state")
            for optimizer, own in zip(self.optimizers, saved["optimizer"], strict=True):
                restore_optimizer(optimizer, own)
            if saved["scaler"]:         # else it was a run in another format, without one
                self.scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["rng"]["cpu"])
            if saved["rng"]["cuda"] and self.backend.device.type == "cuda":
                torch.cuda.set_rng_state(saved["rng"]["cuda"][0], self.backend.device)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            last = f"{self.cfg.out_dir}/last.pt"
            raise UserError(f"{last} is of another version, or damaged ({error!r:.200})\n       use its weights: "
                            + format_command("train", out_dir=self.cfg.out_dir, init_from=last)) from error

    @property
    def is_sharded(self) -> bool:
        """Whether each process has but a part of the model."""
        return self.cfg.shard and self.dist.size > 1

    @property
    def micro_steps_per_rank(self) -> int:
        """Micro-batches of a step that this process does."""
        return self.cfg.gradient_accumulation_steps // self.dist.size

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.model.args.max_seq_len

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.state.position * self.model.args.max_seq_len

    def seconds(self) -> float:
        """Wall time of the run so far, all its parts together; of several processes, as of their last meeting."""
        return self.state.seconds + (time.perf_counter() - self.start_time if self.dist.size == 1 else self.synced_seconds)

    def sync_clock_and_stop(self) -> None:
        """Take the time of the first process, and learn whether any was asked to stop."""
        if self.dist.size == 1:
            self.stop_signal = self.requested_signal
            return
        now = time.perf_counter() - self.start_time if self.dist.is_main else 0.0
        self.synced_seconds, stop = self.dist.max(now, self.requested_signal)
        self.stop_signal = int(stop)

    def finished(self) -> bool:
        late = self.cfg.max_minutes and self.seconds() + self.eval_seconds >= 60 * self.cfg.max_minutes
        return bool(late) or self.state.iter_num >= self.cfg.max_iters

    def seconds_left(self, seconds_per_step: float) -> float:
        """Until the end of the run, with the evaluations that are still to come."""
        cfg, done = self.cfg, self.state.iter_num
        evaluations = -(-cfg.max_iters // cfg.eval_interval) - done // cfg.eval_interval
        left = (cfg.max_iters - done) * seconds_per_step + evaluations * self.eval_seconds
        return min(left, 60 * cfg.max_minutes - self.seconds()) if cfg.max_minutes else left

    def steps_left(self, seconds_per_step: float) -> int:
        """How many steps that leaves time for."""
        steps = self.cfg.max_iters - self.state.iter_num
        if not self.cfg.max_minutes:
            return steps
        left = 60 * self.cfg.max_minutes - self.seconds() - self.eval_seconds
        return min(steps, max(round(left / (seconds_per_step + self.eval_seconds / self.cfg.eval_interval)), 0))

    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by the clock, whichever is further."""
        done = self.state.iter_num / (self.cfg.lr_decay_iters or self.cfg.max_iters)
        if self.cfg.max_minutes:
            span = 60 * self.cfg.max_minutes - self.eval_seconds - self.state.setup
            done = max(done, (self.seconds() - self.state.setup) / max(span, 1e-9))
        return min(done, 1.0)

    def learning_rate(self) -> float:
        """Linear warm-up, then linear decay to min_lr (arXiv 2502.15938)."""
        cfg = self.cfg
        warmup = min(1.0, (self.state.iter_num + 1) / (cfg.warmup_iters + 1))
        decay = 1 - self.progress() if cfg.decay_lr else 1.0
        return warmup * (cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * decay)

    def compile(self) -> None:
        """Compile the layers, which are all alike, so that it takes the time of one; and a part of the loss."""
        # on a CPU, random numbers for dropout are faster uncompiled
        options = {"fallback_random": self.backend.device.type == "cpu"}
        for part in (*self.model.layers, self.model.loss.part):
            part.compile(dynamic=False, options=options)
        self.state.compiled = True

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Score the whole val split; always the same windows, whatever the batch size. Processes share them."""
        self.model.eval()
        losses, counts = [], []         # looked at in the end, for a look waits for the device
        batches = Task.iter_split(self.data, "val", self.cfg.batch_size, self.model.args.max_seq_len,
                                 device=self.backend.device, rank=self.dist.rank, world_size=self.dist.size)
        for x, y in tqdm(batches, unit=" batches", desc="evaluating", leave=False,
                         disable=None if self.dist.is_main else True):
            with self._eager_mode(), self.backend.autocast():
                losses.append(self.model(x, y))
            counts.append((y != IGNORE_INDEX).sum())
        self.model.train()
        found = [*zip(torch.stack(losses).tolist(), torch.stack(counts).tolist())]
        nats = sum(loss * count for loss, count in found if count)      # 0: it only keeps the others company
        sums = torch.tensor([nats, sum(count for _, count in found)], dtype=torch.float64)
        nats, scored = self.dist.sum(sums).tolist()
        return {"val_loss": nats / scored, "perplexity": math.exp(min(nats / scored, 700)),
                "bpb": nats / math.log(2) / self.data.total("val", "bytes")}

    def _eager_mode(self) -> AbstractContextManager:
        """Where nothing is compiled anew for other shapes. It costs half a second, so only where it counts."""
        return torch.compiler.set_stance("force_eager") if self.state.compiled else nullcontext()

    def generate_samples(self) -> list[str]:
        """Stories from the fixed prompts, with the same random numbers each time; none if the model is divided."""
        if not self.cfg.sample_tokens or not self.dist.is_main or self.is_sharded:
            return []
        rows = [self.vocabulary.encode_prompt(text) for text in self.cfg.sample_prompts.split("|")]
        how = SamplingParams(temperature=SAMPLE_TEMPERATURE, seed=self.cfg.seed)
        engine = build_engine(self.model)
        for step in engine.generate(rows, self.cfg.sample_tokens, how, [self.vocabulary.eos_id]):
            for row, token in zip(rows, step.tokens):
                row += [token] if token is not None else []
        return [self.vocabulary.decode(row) for row in rows]

    def save(self, name: str) -> None:
        """Write ckpt.pt or last.pt; a weight that is not finite is a UserError. The first process does it for all."""
        self.dist.all_or_none(lambda: require_finite(self))
        content = full_state_dict(self.checkpoint_dict(), self.dist)
        self.dist.on_main(lambda: checkpoint.save_checkpoint(Path(self.cfg.out_dir, name), content))
        if name == "last.pt":
            self.saved_at, self.last_saved_step = self.seconds(), self.state.iter_num

    def checkpoint_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        cuda = [torch.cuda.get_rng_state(self.backend.device)] if self.backend.device.type == "cuda" else []
        state = State(**{**asdict(self.state), "seconds": self.seconds()})
        return {
            **checkpoint.model_state(self.model), "optimizer": [each.state_dict() for each in self.optimizers],
            "iter_num": state.iter_num, "best_val_loss": state.best_val_loss, "config": run_settings(self.cfg),
            "tokenizer": self.vocabulary.model, "tokenizer_sha256": self.vocabulary.sha256,
            "data_sha256": self.data.sha256, "chat": self.chat,
            "state": asdict(state), "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}}


def build_optimizers(run: TrainRun) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101), and Muon for the matrices of the layers. What has one dimension does not decay."""
    cfg, parameters = run.cfg, list(run.model.parameters())
    matrices = [w for w in run.model.layers.parameters() if w.dim() > 1]
    embeddings = [w for w in parameters if w.dim() > 1 and all(w is not matrix for matrix in matrices)]
    matrix_group = {"params": matrices, "weight_decay": cfg.weight_decay, "lr_scale": 1.0}
    groups = [{"params": embeddings, "weight_decay": cfg.weight_decay, "lr_scale": cfg.embedding_lr_ratio},
              {"params": [w for w in parameters if w.dim() <= 1], "weight_decay": 0.0, "lr_scale": cfg.embedding_lr_ratio}]
    adamw = torch.optim.AdamW(groups + [matrix_group] * (cfg.optimizer == "adamw"), cfg.learning_rate,
                              (cfg.beta1, cfg.beta2), fused=run.backend.device.type != "mps")
    if cfg.optimizer == "adamw":
        return [adamw]
    return [adamw, Muon([matrix_group], cfg.learning_rate, cfg.momentum, dtype=run.backend.dtype)]


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the moments that were saved. Rates and the like are those of the settings, which may differ."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {i: {name: shard_like(value, weights[i]) if isinstance(value, Tensor) and value.dim() else value
                   for name, value in state.items()} for i, state in saved["state"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for weight, state in optimizer.state.items():
        shapes = {value.shape for value in state.values() if isinstance(value, Tensor) and value.dim()}
        if shapes - {weight.shape}:
            raise ValueError("optimizer")
