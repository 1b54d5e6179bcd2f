"""Folders of Hugging Face: config.json, safetensors, tokenizer. Architecture LlamaForCausalLM.

Needs the package safetensors. Their rotary embedding turns the pairs (0, D/2), (1, D/2 + 1), ..., ours the pairs
(0, 1), (2, 3), ...: the rows of wq and wk have another order, which `to_pairs` and `to_halves` change.
"""
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from extras.chat import TEMPLATES, detect_format
from extras.formats.common import (
    chat_of_template,
    check_names,
    check_supported,
    layer_names,
    make_state,
    read_json,
    tokenizer_json,
    tokenizer_json_with_meta,
)
from model import ModelArgs
from tinyllm.checkpoint import build_tokenizer
from tinyllm.cli import UserError
from tinyllm.device import DTYPES
from tinyllm.optional import require_package
from tinyllm.project import load_tokenizer
from tokenizer import BaseTokenizer, Tokenizer

MODEL_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}
LAYER_NAMES = {f"layers.{{}}.{ours}.weight": f"model.layers.{{}}.{theirs}.weight" for ours, theirs in {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}.items()}
OUTPUT_FILES = ("config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json",
           "tokenizer.model", "tokenizer_config.json")


# ---- in -----------------------------------------------------------------------------------------

def read(folder: Path) -> dict[str, Any]:
    """Read a folder. Raises UserError for what model.py cannot represent, by name."""
    config, architecture = read_json(folder / "config.json"), architecture_of(folder)
    if architecture != "LlamaForCausalLM":
        raise UserError(f"{folder} holds a {architecture}; LlamaForCausalLM and GPT2LMHeadModel are what can be read")
    args = read_config(config, folder)
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if "rotary_emb" not in name}
    names = layer_names(args["n_layers"], LAYER_NAMES, MODEL_NAMES)
    if args["tie_embeddings"] and "lm_head.weight" not in tensors:
        del names["output.weight"]
    check_names(tensors, names.values(), folder)
    model = {ours: hf_to_meta_rope(tensors[theirs], args) if has_rope_order(ours) else tensors[theirs]
             for ours, theirs in names.items()}
    return make_state(model, args, *read_vocabulary(folder, args["vocab_size"]))


def architecture_of(folder: Path) -> str:
    return (read_json(folder / "config.json").get("architectures") or ["nothing"])[0]


