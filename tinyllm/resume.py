"""Check settings and files, and decide how a run starts: new, resumed, or with the weights of a checkpoint."""
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from model import ModelArgs
from tinyllm import checkpoint
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError, format_command, parse_bool_or_str
from tinyllm.device import Backend, choose_backend
from tinyllm.distributed import SINGLE_PROCESS, DistributedContext
from tinyllm.project import find_tokenizer, load_tokenizer
from tinyllm.shards import ShardSet, load_shards
from tokenizer import BaseTokenizer

INIT_MODES = ("auto", "scratch", "resume")          # values of init_from that are not a checkpoint
COMMAND_ONLY = ("out_dir", "eval_only")             # settings that the run does not store
# settings that a resumed run may change; data_dir and vocab_size only if they lead to the same data
MAY_CHANGE_ON_RESUME = ("preset", "init_from", "max_iters", "max_minutes", "eval_interval", "log_interval",
                        "checkpoint_minutes", "device", "dtype", "compile", "num_workers", "shard", "sample_prompts",
                        "sample_tokens", "data_dir", "vocab_size")
MAY_CHANGE_ON_INIT = ("max_seq_len", "dropout", "vocab_size")   # settings that may differ from the initial checkpoint's

RANGES = {                                          # lowest value, and exclusive upper limit
    "max_iters": (1, 2**31), "eval_interval": (1, 2**31), "log_interval": (1, 2**31),
    "batch_size": (1, 2**20), "gradient_accumulation_steps": (1, 2**31), "num_workers": (0, 1000),
    "sample_tokens": (0, 2**31), "warmup_iters": (0, 2**31), "lr_decay_iters": (0, 2**31), "seed": (0, 2**32),
    "max_minutes": (0, math.inf), "checkpoint_minutes": (0, math.inf), "learning_rate": (1e-30, math.inf),
    "min_lr": (0, math.inf), "embedding_lr_ratio": (0, math.inf), "weight_decay": (0, math.inf),
    "grad_clip": (0, math.inf), "beta1": (0, 1), "beta2": (0, 1), "momentum": (0, 1), "max_seq_len": (1, 2**20),
    "n_layers": (1, 1025), "hidden_dim": (0, 2**31), "dropout": (0, 1), "norm_eps": (1e-30, 1),
    "rope_theta": (1e-30, 1e38)}
CHOICES = {"optimizer": ("muon", "adamw"), "compile": ("auto", True, False)}


@dataclass
class RunPlan:
    """Everything that a run is built from. `ckpt`: the checkpoint to start with; `is_resumed`: it is the run's own."""
    cfg: SimpleNamespace
    backend: Backend
    shard_set: ShardSet
    tokenizer: BaseTokenizer
    args: Any                       # ModelArgs, or the config of another architecture
    ckpt: Checkpoint | None
    is_resumed: bool
    ranks: DistributedContext = SINGLE_PROCESS


def plan_run(cfg: SimpleNamespace, overrides: dict[str, Any], ranks: DistributedContext = SINGLE_PROCESS) -> RunPlan:
    """Check all settings, then the files, and decide how the run starts.

    With init_from "resume", cfg takes the run's saved settings, except those that the command line overrides.
    Raises UserError for all invalid settings at once, or for a file that is missing, damaged or unsuitable.
    """
    must_resume = cfg.init_from == "resume" and not cfg.eval_only
    last_ckpt = load_last(cfg)
    if must_resume:
        restore_settings(cfg, overrides, last_ckpt)
    backend = check_settings(cfg, ranks)
    changes = changed_settings(cfg, last_ckpt) if last_ckpt and not must_resume else []
    is_resumed = last_ckpt is not None and not changes
    ckpt = last_ckpt if is_resumed else load_init_checkpoint(cfg, overrides)
    if cfg.init_from not in INIT_MODES and not cfg.eval_only:
        check_fixed(overrides, ckpt["model_args"], MAY_CHANGE_ON_INIT)
    shards, tokenizer = load_data(cfg, ckpt or last_ckpt)
    args = choose_model_args(cfg, ckpt, tokenizer)
    if must_resume and shards.sha256 != ckpt["data_sha256"]:
        command = format_command("train", init_from=Path(cfg.out_dir) / "last.pt")
        raise UserError(f"the text or the vocabulary in {cfg.data_dir} has changed since the run began\n"
                        f"       train on the new data with the run's weights: {command}")
    if changes:
        print(f"starting a new run; the one in {cfg.out_dir}, at step {last_ckpt['iter_num']:,}, has "
              f"{', '.join(changes)}")
    return RunPlan(cfg, backend, shards, tokenizer, args, ckpt, is_resumed, ranks)


