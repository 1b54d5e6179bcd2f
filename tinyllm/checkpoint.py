"""The whole state of a training run in one file: plain tensors and plain values, never half-written.

    ckpt = load_checkpoint("output/ckpt.pt")
    model = build_model(ckpt)
    tokenizer = build_tokenizer(ckpt)

llama2c's tools know the keys model, optimizer, model_args, iter_num, best_val_loss and config. Further keys are
tokenizer (the bytes of its file), architecture (llama if missing), chat (the name of the chat template), and in
checkpoints of a run optimizer, scaler, rng and state, which an exact resume needs.
"""
import os
import zipfile
import zlib
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model import ModelArgs, rope_frequencies
from tinyllm import kernels, optional
from tinyllm.cli import UserError, format_command
from tinyllm.files import atomic_write
from tinyllm.project import DATA, load_tokenizer, tokenizer_files
from tokenizer import BaseTokenizer

Checkpoint = dict[str, Any]

FORMAT = 1
SUFFIXES = (".pt", ".gguf", ".bin")             # of files that may be models
TOKENIZER_SUFFIXES = (".model", ".json")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REQUIRED = ("model", "model_args", "iter_num", "config")
REQUIRED_TO_RESUME = (*REQUIRED, "optimizer", "scaler", "rng", "state", "tokenizer", "tokenizer_sha256", "data_sha256")
EXPECTED_TYPES = {
    "model": dict, "model_args": dict, "iter_num": int, "config": dict, "scaler": dict, "rng": dict, "state": dict,
    "tokenizer": bytes, "tokenizer_sha256": str, "data_sha256": str, "architecture": str, "chat": str, "format": int}
LLAMA2C_CONSTANTS = (".mask", "freqs_cos", "freqs_sin", "freqs_cis")      # llama2.c stores them among the weights
MAX_ROPE_ELEMENTS = 1 << 27                     # max_seq_len x head_dim: a million tokens with heads of 128
BAD_VALUE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


# ---- files --------------------------------------------------------------------------------------

def save_checkpoint(path: str | Path, ckpt: Checkpoint) -> None:
    """Write a checkpoint. The old file stays until the new one is complete on disk."""
    with atomic_write(path) as file:
        try:
            torch.save(ckpt, file)
        except RuntimeError as error:           # torch.save makes this of the OSError of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_checkpoint(path: str | Path, required: tuple[str, ...] = REQUIRED, mmap: bool = False) -> Checkpoint:
    """Load a checkpoint to the CPU. Nothing in the file can run code. For mmap, see read_tensors.

    Raises UserError when the file is missing, damaged, of a newer format, or has not all required keys.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_checkpoint_error(path)
    ckpt = read_tensors(path, mmap)
    if problem := find_problem(ckpt, required):
        raise UserError(f"{path} is not a checkpoint for this version of tiny-llm: {problem}")
    return upgrade(ckpt)


def find_problem(ckpt: Any, required: tuple[str, ...]) -> str:
    """Return why something is not a checkpoint with the required keys; empty if it is one."""
    if not isinstance(ckpt, dict):
        return f"it holds a {type(ckpt).__name__}"
    if missing := [key for key in required if key not in ckpt]:
        return f"it has no {', '.join(missing)}"
    for key, expected in EXPECTED_TYPES.items():
        if key in ckpt and not isinstance(ckpt[key], expected):
            return f"{key} is no {expected.__name__}"
    if ckpt.get("format", FORMAT) > FORMAT:
        return f"it has format {ckpt['format']}, not {FORMAT}"
    for name, weight in ckpt["model"].items():
        if not _is_dense_float_tensor(weight) and not str(name).endswith(LLAMA2C_CONSTANTS):
            return f"{name} is no array of numbers"
    return ""


def _is_dense_float_tensor(weight: Any) -> bool:
    """True for a tensor that has all its numbers. One number that poses as a large array is not."""
    return (isinstance(weight, torch.Tensor) and weight.device.type == "cpu" and weight.layout == torch.strided
            and weight.dtype in FLOAT_DTYPES and weight.nbytes <= weight.untyped_storage().nbytes())


def upgrade(ckpt: Checkpoint) -> Checkpoint:
    """Return a checkpoint of llama2.c, or of an older version, with the keys and names of this version."""
    weights = {str(name).removeprefix("_orig_mod."): weight for name, weight in ckpt["model"].items()}
    if "architecture" in ckpt:
        return {**ckpt, "model": weights}
    weights = {name: weight for name, weight in weights.items() if not name.endswith(LLAMA2C_CONSTANTS)}
    args = {name: value for name, value in ckpt["model_args"].items() if value is not None}
    args = {**asdict(ModelArgs()), "n_kv_heads": args.get("n_heads"), **args}
    return {**ckpt, "model": weights, "model_args": args}


def read_tensors(path: Path, mmap: bool = False) -> Any:
    """Read a file of torch.save. Raises UserError if it is damaged, or holds anything but tensors and plain values.

    mmap: leave tensors in the file until they are used; not on Windows, where the file could not be replaced.
    """
    try:
        _verify_zip_crc(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and os.name == "posix")
    except PermissionError:
        raise
    except Exception as error:                  # a damaged file can fail in any way
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) is damaged, or not a checkpoint of plain tensors "
                        f"({type(error).__name__})") from error


def _verify_zip_crc(path: Path) -> None:
    """Raise ValueError if the file is not as it was written, which torch.load does not check."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return                              # an older form without checksums
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("torch.save compresses nothing")       # such a file could fill the memory
        if archive.testzip():
            raise ValueError("a checksum is wrong")


