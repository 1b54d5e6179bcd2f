"""The whole state of a training in one file: plain tensors and plain values, never half-written.

    state = load("output/ckpt.pt")
    model = build_model(state)
    vocabulary = build_tokenizer(state)

Keys that tools made for llama2.c know: model, optimizer, model_args, iter_num, best_val_loss, config.
Beside them: tokenizer, the bytes of the vocabulary; architecture, llama when left out; chat, the form of messages that
the model was taught, if any; and in last.pt what an exact continuation needs.
"""
import os
import zipfile
import zlib
from dataclasses import asdict
from difflib import get_close_matches
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model import ModelArgs, Transformer
from tinyllm import optional
from tinyllm.cli import UserError, format_command
from tinyllm.files import atomic_write
from tinyllm.project import DATA, load_tokenizer, tokenizer_files
from tokenizer import BaseTokenizer

FORMAT = 1
TOKENIZER_SUFFIXES = (".model", ".json")
SUFFIXES = (".pt", ".gguf", ".bin")      # of files that may be models
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EXPECTED_TYPES = {"model": dict, "model_args": dict, "iter_num": int, "config": dict, "scaler": dict, "rng": dict,
         "state": dict, "tokenizer": bytes, "tokenizer_sha256": str, "data_sha256": str, "architecture": str,
         "chat": str, "format": int}                # what there must be under a key, if it is there
REQUIRED = ("model", "model_args", "iter_num", "config")
REQUIRED_TO_RESUME = (*REQUIRED, "optimizer", "scaler", "rng", "state", "tokenizer", "tokenizer_sha256", "data_sha256")


class Architecture(NamedTuple):
    """Config and model class of an architecture."""
    args: type
    model: type


ARCHITECTURES = ("llama", "gpt2")


def find_architecture(name: str) -> Architecture:
    """Return the classes of an architecture. Raises KeyError for an unknown name."""
    if name == "llama":
        return Architecture(ModelArgs, Transformer)
    if name not in ARCHITECTURES:
        raise KeyError(name)
    gpt2 = optional.load("gpt2")
    return Architecture(gpt2.GPT2Args, gpt2.GPT2)


def architecture_of(args: Any) -> str:
    """Return the name of the architecture that a config belongs to."""
    return "llama" if isinstance(args, ModelArgs) else "gpt2"


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state. Until it is all on disk, the old file stays."""
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:       # this is what it makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_checkpoint(path: str | Path, required: tuple[str, ...] = REQUIRED, mmap: bool = False) -> dict[str, Any]:
    """Read a state to the CPU. Nothing in the file can run code. TO_GO_ON is what resuming a run requires.

    mmap: leave the tensors in the file until they are used; not on Windows, where it could not be replaced then.
    Raises:
        UserError: when the file is missing, damaged, of a newer format, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_checkpoint_error(path)
    state = read_tensors(path, mmap)
    if not isinstance(state, dict) or (missing := [key for key in required if key not in state]):
        lacks = f"it has no {', '.join(missing)}" if isinstance(state, dict) else f"it holds a {type(state).__name__}"
        raise UserError(f"{path} is not a checkpoint of this project: {lacks}")
    if wrong := [key for key, kind in EXPECTED_TYPES.items() if key in state and not isinstance(state[key], kind)]:
        raise UserError(f"{path} is not a checkpoint of this project: {wrong[0]} is no {EXPECTED_TYPES[wrong[0]].__name__}")
    if state.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path} is of format {state['format']}, this code reads {FORMAT}\n       use a newer tiny-llm")
    state["model"] = {str(name).removeprefix("_orig_mod."): weight for name, weight in state["model"].items()}
    state = state if "architecture" in state else _from_llama2c(state)
    if strange := [name for name, weight in state["model"].items() if not _is_dense_float_tensor(weight)]:
        raise UserError(f"{path} is not a checkpoint of this project: {strange[0]} is no array of numbers")
    return state


def read_model(source: str | Path, tokenizer: str | Path = "") -> dict[str, Any]:
    """Read a model of any format: a checkpoint of this project here, all others through extras/formats.

    tokenizer: file of the tokenizer, if the source has none.
    Raises UserError as `load_checkpoint` and `formats.read_model` do.
    """
    path = Path(source)
    if not is_checkpoint(path):
        return optional.load("formats").read_model(source, tokenizer)
    state = load_checkpoint(path, mmap=True)
    build_args(state, path)
    return with_tokenizer(state, source, tokenizer) if tokenizer else state


def with_tokenizer(state: dict[str, Any], source: str | Path, tokenizer_source: str | Path) -> dict[str, Any]:
    """Return a state with another file's tokenizer. Raises UserError if the two do not belong together."""
    tokenizer = read_tokenizer(tokenizer_source)
    if state.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{tokenizer_source} is not the tokenizer that {source} was trained with\n"
                        "       leave --tokenizer out: the right one is inside")
    vocab_size = state["model_args"]["vocab_size"]
    if tokenizer.n_words != vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.n_words} entries, the model {vocab_size}; "
                        "they do not belong together")
    return {**state, "tokenizer": tokenizer.model, "tokenizer_sha256": tokenizer.sha256}


def read_tokenizer(source: str | Path) -> BaseTokenizer:
    """Read a tokenizer file, or the tokenizer inside a model of any format. Raises UserError."""
    path = Path(source)
    if is_checkpoint(path):
        return build_tokenizer(load_checkpoint(path, mmap=True))
    if path.suffix in TOKENIZER_SUFFIXES:
        return load_tokenizer(path)
    return optional.load("formats").read_vocabulary(path)


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


