"""Read Meta's folders: params.json, consolidated.NN.pth, tokenizer.model. Llama 2, 3, 3.1 and 3.2.

Tensors have the names of model.py. A large model comes in several files, each with a part of every matrix: rows for
fairscale's ColumnParallelLinear, columns for its RowParallelLinear.
"""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extras.formats.common import check_names, make_checkpoint, read_json
from model import ModelArgs, Transformer
from tinyllm import checkpoint
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.project import load_tokenizer


def read(folder: Path) -> Checkpoint:
    """Read a folder. Raises UserError if files are missing or damaged, or the shapes of the parts do not match."""
    params = read_json(folder / "params.json")
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder} has no consolidated.00.pth")
    parts = [checkpoint.read_tensors(file, mmap=True) for file in files]
    path = folder / "tokenizer.model"
    tokenizer = load_tokenizer(path) if path.is_file() else None
    args = read_params(params, parts, tokenizer.vocab_size if tokenizer else 0)
    shapes = tensor_shapes({**args, "n_layers": min(args["n_layers"], len(parts[0])), "max_seq_len": 1})
    for part in parts:
        part.pop("rope.freqs", None)                    # model.py computes this table
        check_names(part, shapes, folder)
    model = {name: merge(name, [part[name] for part in parts], shape) for name, shape in shapes.items()}
    return make_checkpoint(model, args, tokenizer)


def read_params(params: dict[str, Any], parts: list[dict[str, Tensor]], n_words: int) -> dict[str, Any]:
    """Return model_args from a params.json."""
    vocab_size = max(params.get("vocab_size", -1), n_words)
    if vocab_size < 1:
        raise UserError("params.json has no vocab_size; expected a tokenizer.model")
    rope_theta = float(params.get("rope_theta", 10000))
    args = {
        **{name: params[name] for name in ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")},
        "n_kv_heads": params.get("n_kv_heads") or params["n_heads"],
        "ffn_dim_multiplier": params.get("ffn_dim_multiplier") or 1.0,
        "rope_theta": rope_theta,
        "tie_embeddings": "output.weight" not in parts[0],
        "vocab_size": vocab_size,
    }
    window = 8192 if rope_theta == 500000 else 4096         # Llama 3, Llama 2
    if params.get("use_scaled_rope"):
        args["rope_scaling"] = llama31_rope_scaling(params)
        window = 131072
    return {**args, "max_seq_len": params.get("max_seq_len", window)}


def llama31_rope_scaling(params: dict[str, Any]) -> dict[str, Any]:
    """Return Llama 3.1's rope_scaling, which Meta defines in its code, not in its files."""
    default = 32 if params["dim"] <= 3072 else 8            # Llama 3.2 has dim 2048 and 3072
    return {"factor": params.get("rope_scaling_factor", default), "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 8192}


def tensor_shapes(args: dict[str, Any]) -> dict[str, torch.Size]:
    """Return the shape of each tensor by name, without the output layer if it is tied."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(ModelArgs(**args)).named_parameters()}


def merge(name: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Concatenate the parts of a tensor along the split dimension. Every part has the complete norms."""
    tensor = parts[0]
    for dim, size in enumerate(shape):
        if tensor.shape[dim:dim + 1] != (size,) and sum(part.shape[dim] for part in parts) == size:
            tensor = torch.cat(parts, dim)
    if tensor.shape != shape:
        raise UserError(f"{name} has {len(parts)} parts of {tuple(parts[0].shape)}; expected {tuple(shape)} in all")
    return tensor