# ---- settings -----------------------------------------------------------------------------------

def run_settings(cfg: SimpleNamespace) -> dict[str, Any]:
    """Return the settings that a run stores."""
    return {name: value for name, value in vars(cfg).items() if name not in COMMAND_ONLY}


def check_settings(cfg: SimpleNamespace, ranks: DistributedContext) -> Backend:
    """Return the device and dtype. Raises UserError for all invalid settings at once."""
    errors = invalid_settings(cfg)
    if not cfg.eval_only and cfg.gradient_accumulation_steps % ranks.world_size:
        errors.append(f"gradient_accumulation_steps must be a multiple of {ranks.world_size}, the number of processes, "
                      f"not {cfg.gradient_accumulation_steps}")
    shape_names = {field.name for field in fields(ModelArgs)}
    has_shape_error = any(error.split()[0] in shape_names for error in errors)
    needs_shape = not cfg.eval_only and cfg.init_from in ("auto", "scratch")        # otherwise a checkpoint has it
    if needs_shape and not has_shape_error:
        try:
            shape_from_settings(cfg, ModelArgs.vocab_size)
        except ValueError as error:
            errors.append(f"model: {error}")
    try:
        backend = choose_backend(ranks.device(cfg.device), cfg.dtype)
    except UserError as error:
        errors.append(str(error))
    if errors:
        raise UserError("\n       ".join(errors))
    return backend


def invalid_settings(cfg: SimpleNamespace) -> list[str]:
    """Return a message for each setting with an invalid value."""
    errors = []
    for name, (low, high) in RANGES.items():
        value = getattr(cfg, name)
        if not low <= value < high:                 # also true for nan
            errors.append(f"{name} must be at least {low} and below {high}, not {value}")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            errors.append(f"{name} must be one of {', '.join(map(str, choices))}, not {getattr(cfg, name)}")
    for name, value in vars(cfg).items():
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            errors.append(f"{name} {ascii(value)} is not valid UTF-8")
    return errors


def shape_from_settings(cfg: SimpleNamespace, vocab_size: int) -> ModelArgs:
    shape = {field.name: getattr(cfg, field.name) for field in fields(ModelArgs) if hasattr(cfg, field.name)}
    return ModelArgs(**{**shape, "vocab_size": vocab_size})


# ---- the run in out_dir -------------------------------------------------------------------------

def load_last(cfg: SimpleNamespace) -> Checkpoint | None:
    """Return last.pt in out_dir, or None if it is missing or the command cannot resume it.

    Raises UserError if it is damaged, unless init_from names another checkpoint, or missing with init_from "resume".
    """
    path = Path(cfg.out_dir) / "last.pt"
    is_needed = cfg.init_from == "resume"
    if cfg.eval_only or cfg.init_from == "scratch" or not (is_needed or path.is_file()):
        return None
    try:
        return checkpoint.load_checkpoint(path, checkpoint.REQUIRED_TO_RESUME)
    except UserError as error:
        if cfg.init_from not in INIT_MODES:
            return None
        start = "scratch"
        with suppress(UserError):
            checkpoint.load_checkpoint(path.with_name("ckpt.pt"))
            start = path.with_name("ckpt.pt")
        command = format_command("train", data_dir=cfg.data_dir, out_dir=cfg.out_dir, init_from=start)
        raise UserError(f"{error}\n       start over: {command}") from error


def restore_settings(cfg: SimpleNamespace, overrides: dict[str, Any], last_ckpt: Checkpoint) -> None:
    """Set cfg to the settings of a saved run, except those that the command line overrides."""
    old = {name: value for name, value in last_ckpt["config"].items() if name in run_settings(cfg)}
    old["compile"] = parse_bool_or_str(str(old.get("compile", "auto")))         # earlier versions stored a string
    check_fixed(overrides, {**last_ckpt["model_args"], "optimizer": old.get("optimizer")}, MAY_CHANGE_ON_RESUME)
    for name, value in old.items():
        if name != "compile" and type(value) is not type(getattr(cfg, name)):
            raise UserError(f"{cfg.out_dir}/last.pt has a {type(value).__name__} for {name}, "
                            f"expected {type(getattr(cfg, name)).__name__}")
        if name not in overrides or name == "init_from":
            setattr(cfg, name, value)


