"""The whole state of a training in one file: plain tensors and plain values, never half-written.

    state = load("output/ckpt.pt")
    model = build_model(state)
    vocabulary = build_tokenizer(state)
    engine = build_engine(model)

Keys that tools made for llama2.c know: model, optimizer, model_args, iter_num, best_val_loss, config.
Beside them: tokenizer, the bytes of the vocabulary; architecture, llama when left out; chat, the form of messages that
the model was taught, if any; and in last.pt what an exact continuation needs.
"""
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

import tokenizer
from engine import Engine
from files import whole_file
from gpt2 import GPT2, GPT2Args, GPT2Engine
from model import ModelArgs, Transformer
from settings import UserError
from tokenizer import Vocabulary

REQUIRED = ("model", "model_args", "iter_num", "config")
TO_GO_ON = (*REQUIRED, "optimizer", "scaler", "rng", "state", "tokenizer_sha256", "data_sha256")


class Architecture(NamedTuple):
    """The classes of a model: its shape, itself, and what writes with it."""
    args: type[ModelArgs] | type[GPT2Args]
    model: type[Transformer] | type[GPT2]
    engine: type[Engine]


ARCHITECTURES = {"llama": Architecture(ModelArgs, Transformer, Engine),
                 "gpt2": Architecture(GPT2Args, GPT2, GPT2Engine)}


def architecture_of(args: ModelArgs | GPT2Args) -> str:
    """The name in ARCHITECTURES that belongs to a shape."""
    return next(name for name, known in ARCHITECTURES.items() if type(args) is known.args)


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state. Until it is all on disk, the old file stays."""
    with whole_file(path) as file:
        torch.save(state, file)


def load(path: str | Path, required: tuple[str, ...] = REQUIRED, mapped: bool = False) -> dict[str, Any]:
    """Read a state to the CPU. Nothing in the file can run code. TO_GO_ON is what resuming a run requires.

    mapped: leave the tensors in the file until they are used; not on Windows, where it could not be replaced then.
    Raises:
        UserError: when the file is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path.resolve()}\n       python train.py makes one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and os.name == "posix")
    except PermissionError:
        raise
    except Exception as error:      # a damaged file can fail in any way, and they all mean the same
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) is damaged, or not a checkpoint of plain tensors "
                        f"({type(error).__name__})") from error
    missing = [key for key in required if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path} is not a checkpoint of this project: it has no {', '.join(missing)}")
    state["model"] = {name.removeprefix("_orig_mod."): weight for name, weight in state["model"].items()}
    return state if "architecture" in state else _from_llama2c(state)


def _from_llama2c(state: dict[str, Any]) -> dict[str, Any]:
    """A state without the constants that llama2.c counted as weights, and with all of model_args; None is a default."""
    weights = {name: weight for name, weight in state["model"].items()
               if not name.endswith((".mask", "freqs_cos", "freqs_sin", "freqs_cis"))}
    given = {name: value for name, value in state["model_args"].items() if value is not None}
    args = {**asdict(ModelArgs()), "n_kv_heads": given.get("n_heads"), **given}
    return {**state, "model": weights, "model_args": args}


def model_state(model: Transformer | GPT2) -> dict[str, Any]:
    """The part of a state that holds the model; give it the bare one, not what torch.compile made."""
    return {"model": model.state_dict(), "model_args": asdict(model.args), "architecture": architecture_of(model.args)}


def build_args(state: dict[str, Any]) -> ModelArgs | GPT2Args:
    """The shape of a state's model. Raises UserError when no model has it."""
    try:
        return ARCHITECTURES[state.get("architecture", "llama")].args(**state["model_args"])
    except KeyError as error:
        raise UserError(f"the checkpoint's architecture is {error}; known are {', '.join(ARCHITECTURES)}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's model_args do not fit together: {error}") from error


def build_model(state: dict[str, Any], own: bool = True) -> Transformer | GPT2:
    """Make the model of a state.

    own: with weights of its own, in float32, for training; else with those of the state, in their format, so that
        they are not twice in memory.
    Raises UserError when weights and shape do not belong together.
    """
    args = build_args(state)
    with torch.device("cpu" if own else "meta"), nullcontext() if own else _Unfilled():
        model = ARCHITECTURES[architecture_of(args)].model(args)
    try:
        model.load_state_dict(state["model"], assign=not own)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its model_args: {error}") from error
    if model.args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


class _Unfilled(TorchFunctionMode):
    """New modules are not filled with random numbers. On the device meta that would do nothing, in a second."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
                           ) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def build_tokenizer(state: dict[str, Any]) -> Vocabulary:
    """The vocabulary inside a state. Raises UserError when there is none, as in files of other projects."""
    model = state.get("tokenizer")
    if not model or not isinstance(model, bytes):
        raise UserError("the checkpoint carries no vocabulary; name one: --tokenizer data/tok4096.model")
    return tokenizer.load(model)


def build_engine(model: Transformer | GPT2, *options, **more) -> Engine:
    """What writes with a model. Takes the further arguments of Engine."""
    return ARCHITECTURES[architecture_of(model.args)].engine(model, *options, **more)
