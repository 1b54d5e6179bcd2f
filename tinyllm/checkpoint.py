"""Checkpoints: the complete state of a training run in one file of plain tensors and values.

    ckpt = load_checkpoint("output/ckpt.pt")
    model = build_model(ckpt)
    tokenizer = build_tokenizer(ckpt)

llama2.c's tools read the keys model, optimizer, model_args, iter_num, best_val_loss and config. Further keys are
tokenizer (the bytes of its file), architecture (llama if missing) and chat (the name of the chat template). The keys
scaler, rng and state make an exact resume possible.
"""
import os
import zipfile
import zlib
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import ModelArgs, rope_frequencies
from tinyllm import compat, kernels, optional
from tinyllm.cli import UserError, format_command
from tinyllm.files import atomic_write
from tinyllm.project import DATA, load_tokenizer, tokenizer_files
from tokenizer import BaseTokenizer

Checkpoint = dict[str, Any]

FORMAT = 1
SUFFIXES = (".pt", ".gguf", ".bin")             # files that may be models
TOKENIZER_SUFFIXES = (".model", ".json")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REQUIRED = ("model", "model_args", "iter_num", "config")
REQUIRED_TO_RESUME = (*REQUIRED, "optimizer", "scaler", "rng", "state", "tokenizer", "tokenizer_sha256", "data_sha256")
EXPECTED_TYPES = {
    "model": dict, "model_args": dict, "iter_num": int, "config": dict, "scaler": dict, "rng": dict, "state": dict,
    "tokenizer": bytes, "tokenizer_sha256": str, "data_sha256": str, "architecture": str, "chat": str, "format": int}
LLAMA2C_CONSTANTS = (".mask", "freqs_cos", "freqs_sin", "freqs_cis")      # llama2.c stores them among the weights
MAX_ROPE_ELEMENTS = 1 << 27                     # max_seq_len * head_dim: 1 million tokens with head_dim 128
BAD_VALUE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


# ---- files --------------------------------------------------------------------------------------

def save_checkpoint(path: str | Path, ckpt: Checkpoint) -> None:
    """Write a checkpoint atomically: the old file stays until the new one is complete on disk."""
    with atomic_write(path) as file:
        try:
            torch.save(to_cpu(ckpt, {}), file)
        except RuntimeError as error:           # torch.save raises it from a full disk's OSError
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def to_cpu(value: Any, copies: dict[tuple, Tensor]) -> Any:
    """Return a state with all tensors on the CPU. copies: the tensors copied so far, so that tied weights stay one."""
    if isinstance(value, dict):
        return {name: to_cpu(part, copies) for name, part in value.items()}
    if isinstance(value, list):
        return [to_cpu(part, copies) for part in value]
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return value
    key = (value.untyped_storage(), value.storage_offset(), value.shape, value.stride(), value.dtype)
    if key not in copies:
        copies[key] = value.cpu()
    return copies[key]