def read_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """model_args of a config.json."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0),
                                             **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    possible = {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",),
                "head_dim": (None, dim // heads), "quantization_config": (None,),
                "rope_type": ("default", "linear", "llama3")}
    check_supported({**config, "rope_type": kind}, possible, folder, "model.py")
    scaling = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                 "original_max_position_embeddings")}.get(kind, ())
    return {"dim": dim, "n_layers": config["num_hidden_layers"], "n_heads": heads,
            "n_kv_heads": config.get("num_key_value_heads") or heads, "vocab_size": config["vocab_size"],
            "hidden_dim": config["intermediate_size"], "norm_eps": config.get("rms_norm_eps", 1e-6),
            "max_seq_len": config.get("max_position_embeddings", 2048), "rope_theta": float(rope["rope_theta"]),
            "rope_scaling": {name: rope[name] for name in scaling} or None,
            "tie_embeddings": config.get("tie_word_embeddings", False)}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped from their files."""
    safetensors = require_package("safetensors", f"{folder}")
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; weights are read from safetensors files")
        try:
            with safetensors.safe_open(folder / name, "pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}
            odd = {str(tensor.dtype) for tensor in found.values() if tensor.dtype not in DTYPES.values()}
            if odd:
                raise UserError(f"{folder / name} has tensors of {', '.join(odd)}; {', '.join(DTYPES)} can be read")
        except safetensors.SafetensorError as error:
            raise UserError(f"{folder / name} is damaged: {error}") from error
    return found


def read_vocabulary(folder: Path, vocab_size: int, special: str = "") -> tuple[BaseTokenizer | None, str]:
    """The vocabulary and the chat format of a folder: tokenizer.model if it has all entries, else tokenizer.json.

    special: the token that is bos and eos where the folder does not say which are.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    template = folder / "chat_template.jinja"
    chat = chat_of_template(template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template"))
    if (folder / "tokenizer.model").is_file():
        vocabulary = load_tokenizer(folder / "tokenizer.model")
        if vocabulary.n_words == vocab_size:
            return vocabulary, chat
    if not (folder / "tokenizer.json").is_file():
        return None, chat
    content = read_json(folder / "tokenizer.json")
    bos, eos = (name["content"] if isinstance(name, dict) else name or ""
                for name in (config.get("bos_token", special), config.get("eos_token", special)))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bool(bos) and json.dumps(bos) in json.dumps(content.get("post_processor"))
    return load_tokenizer(tokenizer_json_with_meta(content, bos, eos, add_bos)), chat


# ---- out ----------------------------------------------------------------------------------------

def write(state: dict[str, Any], folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, with no code but theirs."""
    safetensors = require_package("safetensors", "a folder of Hugging Face")
    from safetensors.torch import save_file
    args, vocabulary = state["model_args"], build_tokenizer(state)
    chat = state.get("chat", "")
    folder.mkdir(parents=True)
    names = layer_names(args["n_layers"], LAYER_NAMES, MODEL_NAMES)
    if args["tie_embeddings"]:
        del names["output.weight"]
    tensors = {theirs: (meta_to_hf_rope(state["model"][ours], args) if has_rope_order(ours) else state["model"][ours]).contiguous()
               for ours, theirs in names.items()}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    ids = {name: i for name, i in (("bos_token_id", vocabulary.bos_id), ("eos_token_id", vocabulary.eos_id)) if i >= 0}
    form = detect_format(chat, vocabulary)
    ends = {"eos_token_id": [vocabulary.eos_id, form.end_id]} if form else {}
    dtype = str(state["model"]["norm.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**make_config(args), **ids, "dtype": dtype, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", {**ids, **ends, "do_sample": True, "temperature": 0.8, "top_k": 300})
    write_vocabulary(vocabulary, chat, args["max_seq_len"], folder)
    (folder / "README.md").write_text(model_card(state), encoding="utf-8")


def make_config(args: dict[str, Any]) -> dict[str, Any]:
    shape, scaling = ModelArgs(**args), args.get("rope_scaling")
    if scaling and "factors" in scaling:
        raise UserError("the rotary embedding is slowed down by a table of factors (from a GGUF file), which a "
                        "config.json cannot hold")
    kind = None if not scaling else {"rope_type": "llama3" if "low_freq_factor" in scaling else "linear", **scaling}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.dim,
            "num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.n_kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocab_size,
            "intermediate_size": shape.ffn_dim, "rms_norm_eps": shape.norm_eps,
            "max_position_embeddings": shape.max_seq_len, "rope_theta": shape.rope_theta, "rope_scaling": kind,
            "tie_word_embeddings": shape.tie_embeddings, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "initializer_range": 0.02}


def write_vocabulary(vocabulary: BaseTokenizer, chat: str, max_seq_len: int, folder: Path) -> None:
    content = tokenizer_json(vocabulary)
    write_json(folder / "tokenizer.json", content)
    if isinstance(vocabulary, Tokenizer):
        (folder / "tokenizer.model").write_bytes(vocabulary.model)
    names = {token["id"]: token["content"] for token in content["added_tokens"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len,
              "clean_up_tokenization_spaces": False, "add_bos_token": vocabulary.add_bos}
    config |= {name: names[i] for name, i in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id))
               if i in names}
    if chat in TEMPLATES:
        config["chat_template"] = TEMPLATES[chat]
    write_json(folder / "tokenizer_config.json", config)


def model_card(state: dict[str, Any]) -> str:
    args = state["model_args"]
    parameters = sum(tensor.numel() for name, tensor in state["model"].items()
                     if not (args["tie_embeddings"] and name == "output.weight"))
    trained = f", trained for {state['iter_num']:,} steps" if state["iter_num"] else ""
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\nA Llama with {parameters:,} "
            f"parameters{trained}: dim {args['dim']}, {args['n_layers']} layers, {args['n_heads']} heads, vocabulary "
            f"{args['vocab_size']}, window {args['max_seq_len']}. Written by tiny-llm.\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")\n'
            'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids\n'
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=200)[0]))\n```\n")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


# ---- the order of rows --------------------------------------------------------------------------

def has_rope_order(name: str) -> bool:
    return name.endswith((".wq.weight", ".wk.weight"))


def hf_to_meta_rope(weight: Tensor, args: dict[str, Any]) -> Tensor:
    """Rows of each head in Meta's order, from Hugging Face's."""
    return weight.unflatten(0, (-1, 2, args["dim"] // args["n_heads"] // 2)).transpose(1, 2).flatten(0, 2)


def meta_to_hf_rope(weight: Tensor, args: dict[str, Any]) -> Tensor:
    """Rows of each head in Hugging Face's order, from Meta's."""
    return weight.unflatten(0, (-1, args["dim"] // args["n_heads"] // 2, 2)).transpose(1, 2).flatten(0, 2)