def changed_settings(cfg: SimpleNamespace, last_ckpt: Checkpoint) -> list[str]:
    """Return the changes of settings or data that prevent the run of a checkpoint from being resumed."""
    old = last_ckpt["config"]
    may_change = set(MAY_CHANGE_ON_RESUME)
    windows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps
    if old.get("batch_size", 0) * old.get("gradient_accumulation_steps", 0) == windows_per_step:
        may_change |= {"batch_size", "gradient_accumulation_steps"}
    if cfg.init_from != "auto":             # the initial checkpoint sets the model's shape
        may_change |= last_ckpt["model_args"].keys() - {"max_seq_len", "dropout"}
        may_change -= {"init_from"}
    changes = []
    for name, value in run_settings(cfg).items():
        if name not in may_change and value != old.get(name):
            changes.append(f"{name} {old.get(name)!r} (now {value!r})")
    if not changes and load_data(cfg, last_ckpt)[0].sha256 != last_ckpt["data_sha256"]:
        changes.append("another text or vocabulary")
    return changes


def check_fixed(overrides: dict[str, Any], fixed: dict[str, Any], may_change: tuple[str, ...]) -> None:
    """Raise UserError if the command line changes a setting that a checkpoint fixes."""
    wrong = []
    for name, value in overrides.items():
        if name not in may_change and fixed.get(name, value) != value:
            wrong.append(f"{name} {fixed[name]}")
    if wrong:
        raise UserError(f"the checkpoint has {', '.join(wrong)}, which cannot change\n"
                        "       remove these settings from the command")


# ---- the initial checkpoint, the data and the model ---------------------------------------------

def init_checkpoint_path(cfg: SimpleNamespace) -> Path:
    """Return the path of the checkpoint that the run starts with or evaluates."""
    if cfg.init_from not in INIT_MODES:
        return Path(cfg.init_from)
    return Path(cfg.out_dir) / ("ckpt.pt" if cfg.eval_only else "last.pt")


def load_init_checkpoint(cfg: SimpleNamespace, overrides: dict[str, Any]) -> Checkpoint | None:
    """Return the checkpoint that init_from names; for training, with dropout and max_seq_len from the settings."""
    if cfg.init_from in INIT_MODES and not cfg.eval_only:
        return None
    path = init_checkpoint_path(cfg)
    ckpt = checkpoint.read_model(path)
    if cfg.eval_only:
        return ckpt
    args = checkpoint.load_model_args(ckpt, path)
    window = args.max_seq_len
    if "max_seq_len" in overrides:
        window = cfg.max_seq_len
    elif not ckpt["config"]:                # another project's model, with a context of perhaps thousands of tokens
        window = min(cfg.max_seq_len, window)
    return {**ckpt, "model_args": asdict(replace(args, max_seq_len=window, dropout=cfg.dropout))}


def load_data(cfg: SimpleNamespace, ckpt: Checkpoint | None) -> tuple[ShardSet, BaseTokenizer]:
    """Return the shards and their tokenizer: the checkpoint's, if data_dir has several."""
    digest = ckpt.get("tokenizer_sha256", "") if ckpt else ""
    path = find_tokenizer(cfg.data_dir, cfg.vocab_size, digest)
    tokenizer = load_tokenizer(path)
    return load_shards(path.with_suffix(""), tokenizer.sha256), tokenizer


def choose_model_args(cfg: SimpleNamespace, ckpt: Checkpoint | None, tokenizer: BaseTokenizer) -> Any:
    """Return the shape of the checkpoint's model; without a checkpoint, the shape in the settings."""
    if not ckpt:
        return shape_from_settings(cfg, tokenizer.vocab_size)
    digest = ckpt.get("tokenizer_sha256", "")
    if digest and digest != tokenizer.sha256:
        command = format_command("preprocess", tokenizer=init_checkpoint_path(cfg), data="PATH", data_dir="data/tuned")
        raise UserError(f"the checkpoint was trained with another vocabulary than the one in {cfg.data_dir}\n"
                        f"       choose its --data_dir, or encode the text with its vocabulary: {command}")
    args = checkpoint.load_model_args(ckpt, init_checkpoint_path(cfg))
    has_padding = digest and args.vocab_size > tokenizer.vocab_size          # more embeddings than tokens
    if args.vocab_size != tokenizer.vocab_size and not has_padding:
        raise UserError(f"the checkpoint's model has {args.vocab_size} tokens, the vocabulary {tokenizer.vocab_size}")
    return args