def load_checkpoint(path: str | Path, required: tuple[str, ...] = REQUIRED, mmap: bool = False) -> Checkpoint:
    """Load a checkpoint to the CPU. Code in the file is never executed. mmap: see read_tensors.

    Raises UserError if the file is missing, damaged, in a newer format, or lacks a required key.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_checkpoint_error(path)
    ckpt = read_tensors(path, mmap)
    if problem := find_problem(ckpt, required):
        raise UserError(f"{path} is not a checkpoint for this version of tiny-llm: {problem}")
    return upgrade(ckpt)


def find_problem(ckpt: Any, required: tuple[str, ...]) -> str:
    """Return the reason that `ckpt` is not a checkpoint with the required keys, or "" if it is one."""
    if not isinstance(ckpt, dict):
        return f"it contains a {type(ckpt).__name__}, not a dict"
    if missing := [key for key in required if key not in ckpt]:
        return f"it has no {', '.join(missing)}"
    for key, expected in EXPECTED_TYPES.items():
        if key in ckpt and not isinstance(ckpt[key], expected):
            return f"{key} must be of type {expected.__name__}, not {type(ckpt[key]).__name__}"
    if ckpt.get("format", FORMAT) > FORMAT:
        return f"its format is {ckpt['format']}; this version reads up to {FORMAT}"
    for name, weight in ckpt["model"].items():
        if not _is_dense_float_tensor(weight) and not str(name).endswith(LLAMA2C_CONSTANTS):
            return f"{name} is not a dense float tensor"
    return ""


def _is_dense_float_tensor(weight: Any) -> bool:
    """True if `weight` is a float tensor that stores all its elements, unlike a number expanded to a large shape."""
    return (isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.layout == torch.strided
            and weight.dtype in FLOAT_DTYPES and weight.nbytes <= weight.untyped_storage().nbytes())


def upgrade(ckpt: Checkpoint) -> Checkpoint:
    """Convert a checkpoint from llama2.c or an older version to the keys and names of this version."""
    weights = {str(name).removeprefix("_orig_mod."): weight for name, weight in ckpt["model"].items()}
    if "architecture" in ckpt:
        return {**ckpt, "model": weights}
    weights = {name: weight for name, weight in weights.items() if not name.endswith(LLAMA2C_CONSTANTS)}
    args = {name: value for name, value in ckpt["model_args"].items() if value is not None}
    args = {**asdict(ModelArgs()), "n_kv_heads": args.get("n_heads"), **args}
    return {**ckpt, "model": weights, "model_args": args}


def read_tensors(path: Path, mmap: bool = False) -> Any:
    """Load a torch.save file. Raises UserError if it is damaged or contains anything but tensors and plain values.

    mmap: read tensors on first use. Ignored on Windows, where a mapped file cannot be replaced.
    """
    try:
        _verify_zip_crc(path)
        return compat.load_tensors(path, mmap and os.name == "posix")
    except PermissionError:
        raise
    except Exception as error:                  # a damaged file can fail in any way
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) is damaged, or not a checkpoint of plain tensors "
                        f"({type(error).__name__})") from error


def _verify_zip_crc(path: Path) -> None:
    """Raise ValueError if a checksum of the file is wrong. torch.load does not check them."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return                              # an older format without checksums
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("parts are compressed")        # unpacking them could fill the memory
        if archive.testzip():
            raise ValueError("a checksum is wrong")


def missing_checkpoint_error(path: Path) -> UserError:
    """Return the error for a missing checkpoint, with the closest existing paths or the command that creates one."""
    folder = path.parent if path.parent.is_dir() else Path("output")
    others = [str(file) for file in (*folder.glob("*"), *folder.glob("*/ckpt.pt")) if file.suffix in SUFFIXES]
    closest = get_close_matches(str(path), sorted(others), n=5, cutoff=0)
    command = format_command("train", out_dir="" if path.parent == Path("output") else path.parent)
    advice = f"choose from {', '.join(closest)}" if closest else f"{command} creates one"
    return UserError(f"no checkpoint at {path.resolve()}\n       {advice}")


def weights_checksum(ckpt: Checkpoint) -> int:
    """Return the CRC-32 of the model's weights."""
    checksum = 0
    for weight in ckpt["model"].values():
        checksum = zlib.crc32(weight.contiguous().flatten().view(torch.uint8).numpy(), checksum)
    return checksum


# ---- models and tokenizers of any format --------------------------------------------------------

def read_model(source: str | Path, tokenizer_source: str | Path = "") -> Checkpoint:
    """Read a model of any format: this project's checkpoints here, all others through extras/formats.

    tokenizer_source: tokenizer file, if the source contains none. Raises UserError if the model is missing or damaged,
    or if the tokenizer does not match it.
    """
    path = Path(source)
    ckpt = load_checkpoint(path, mmap=True) if is_checkpoint(path) else optional.load("formats").read_model(path)
    vocab_size = load_model_args(ckpt, source).vocab_size
    if not tokenizer_source:
        return ckpt
    tokenizer = read_tokenizer(tokenizer_source)
    if ckpt.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{tokenizer_source} is not the tokenizer that {source} was trained with\n"
                        "       omit --tokenizer: the model contains its own")
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is {vocab_size}")
    return {**ckpt, "tokenizer": tokenizer.model, "tokenizer_sha256": tokenizer.sha256}


def read_tokenizer(source: str | Path) -> BaseTokenizer:
    """Read a tokenizer file, or the tokenizer inside a model of any format. Raises UserError if it cannot be read."""
    if is_model(source):
        return build_tokenizer(read_model(source))
    path = Path(source)
    return load_tokenizer(path) if path.suffix in TOKENIZER_SUFFIXES else optional.load("formats").read_tokenizer(path)