def missing_checkpoint_error(path: Path) -> UserError:
    """Return the error for a missing checkpoint: with similar ones that exist, or the command that makes one."""
    folder = path.parent if path.parent.is_dir() else Path("output")
    others = [str(file) for file in (*folder.glob("*"), *folder.glob("*/ckpt.pt")) if file.suffix in SUFFIXES]
    closest = get_close_matches(str(path), sorted(others), n=5, cutoff=0)
    command = format_command("train", out_dir="" if path.parent == Path("output") else path.parent)
    advice = f"there is {', '.join(closest)}" if closest else f"{command} makes one"
    return UserError(f"no checkpoint at {path.resolve()}\n       {advice}")


def weights_checksum(ckpt: Checkpoint) -> int:
    """Return a checksum of all weights of the model."""
    checksum = 0
    for weight in ckpt["model"].values():
        checksum = zlib.crc32(weight.contiguous().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


# ---- models and tokenizers of any format --------------------------------------------------------

def read_model(source: str | Path, tokenizer_source: str | Path = "") -> Checkpoint:
    """Read a model of any format: a checkpoint of this project here, all others through extras/formats.

    tokenizer_source: file of the tokenizer, if the source has none. Raises UserError for a missing or damaged model,
    and if the two do not belong together.
    """
    path = Path(source)
    ckpt = load_checkpoint(path, mmap=True) if is_checkpoint(path) else optional.load("formats").read_model(path)
    vocab_size = load_model_args(ckpt, source).vocab_size
    if not tokenizer_source:
        return ckpt
    tokenizer = read_tokenizer(tokenizer_source)
    if ckpt.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{tokenizer_source} is not the tokenizer that {source} was trained with\n"
                        "       leave --tokenizer out: the right one is inside")
    if tokenizer.n_words != vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.n_words} entries, the model {vocab_size}; "
                        "they do not belong together")
    return {**ckpt, "tokenizer": tokenizer.model, "tokenizer_sha256": tokenizer.sha256}


def read_tokenizer(source: str | Path) -> BaseTokenizer:
    """Read a tokenizer file, or the tokenizer inside a model of any format. Raises UserError."""
    if is_model(source):
        return build_tokenizer(read_model(source))
    path = Path(source)
    return load_tokenizer(path) if path.suffix in TOKENIZER_SUFFIXES else optional.load("formats").read_tokenizer(path)


def is_model(source: str | Path) -> bool:
    """True for a model of any format, False for a tokenizer file. Raises UserError for a folder without a model."""
    path = Path(source)
    return is_checkpoint(path) or path.suffix not in TOKENIZER_SUFFIXES and optional.load("formats").is_model(path)


