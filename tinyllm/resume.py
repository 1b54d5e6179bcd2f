"""Before the first step of a training, everything is checked, and all problems are reported at once."""
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from model import ModelArgs
from tinyllm import checkpoint, shards
from tinyllm import device as devices
from tinyllm.cli import UserError, format_command, parse_bool_or_str
from tinyllm.distributed import SINGLE_PROCESS, DistributedContext
from tinyllm.files import sha256
from tinyllm.project import find_tokenizer, folders_with, load_tokenizer, shorten_list, tokenizer_files
from tokenizer import BaseTokenizer

COMMAND_ONLY = ("out_dir", "eval_only")        # settings of this command, not of the run
# settings that may change while a run goes on; the last two only if they lead to the same text and vocabulary
MAY_CHANGE_ON_RESUME = ("preset", "init_from", "max_iters", "max_minutes", "eval_interval", "log_interval", "checkpoint_minutes",
        "device", "dtype", "compile", "num_workers", "shard", "sample_prompts", "sample_tokens",
        "data_dir", "vocab_size")
INIT_MODES = ("auto", "scratch", "resume")         # init_from without a checkpoint of another run
CHECKPOINT_BYTES_PER_PARAM = 12                       # all of them but the gradient


@dataclass
class RunPlan:
    """What a run is built from. `saved` is a state to begin with; `resumed` says that its run goes on."""
    cfg: SimpleNamespace
    backend: devices.Backend
    data: shards.ShardSet
    vocabulary: BaseTokenizer
    args: Any
    saved: dict[str, Any] | None
    resumed: bool
    dist: DistributedContext = SINGLE_PROCESS


def run_settings(cfg: SimpleNamespace) -> dict[str, Any]:
    """The settings that make a run what it is."""
    return {name: value for name, value in vars(cfg).items() if name not in COMMAND_ONLY}


class ErrorList(list[str]):
    """What is wrong with a command, to be said all at once."""

    def collect(self, action: Callable[[], Any], otherwise: Any = None) -> Any:
        """What action() returns; `otherwise` where it raises UserError, which is one problem more."""
        try:
            return action()
        except UserError as error:
            if str(error) not in self:
                self.append(str(error))
            return otherwise


def plan_run(cfg: SimpleNamespace, given: dict[str, Any], dist: DistributedContext = SINGLE_PROCESS) -> RunPlan:
    """Check everything and report all problems at once.

    Args:
        cfg: the settings; with init_from "resume" they become those that the run was begun with.
        given: those that the command line names, which count in any case.
        dist: the processes that share the work.
    Raises:
        UserError: with every problem.
    """
    problems, gone = ErrorList(), ErrorList()
    resumed = cfg.init_from == "resume" and not cfg.eval_only
    saved = load_init_checkpoint(cfg, given, resumed, problems, gone)
    problems += invalid_settings(cfg) or check_accumulation_divides(cfg, dist)
    where = problems.collect(lambda: devices.choose_backend(dist.device(cfg.device), cfg.dtype))
    last = None if resumed else problems.collect(lambda: find_last(cfg))
    data, vocabulary = problems.collect(lambda: load_data(cfg, saved or last), (None, None))
    if data and resumed:
        problems.collect(lambda: check_same_data(cfg, saved, data))
    differ = changed_settings(cfg, last, data) if data and last and not problems else None
    if differ == []:
        saved, resumed = last, True         # it needs no more what it began with
        if cfg.init_from not in INIT_MODES:
            problems.collect(lambda: check_shape(given, checkpoint.build_args(last, cfg.out_dir)))
    else:
        problems += gone
    args = problems.collect(lambda: build_model_args(cfg, saved, vocabulary)) if vocabulary else None
    if args and not problems:
        problems.collect(lambda: check_disk(cfg, args, resumed))
    if problems:
        raise UserError("\n       ".join(problems))
    if differ:
        print(f"a new run: the one in {cfg.out_dir}, at step {last['iter_num']:,}, has other settings: "
              + ", ".join(differ))
    return RunPlan(cfg, where, data, vocabulary, args, saved, resumed, dist)


