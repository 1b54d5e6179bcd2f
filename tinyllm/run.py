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

from extras.fsdp import divide, gathered, part_of
from model import Transformer
from tinyllm import checkpoint
from tinyllm.cli import UserError, command
from tinyllm.dataset import IGNORE, Task
from tinyllm.optim import Muon
from tinyllm.resume import Plan, lasting, saved_in
from tinyllm.sampling import Sampling
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


class Run:
    """A training under way, as the functions of train.py and this folder are given it.

    Attributes:
        model: what is evaluated and saved; where it is `divided`, the part of this process.
        wrapped: the same as it is trained; its backward pass brings the gradients of the processes together.
        state: where it is, in plain numbers; what else a step changes is in the model, the optimizers and the scaler.
    """

    def __init__(self, plan: Plan):
        """Build it as planned: new, from saved weights, or as a saved run was when it stopped."""
        self.cfg, self.where, self.data, self.vocabulary = plan.cfg, plan.where, plan.data, plan.vocabulary
        self.world = plan.world
        torch.manual_seed(self.cfg.seed)
        self.model = self.world.attempt(lambda: checkpoint.build_model(plan.saved, name=saved_in(plan.cfg))
                                        if plan.saved else Transformer(plan.args))
        self.wrapped = (divide(self.model, self.where, self.world) if self.divided else
                        self.world.wrap(self.model.to(self.where.device)))
        self.chat = plan.saved.get("chat", "") if plan.saved else ""        # the form of messages it was taught
        self.optimizers = make_optimizers(self)
        self.scaler = self.where.scaler()
        self.state = State()
        if plan.resumed:
            self.world.attempt(lambda: self.restore(plan.saved))
        plan.saved = None               # what was in it is in the model, and would not fit twice
        self.began, self.met = time.perf_counter(), 0.0    # met: seconds since, when the processes last met
        self.saved_at = self.seconds()
        self.saved_step = self.state.iter_num           # of last.pt; 0: there is none of this run
        self.fresh: list[list[Tensor]] = []             # loss and gradient length of steps that nobody looked at yet
        self.reserve = 0.0              # seconds that an evaluation takes
        self.asked = self.stop = 0      # the signal that asked this process to stop, and all of them

    def restore(self, saved: dict[str, Any]) -> None:
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
            if saved["rng"]["cuda"] and self.where.device.type == "cuda":
                torch.cuda.set_rng_state(saved["rng"]["cuda"][0], self.where.device)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            last = f"{self.cfg.out_dir}/last.pt"
            raise UserError(f"{last} is of another version, or damaged ({error!r:.200})\n       use its weights: "
                            + command("train", out_dir=self.cfg.out_dir, init_from=last)) from error

    @property
    def divided(self) -> bool:
        """Whether each process has but a part of the model."""
        return self.cfg.shard and self.world.size > 1

    @property
    def own_parts(self) -> int:
        """Micro-batches of a step that this process does."""
        return self.cfg.gradient_accumulation_steps // self.world.size

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.model.args.max_seq_len

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.state.position * self.model.args.max_seq_len

    def seconds(self) -> float:
        """Wall time of the run so far, all its parts together; of several processes, as of their last meeting."""
        return self.state.seconds + (time.perf_counter() - self.began if self.world.size == 1 else self.met)

    def meet(self) -> None:
        """Take the time of the first process, and learn whether any was asked to stop."""
        if self.world.size == 1:
            self.stop = self.asked
            return
        now = time.perf_counter() - self.began if self.world.first else 0.0
        self.met, stop = self.world.max(now, self.asked)
        self.stop = int(stop)

    def finished(self) -> bool:
        late = self.cfg.max_minutes and self.seconds() + self.reserve >= 60 * self.cfg.max_minutes
        return bool(late) or self.state.iter_num >= self.cfg.max_iters

    def seconds_left(self, seconds_per_step: float) -> float:
        """Until the end of the run, with the evaluations that are still to come."""
        cfg, done = self.cfg, self.state.iter_num
        evaluations = -(-cfg.max_iters // cfg.eval_interval) - done // cfg.eval_interval
        left = (cfg.max_iters - done) * seconds_per_step + evaluations * self.reserve
        return min(left, 60 * cfg.max_minutes - self.seconds()) if cfg.max_minutes else left

    def steps_left(self, seconds_per_step: float) -> int:
        """How many steps that leaves time for."""
        steps = self.cfg.max_iters - self.state.iter_num
        if not self.cfg.max_minutes:
            return steps
        left = 60 * self.cfg.max_minutes - self.seconds() - self.reserve
        return min(steps, max(round(left / (seconds_per_step + self.reserve / self.cfg.eval_interval)), 0))

    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by the clock, whichever is further."""
        done = self.state.iter_num / (self.cfg.lr_decay_iters or self.cfg.max_iters)
        if self.cfg.max_minutes:
            span = 60 * self.cfg.max_minutes - self.reserve - self.state.setup
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
        options = {"fallback_random": self.where.device.type == "cpu"}
        for part in (*self.model.layers, self.model.loss.part):
            part.compile(dynamic=False, options=options)
        self.state.compiled = True

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Score the whole val split; always the same windows, whatever the batch size. Processes share them."""
        self.model.eval()
        losses, counts = [], []         # looked at in the end, for a look waits for the device
        batches = Task.iter_once(self.data, "val", self.cfg.batch_size, self.model.args.max_seq_len,
                                 device=self.where.device, rank=self.world.rank, world_size=self.world.size)
        for x, y in tqdm(batches, unit=" batches", desc="evaluating", leave=False,
                         disable=None if self.world.first else True):
            with self._uncompiled(), self.where.autocast():
                losses.append(self.model(x, y))
            counts.append((y != IGNORE).sum())
        self.model.train()
        found = [*zip(torch.stack(losses).tolist(), torch.stack(counts).tolist())]
        nats = sum(loss * count for loss, count in found if count)      # 0: it only keeps the others company
        sums = torch.tensor([nats, sum(count for _, count in found)], dtype=torch.float64)
        nats, scored = self.world.sum(sums).tolist()
        return {"val_loss": nats / scored, "perplexity": math.exp(min(nats / scored, 700)),
                "bpb": nats / math.log(2) / self.data.count("val", "bytes")}

    def _uncompiled(self) -> AbstractContextManager:
        """Where nothing is compiled anew for other shapes. It costs half a second, so only where it counts."""
        return torch.compiler.set_stance("force_eager") if self.state.compiled else nullcontext()

    def write_samples(self) -> list[str]:
        """Stories from the fixed prompts, with the same random numbers each time; none if the model is divided."""
        if not self.cfg.sample_tokens or not self.world.first or self.divided:
            return []
        rows = [self.vocabulary.begin(text) for text in self.cfg.sample_prompts.split("|")]
        how = Sampling(temperature=SAMPLE_TEMPERATURE, seed=self.cfg.seed)
        engine = checkpoint.build_engine(self.model)
        for step in engine.generate(rows, self.cfg.sample_tokens, how, [self.vocabulary.eos_id]):
            for row, token in zip(rows, step.tokens):
                row += [token] if token is not None else []
        return [self.vocabulary.decode(row) for row in rows]

    def save(self, name: str) -> None:
        """Write ckpt.pt or last.pt; a weight that is not finite is a UserError. The first process does it for all."""
        self.world.attempt(lambda: require_finite(self))
        content = gathered(self.content(), self.world)
        self.world.first_does(lambda: checkpoint.save(Path(self.cfg.out_dir, name), content))
        if name == "last.pt":
            self.saved_at, self.saved_step = self.seconds(), self.state.iter_num

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        cuda = [torch.cuda.get_rng_state(self.where.device)] if self.where.device.type == "cuda" else []
        state = State(**{**asdict(self.state), "seconds": self.seconds()})
        return {
            **checkpoint.model_state(self.model), "optimizer": [each.state_dict() for each in self.optimizers],
            "iter_num": state.iter_num, "best_val_loss": state.best_val_loss, "config": lasting(self.cfg),
            "tokenizer": self.vocabulary.model, "tokenizer_sha256": self.vocabulary.sha256,
            "data_sha256": self.data.sha256, "chat": self.chat,
            "state": asdict(state), "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}}


def make_optimizers(run: Run) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101), and Muon for the matrices of the layers. What has one dimension does not decay."""
    cfg, parameters = run.cfg, list(run.model.parameters())
    matrices = [w for w in run.model.layers.parameters() if w.dim() > 1]
    embeddings = [w for w in parameters if w.dim() > 1 and all(w is not matrix for matrix in matrices)]
    of_layers = {"params": matrices, "weight_decay": cfg.weight_decay, "ratio": 1.0}
    groups = [{"params": embeddings, "weight_decay": cfg.weight_decay, "ratio": cfg.embedding_lr_ratio},
              {"params": [w for w in parameters if w.dim() <= 1], "weight_decay": 0.0, "ratio": cfg.embedding_lr_ratio}]
    adamw = torch.optim.AdamW(groups + [of_layers] * (cfg.optimizer == "adamw"), cfg.learning_rate,
                              (cfg.beta1, cfg.beta2), fused=run.where.device.type != "mps")
    if cfg.optimizer == "adamw":
        return [adamw]
    return [adamw, Muon([of_layers], cfg.learning_rate, cfg.momentum, dtype=run.where.dtype)]


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the moments that were saved. Rates and the like are those of the settings, which may differ."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {i: {name: part_of(value, weights[i]) if isinstance(value, Tensor) and value.dim() else value
                   for name, value in state.items()} for i, state in saved["state"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for weight, state in optimizer.state.items():
        shapes = {value.shape for value in state.values() if isinstance(value, Tensor) and value.dim()}
        if shapes - {weight.shape}:
            raise ValueError("optimizer")