def is_checkpoint(path: Path) -> bool:
    """True for a file that looks like a checkpoint of this project, by its name or its content."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".pt" or file.read(4) == b"PK\3\4"


# ---- building -----------------------------------------------------------------------------------

def new_model(args: Any) -> nn.Module:
    """Build a model with random weights: a Llama for ModelArgs, else a GPT-2."""
    if isinstance(args, ModelArgs):
        return kernels.build_transformer(args)
    return optional.load("gpt2").GPT2(args)


def build_model(ckpt: Checkpoint, copy_weights: bool = True, source: str | Path = "the checkpoint") -> nn.Module:
    """Build the model of a checkpoint. Raises UserError, with the source's name, if its weights are damaged.

    copy_weights: copy the weights in float32, for training; else the model shares the tensors of the checkpoint.
    """
    args = load_model_args(ckpt, source)
    weights = ckpt["model"]
    try:
        with torch.device("meta"), _SkipInit():         # takes no memory before the shapes are known to be right
            model = new_model(args)
        if copy_weights:
            weights = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        model.load_state_dict(weights, assign=True)
    except BAD_VALUE_ERRORS as error:
        raise UserError(f"{source}: its weights do not fit its model_args: {error}") from error
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{source} is damaged: {name} has values that are no numbers (NaN, inf)")
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


class _SkipInit(TorchFunctionMode):
    """Leave new modules without initial values: on the device meta, random numbers take a second and do nothing."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_init = getattr(function, "__module__", "") == "torch.nn.init"
        return None if is_init else function(*args, **(kwargs or {}))


def load_model_args(ckpt: Checkpoint, source: str | Path = "the checkpoint") -> Any:
    """Build the config of a checkpoint's model. Raises UserError, with the source's name, if no model can have it."""
    architecture = ckpt.get("architecture", "llama")
    if architecture not in ("llama", "gpt2"):
        raise UserError(f"{source} has the architecture {architecture!r}; known are llama, gpt2")
    args_class = ModelArgs if architecture == "llama" else optional.load("gpt2").GPT2Args
    try:
        args = args_class(**ckpt["model_args"])
        _check_stored_args(args)
    except BAD_VALUE_ERRORS as error:
        raise UserError(f"{source}: its model_args do not fit together: {error}") from error
    embeddings = ckpt["model"].get("tok_embeddings.weight")
    if embeddings is None or embeddings.shape != (args.vocab_size, args.dim) or args.n_layers > len(ckpt["model"]):
        raise UserError(f"{source}: its weights do not fit its model_args: {args.n_layers} layers, embeddings of "
                        f"{args.vocab_size} x {args.dim}")
    return args


def _check_stored_args(args: Any) -> None:
    """Raise one of BAD_VALUE_ERRORS for numbers that only a damaged file has."""
    if not 0 < args.norm_eps < 1e38 or args.max_seq_len * args.head_dim > MAX_ROPE_ELEMENTS:
        raise ValueError(f"norm_eps {args.norm_eps}, max_seq_len {args.max_seq_len}")
    if isinstance(args, ModelArgs):
        inv_freq = rope_frequencies(args).float()
        if args.ffn_dim < 1 or not 0 < inv_freq.min() <= inv_freq.max() < torch.inf:
            raise ValueError(f"hidden_dim {args.hidden_dim}, rope {args.rope_theta}, {args.rope_scaling!r:.80}")


def model_state(model: nn.Module) -> Checkpoint:
    """Return the part of a checkpoint that holds the model; not for the wrapper that torch.compile returns."""
    architecture = "llama" if isinstance(model.args, ModelArgs) else "gpt2"
    return {"model": model.state_dict(), "model_args": asdict(model.args), "architecture": architecture,
            "format": FORMAT}


def build_tokenizer(ckpt: Checkpoint) -> BaseTokenizer:
    """Load the tokenizer inside a checkpoint. Raises UserError if it has none, as files of other projects."""
    if not ckpt.get("tokenizer"):
        example = [*tokenizer_files(DATA), DATA / "tok4096.model"][0]
        raise UserError(f"the checkpoint has no tokenizer inside\n       name its file, such as --tokenizer {example}")
    return load_tokenizer(ckpt["tokenizer"])