def load_init_checkpoint(cfg: SimpleNamespace, given: dict[str, Any], resumed: bool, problems: ErrorList, gone: ErrorList
               ) -> dict[str, Any] | None:
    """The state that init_from names, made to fit the settings; or, when its run is resumed, cfg made to fit it.

    That it cannot be read is for `gone`, since a run that has begun with it can go on without it.
    Raises UserError when there is nothing to resume, for nothing else can be checked then.
    """
    if resumed:
        saved = load_last(cfg)
        problems.collect(lambda: restore_settings(cfg, given, saved))
        return saved
    if cfg.init_from in INIT_MODES and not cfg.eval_only:
        return None
    saved = gone.collect(lambda: checkpoint.read_model(init_checkpoint_path(cfg)))
    if not saved or cfg.eval_only:
        return saved
    return problems.collect(lambda: adapt_checkpoint(cfg, given, saved), saved)


def init_checkpoint_path(cfg: SimpleNamespace) -> Path:
    """The file that a saved state is from."""
    if cfg.init_from not in INIT_MODES:
        return Path(cfg.init_from)
    return Path(cfg.out_dir) / ("ckpt.pt" if cfg.eval_only else "last.pt")


def adapt_checkpoint(cfg: SimpleNamespace, given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved model with the dropout of the settings, and another window where one is asked for.

    A rotary embedding has no weights to change for that, GPT-2 has a row for each place.
    Raises UserError for settings that would be another model than the saved one, or none at all.
    """
    own = checkpoint.build_args(saved, init_checkpoint_path(cfg))
    window, places = own.max_seq_len, saved["model"].get("positions.weight")
    if "max_seq_len" in given:
        window = cfg.max_seq_len
    elif not saved["config"]:                               # of others; theirs may be thousands of tokens
        window = min(cfg.max_seq_len, window)
    check_shape(given, own)
    if places is not None and window > len(places):
        raise UserError(f"GPT-2 has weights for each of its {len(places)} places; --max_seq_len can be that, or less")
    try:
        fitted = replace(own, max_seq_len=window, dropout=cfg.dropout)
    except ValueError as error:
        raise UserError(str(error)) from error
    model = saved["model"] if places is None else {**saved["model"], "positions.weight": places[:window]}
    return {**saved, "model": model, "model_args": asdict(fitted)}


def check_shape(given: dict[str, Any], own: Any) -> None:
    """Raise UserError for settings that would be another model than the saved one."""
    differ = [f"{name} {getattr(own, name)}" for name, value in given.items()
              if name not in ("max_seq_len", "dropout", "vocab_size") and value != getattr(own, name, value)]
    if differ:
        raise UserError(f"the model of --init_from has {', '.join(differ)}; leave those settings out")


def find_last(cfg: SimpleNamespace) -> dict[str, Any] | None:
    """The newest state in out_dir, if there is one and the settings allow to go on with it."""
    last = Path(cfg.out_dir) / "last.pt"
    if cfg.eval_only or cfg.init_from == "scratch" or not last.is_file():
        return None
    try:
        return load_last(cfg)
    except UserError:
        if cfg.init_from == "auto":
            raise
        return None             # its weights are not needed


def load_last(cfg: SimpleNamespace) -> dict[str, Any]:
    """The newest state in out_dir. Raises UserError, with what else there is, when it cannot be gone on with."""
    last = Path(cfg.out_dir) / "last.pt"
    if not last.is_file():
        others = folders_with(cfg.out_dir, "last.pt")
        raise UserError(f"no {last}, so there is no run to go on with\n       " + (
            f"there are runs in {shorten_list(others)}; name one: --out_dir" if others else "begin one, without --init_from"))
    try:
        return checkpoint.load_checkpoint(last, checkpoint.REQUIRED_TO_RESUME)
    except UserError as error:
        best = last.with_name("ckpt.pt")
        how, start = (", with the best weights if they are sound", best) if best.is_file() else ("", "scratch")
        anew = format_command("train", data_dir=cfg.data_dir, out_dir=cfg.out_dir, init_from=start)
        raise UserError(f"{error}\n       begin anew{how}: {anew}") from error


def changed_settings(cfg: SimpleNamespace, last: dict[str, Any], data: shards.ShardSet) -> list[str]:
    """What of a state is not of the run that the settings describe; where nothing is, the same command goes on."""
    own = last["config"]
    same_step = own.get("batch_size", 0) * own.get("gradient_accumulation_steps", 0) == (
        cfg.batch_size * cfg.gradient_accumulation_steps)
    of_other = cfg.init_from not in ("auto", "scratch")     # a model that has a shape of its own, but for these two
    shape = tuple(last["model_args"].keys() - {"max_seq_len", "dropout"}) * of_other
    free = MAY_CHANGE_ON_RESUME + ("batch_size", "gradient_accumulation_steps") * same_step + shape
    differ = [f"{name} {own.get(name)!r} (now {value!r})" for name, value in run_settings(cfg).items()
              if name not in free and value != own.get(name)]
    if cfg.init_from not in ("auto", own.get("init_from")):
        differ.append(f"init_from {own.get('init_from')!r} (now {cfg.init_from!r})")
    if last["data_sha256"] != data.sha256:
        differ.append("another text or vocabulary")
    return differ


def is_finished(saved: dict[str, Any]) -> bool:
    """Whether a saved run has come to the end that its own settings set, as far as they tell."""
    steps, minutes = (saved["config"].get(name) for name in ("max_iters", "max_minutes"))
    try:
        return saved["iter_num"] >= steps or 0 < 60 * minutes <= saved["state"]["seconds"]
    except (TypeError, KeyError):
        return True


def restore_settings(cfg: SimpleNamespace, given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Give cfg the settings that a run was begun with, but for those that the command line names."""
    own = {name: value for name, value in saved["config"].items() if name in run_settings(cfg)}
    own["compile"] = parse_bool_or_str(str(own.get("compile", "auto")))       # it was a text in earlier versions
    fixed = [name for name in given
             if name in (*saved["model_args"], "optimizer") and name not in MAY_CHANGE_ON_RESUME and given[name] != own.get(name)]
    if fixed:
        raise UserError(f"{', '.join(fixed)} cannot change while a run goes on; begin another: --init_from scratch")
    for name, value in own.items():
        if name != "compile" and type(value) is not type(getattr(cfg, name)):
            raise UserError(f"{cfg.out_dir}/last.pt has a {type(value).__name__} for {name}; is it of another version?")
        if name not in given or name == "init_from":
            setattr(cfg, name, value)


def check_same_data(cfg: SimpleNamespace, saved: dict[str, Any], data: shards.ShardSet) -> None:
    """Raise UserError when a run that is resumed was of another text, or another vocabulary."""
    if saved["data_sha256"] != data.sha256:
        raise UserError(f"the text or the vocabulary in {cfg.data_dir} is not that of the run any more\n       "
                        "to train on it from here: " + format_command("train", init_from=Path(cfg.out_dir) / "last.pt"))


def invalid_settings(cfg: SimpleNamespace) -> list[str]:
    """A problem for each setting with a value that cannot be."""
    counts = ("max_iters", "eval_interval", "log_interval", "gradient_accumulation_steps")
    not_negative = ("max_minutes", "checkpoint_minutes", "weight_decay", "grad_clip", "min_lr", "embedding_lr_ratio")
    ranges = [*((name, 1, 2**31) for name in counts), *((name, 0, math.inf) for name in not_negative),
              *((name, 0, 2**31) for name in ("sample_tokens", "warmup_iters", "lr_decay_iters")),
              *((name, 0, 1) for name in ("beta1", "beta2", "momentum")),
              ("learning_rate", 1e-30, math.inf), ("batch_size", 1, 2**20), ("num_workers", 0, 1000),
              ("seed", 0, 2**32)]
    words = [("optimizer", ("muon", "adamw")), ("compile", ("auto", True, False))]
    wrong = [f"{name} must be one of {', '.join(map(str, known))}, not {getattr(cfg, name)}" for name, known in words
             if getattr(cfg, name) not in known]
    wrong += [f"{name} names no folder; . is this one" for name in ("out_dir", "data_dir") if not getattr(cfg, name)]
    wrong += [f"{name} {ascii(value)} has bytes that are not UTF-8, which no log can hold" for name, value in
              vars(cfg).items() if isinstance(value, str) and re.search("[\ud800-\udfff]", value)]
    return wrong + [f"{name} must be {describe_range(low, high, type(value))}, not {value}" for name, low, high in ranges
                    if not low <= (value := getattr(cfg, name)) < high]


def describe_range(low: float, high: float, kind: type) -> str:
    """In words: numbers of a kind from low on, and below high."""
    if kind is int:
        return f"a whole number from {low} to {high - 1}"
    return f"{low:g} or more and " + (f"below {high}" if high < math.inf else "finite")


def check_accumulation_divides(cfg: SimpleNamespace, dist: DistributedContext) -> list[str]:
    """A problem, if the micro-batches of a step cannot be divided among the processes."""
    parts, size = cfg.gradient_accumulation_steps, cfg.batch_size
    if cfg.eval_only or parts % dist.size == 0:
        return []
    more = -(-parts // dist.size) * dist.size
    same = next((n for n in range(more, parts * size + 1, dist.size) if parts * size % n == 0), 0)
    use = (f"--gradient_accumulation_steps {same} --batch_size {parts * size // same}, which is the same step" if same
           else f"--gradient_accumulation_steps {more}, which is a larger step")
    return [f"gradient_accumulation_steps {parts} cannot be divided among {dist.size} processes\n       use {use}"]


def load_data(cfg: SimpleNamespace, saved: dict[str, Any] | None) -> tuple[shards.ShardSet, BaseTokenizer]:
    """The shards, and their vocabulary; of several in data_dir that of the saved state."""
    path = find_tokenizer(cfg.data_dir, cfg.vocab_size, (saved or {}).get("tokenizer_sha256", ""))
    vocabulary = load_tokenizer(path)
    return shards.load_shards(path.with_suffix(""), vocabulary.sha256), vocabulary


def build_model_args(cfg: SimpleNamespace, saved: dict[str, Any] | None, vocabulary: BaseTokenizer
               ) -> Any:
    """The shape of the saved model, else that of the settings."""
    chosen = {field.name: getattr(cfg, field.name) for field in fields(ModelArgs) if hasattr(cfg, field.name)}
    if saved and saved.get("tokenizer_sha256", vocabulary.sha256) != vocabulary.sha256:
        of_it = [folder for folder in folders_with(cfg.data_dir, "tok*.model")
                 if saved["tokenizer_sha256"] in map(sha256, tokenizer_files(folder))]
        perhaps = f"is it that of --data_dir {shorten_list(of_it)}? else " if of_it else ""
        raise UserError(f"the checkpoint was trained with another vocabulary than that of {cfg.data_dir}\n       "
                        f"{perhaps}give the text its vocabulary: "
                        + format_command("preprocess", tokenizer=init_checkpoint_path(cfg), data="PATH", data_dir="data/tuned"))
    try:
        args = (checkpoint.build_args(saved, init_checkpoint_path(cfg)) if saved else
                ModelArgs(**{**chosen, "vocab_size": vocabulary.n_words}))
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from error
    known = saved and "tokenizer_sha256" in saved           # then it may have more embeddings than entries
    if args.vocab_size < vocabulary.n_words or not known and args.vocab_size != vocabulary.n_words:
        raise UserError(f"the checkpoint's model has {args.vocab_size} tokens, the vocabulary {vocabulary.n_words}")
    return args


def check_disk(cfg: SimpleNamespace, args: Any, resumed: bool) -> None:
    """Two checkpoints, and one being written, need room; what a run that goes on has written already is there."""
    if cfg.eval_only:
        return
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    need = 3 * CHECKPOINT_BYTES_PER_PARAM * count_parameters(args)
    need -= sum(path.stat().st_size for path in folder.glob("*.pt")) if resumed else 0
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"the checkpoints need {need / 1e6:,.0f} MB, {folder.resolve()} has {free / 1e6:,.0f} MB free\n"
                        "       make room, or name another --out_dir")


def count_parameters(args: Any) -> int:
    """Of the model, from one and two layers of it. Raises UserError when nothing could hold it."""
    def count(n_layers: int) -> int:
        with torch.device("meta"):
            build = checkpoint.find_architecture(checkpoint.architecture_of(args)).model
            return build(replace(args, n_layers=n_layers)).count_parameters()
    try:
        one, two = count(1), count(2)
    except (RuntimeError, TypeError) as error:
        raise UserError("a matrix of the model would be larger than any memory; use a smaller --dim or --hidden_dim"
                        ) from error
    return one + (args.n_layers - 1) * (two - one)
