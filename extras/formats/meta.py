"""Folders as Meta publishes them: params.json, consolidated.NN.pth, tokenizer.model. Llama 2, 3, 3.1 and 3.2.

Tensor names are those of model.py. A large model comes in several files, each with a part of every matrix: of the rows
where the results are put side by side, of the columns where they are summed (fairscale's ColumnParallelLinear and
RowParallelLinear).
"""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extras.formats.common import check_names, make_state, read_json
from model import ModelArgs, Transformer
from tinyllm import checkpoint
from tinyllm.cli import UserError
from tinyllm.project import load_tokenizer


def read(folder: Path) -> dict[str, Any]:
    """Read a folder. Raises UserError for files that are missing or damaged, and parts that do not fit together."""
    params = read_json(folder / "params.json")
    parts = read_parts(folder)
    path = folder / "tokenizer.model"
    vocabulary = load_tokenizer(path) if path.is_file() else None
    args = read_params(params, parts, vocabulary.n_words if vocabulary else 0)
    shapes = shapes_of({**args, "n_layers": min(args["n_layers"], len(parts[0]))})      # the file cannot have more
    for part in parts:
        part.pop("rope.freqs", None)                    # a table that can be computed
        check_names(part, shapes, folder)
    model = {name: merge(name, [part[name] for part in parts], shape) for name, shape in shapes.items()}
    return make_state(model, args, vocabulary)


def read_parts(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of each file, mapped; nothing in it can run code."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder} has no consolidated.00.pth")
    return [checkpoint.read_tensors(file, mmap=True) for file in files]


def read_params(params: dict[str, Any], parts: list[dict[str, Tensor]], n_words: int) -> dict[str, Any]:
    """model_args of a params.json."""
    known = {"dim", "n_layers", "n_heads", "multiple_of", "norm_eps"}
    if missing := known - params.keys():
        raise UserError(f"params.json lacks {', '.join(sorted(missing))}")
    args = {name: params[name] for name in known}
    args |= {"n_kv_heads": params.get("n_kv_heads") or params["n_heads"],
             "ffn_dim_multiplier": params.get("ffn_dim_multiplier") or 1.0,
             "rope_theta": float(params.get("rope_theta", 10000)), "tie_embeddings": "output.weight" not in parts[0],
             "vocab_size": max(params.get("vocab_size", -1), n_words)}
    if args["vocab_size"] < 1:
        raise UserError("params.json does not tell the size of the vocabulary, and there is no tokenizer.model")
    window = 8192 if args["rope_theta"] == 500000 else 4096             # Llama 3, Llama 2
    if params.get("use_scaled_rope"):
        # the factors of Llama 3.1 are in Meta's code, not in its files; Llama 3.2 (dim 2048 and 3072) has a larger one
        factor = params.get("rope_scaling_factor", 32 if params["dim"] <= 3072 else 8)
        args["rope_scaling"] = {"factor": factor, "low_freq_factor": 1, "high_freq_factor": 4,
                                "original_max_position_embeddings": 8192}
        window = 131072
    return {**args, "max_seq_len": params.get("max_seq_len", window)}


def shapes_of(args: dict[str, Any]) -> dict[str, torch.Size]:
    """Of each tensor, by name; what is tied is there once."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(ModelArgs(**args)).named_parameters()}


def merge(name: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
    """A whole tensor of its parts: by the dimension in which they are smaller, which for norms is none."""
    whole = parts[0]
    for dim, size in enumerate(shape):
        if whole.shape[dim:dim + 1] != (size,) and sum(part.shape[dim] for part in parts) == size:
            whole = torch.cat(parts, dim)
    if whole.shape != shape:
        raise UserError(f"{name} has {len(parts)} parts of {tuple(parts[0].shape)}, which do not make {tuple(shape)}")
    return whole