def missing_checkpoint_error(path: Path) -> UserError:
    """What to say of a checkpoint that is missing: those that there are, closest first, or what makes one."""
    folder = path.parent if path.parent.is_dir() else Path("output")
    found = [*folder.glob("*"), *folder.glob(f"*/{escape(path.name)}"), *folder.glob("*/ckpt.pt")]
    others = [str(other) for other in found
              if other.suffix in SUFFIXES and not other.name.endswith(".tokenizer.bin")]
    closest = get_close_matches(str(path), sorted(set(others)), n=5, cutoff=0)
    make = format_command("train", out_dir="" if path.parent == Path("output") else path.parent)
    return UserError(f"no checkpoint at {path.resolve()}\n       " + (
        f"there is {', '.join(closest)}" if closest else f"{make} makes one"))


def read_tensors(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote to a file, if it is tensors and plain values only, and if nothing of it has changed.

    Raises UserError when it is damaged, or would run code.
    """
    try:
        _verify_zip_crc(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and os.name == "posix")
    except PermissionError:
        raise
    except Exception as error:      # a damaged file can fail in any way, and they all mean the same
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) is damaged, or not a checkpoint of plain tensors "
                        f"({type(error).__name__})") from error


def _verify_zip_crc(path: Path) -> None:
    """Raise ValueError when a part of the file is not as it was written. torch.load would not look."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return                          # an older form without checksums
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("torch.save packs nothing")        # and so does not grow in memory
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is of other content")


def _is_dense_float_tensor(weight: Any) -> bool:
    """Whether it is a tensor of numbers that are all there. One number that poses as a large array is not."""
    return (isinstance(weight, torch.Tensor) and weight.device.type == "cpu" and weight.layout == torch.strided
            and weight.dtype in FLOATS and weight.nbytes <= weight.untyped_storage().nbytes())


def state_checksum(state: Any) -> int:
    """A number for all tensors of a state, to tell whether two are the same."""
    if isinstance(state, torch.Tensor):
        return zlib.crc32(state.detach().contiguous().flatten().view(torch.uint8).numpy())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return zlib.crc32(repr([state_checksum(value) for value in values]).encode())


def _from_llama2c(state: dict[str, Any]) -> dict[str, Any]:
    """A state without the constants that llama2.c counted as weights, and with all of model_args; None is a default."""
    weights = {name: weight for name, weight in state["model"].items()
               if not name.endswith((".mask", "freqs_cos", "freqs_sin", "freqs_cis"))}
    given = {name: value for name, value in state["model_args"].items() if value is not None}
    args = {**asdict(ModelArgs()), "n_kv_heads": given.get("n_heads"), **given}
    return {**state, "model": weights, "model_args": args}


def model_state(model: nn.Module) -> dict[str, Any]:
    """The part of a state that holds the model; give it the bare one, not what torch.compile made."""
    return {"model": model.state_dict(), "model_args": asdict(model.args), "architecture": architecture_of(model.args),
            "format": FORMAT}


def build_args(state: dict[str, Any], name: str | Path = "the checkpoint") -> Any:
    """The shape of a state's model. Raises UserError, about the file `name`, when no model has it."""
    try:
        args = find_architecture(state.get("architecture", "llama")).args(**state["model_args"])
    except KeyError as error:
        raise UserError(f"{name} has the architecture {error}; known are {', '.join(ARCHITECTURES)}") from error
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{name}: its model_args do not fit together: {error}") from error
    table = state["model"].get("tok_embeddings.weight")
    if table is None or table.shape != (args.vocab_size, args.dim) or args.n_layers > len(state["model"]):
        raise UserError(f"{name}: its weights do not fit its model_args: {args.n_layers} layers, embeddings of "
                        f"{args.vocab_size} x {args.dim}")
    return args


def build_model(state: dict[str, Any], copy_weights: bool = True, name: str | Path = "the checkpoint") -> nn.Module:
    """Make the model of a state.

    copy_weights: with weights of its own, in float32, for training; else with those of the state, in their format, so that
        they are not twice in memory.
    Raises UserError, about the file `name`, when weights and shape do not belong together, or a weight is no number.
    """
    args = build_args(state, name)
    try:
        with torch.device("meta"), _SkipInit():         # takes no memory before the shapes are known to be right
            model = find_architecture(architecture_of(args)).model(args)
        weights = state["model"]
        if copy_weights:
            weights = {part: weight.to(torch.float32, copy=True) for part, weight in weights.items()}
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"{name}: its weights do not fit its model_args: {error}") from error
    if broken := [part for part, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(f"{name} is damaged: {broken[0]} has values that are no numbers (NaN, inf)")
    if model.args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


class _SkipInit(TorchFunctionMode):
    """New modules are not filled with random numbers. On the device meta that would do nothing, in a second."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
                           ) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def build_tokenizer(state: dict[str, Any]) -> BaseTokenizer:
    """The vocabulary inside a state. Raises UserError when there is none, as in files of other projects."""
    model = state.get("tokenizer")
    if not model or not isinstance(model, bytes):
        there = [*tokenizer_files(DATA), DATA / "tok4096.model"]
        raise UserError(f"the checkpoint carries no vocabulary; name its own, such as --tokenizer {there[0]}")
    return load_tokenizer(model)