def is_model(source: str | Path) -> bool:
    """True if `source` is a model, False if it is a tokenizer file. Raises UserError for a folder without a model."""
    path = Path(source)
    return is_checkpoint(path) or path.suffix not in TOKENIZER_SUFFIXES and optional.load("formats").is_model(path)


def is_checkpoint(path: Path) -> bool:
    """True if `path` is a file with the suffix .pt or the first bytes of a torch.save file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".pt" or file.read(4) == b"PK\3\4"


# ---- building -----------------------------------------------------------------------------------

def new_model(args: Any) -> nn.Module:
    """Build a model with random weights: a Llama for ModelArgs, otherwise a GPT-2."""
    if isinstance(args, ModelArgs):
        return kernels.build_transformer(args)
    return optional.load("gpt2").GPT2(args)


def build_model(ckpt: Checkpoint, copy_weights: bool = True, source: str | Path = "the checkpoint") -> nn.Module:
    """Build a checkpoint's model. Raises UserError if its weights are damaged. source: its name in errors.

    copy_weights: copy the weights to float32, for training; otherwise the model shares the checkpoint's tensors.
    """
    args = load_model_args(ckpt, source)
    weights = ckpt["model"]
    try:
        with torch.device("meta"), _SkipInit():         # allocates nothing until the shapes are checked
            model = new_model(args)
        if copy_weights:
            weights = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        model.load_state_dict(weights, assign=True)
    except BAD_VALUE_ERRORS as error:
        raise UserError(f"{source}: the weights do not match model_args: {error}") from error
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{source} is damaged: {name} contains NaN or inf")
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


class _SkipInit(TorchFunctionMode):
    """Skip weight initialization: on the meta device it takes a second and does nothing."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_init = getattr(function, "__module__", "") == "torch.nn.init"
        return None if is_init else function(*args, **(kwargs or {}))


def load_model_args(ckpt: Checkpoint, source: str | Path = "the checkpoint") -> Any:
    """Build the config of a checkpoint's model. Raises UserError if it is invalid. source: its name in errors."""
    architecture = ckpt.get("architecture", "llama")
    if architecture not in ("llama", "gpt2"):
        raise UserError(f"{source} has an unknown architecture {architecture!r}; expected llama or gpt2")
    args_class = ModelArgs if architecture == "llama" else optional.load("gpt2").GPT2Args
    try:
        args = args_class(**ckpt["model_args"])
        _check_stored_args(args)
    except BAD_VALUE_ERRORS as error:
        raise UserError(f"{source}: invalid model_args: {error}") from error
    embeddings = ckpt["model"].get("tok_embeddings.weight")
    if embeddings is None or embeddings.shape != (args.vocab_size, args.dim) or args.n_layers > len(ckpt["model"]):
        raise UserError(f"{source}: the weights do not match model_args: {args.n_layers} layers, embeddings of "
                        f"{args.vocab_size} x {args.dim}")
    return args


def _check_stored_args(args: Any) -> None:
    """Raise ValueError, or another of BAD_VALUE_ERRORS, for values that only a damaged file contains."""
    if not 0 < args.norm_eps < 1e38 or args.max_seq_len * args.head_dim > MAX_ROPE_ELEMENTS:
        raise ValueError(f"norm_eps {args.norm_eps}, max_seq_len {args.max_seq_len}")
    if isinstance(args, ModelArgs):
        inv_freq = rope_frequencies(args).float()
        if args.ffn_dim < 1 or not 0 < inv_freq.min() <= inv_freq.max() < torch.inf:
            raise ValueError(f"hidden_dim {args.hidden_dim}, rope {args.rope_theta}, {args.rope_scaling!r:.80}")


def model_state(model: nn.Module) -> Checkpoint:
    """Return a checkpoint that contains only the model. Pass the model itself, not torch.compile's wrapper."""
    architecture = "llama" if isinstance(model.args, ModelArgs) else "gpt2"
    return {"model": model.state_dict(), "model_args": asdict(model.args), "architecture": architecture,
            "format": FORMAT}


def build_tokenizer(ckpt: Checkpoint) -> BaseTokenizer:
    """Load the tokenizer inside a checkpoint. Raises UserError if it contains none."""
    if not ckpt.get("tokenizer"):
        example = [*tokenizer_files(DATA), DATA / "tok4096.model"][0]
        raise UserError(f"the checkpoint contains no tokenizer\n       name a file: --tokenizer {example}")
    return load_tokenizer(ckpt["tokenizer"])
