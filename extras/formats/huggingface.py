"""Read and write Hugging Face folders: config.json, safetensors, tokenizer. Architecture LlamaForCausalLM.

Requires the package safetensors. Hugging Face rotates the dimension pairs (0, D/2), (1, D/2 + 1), ...; model.py rotates
(0, 1), (2, 3), .... So `hf_to_meta_rope` and `meta_to_hf_rope` reorder the rows of wq and wk.
"""
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from extras.chat import TEMPLATES, choose_format
from extras.formats import common
from model import ModelArgs
from tinyllm.checkpoint import Checkpoint, build_tokenizer
from tinyllm.cli import UserError
from tinyllm.device import DTYPES
from tinyllm.optional import require_package
from tinyllm.project import load_tokenizer
from tokenizer import BaseTokenizer, Tokenizer

MODEL_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
               "output.weight": "lm_head.weight"}
LAYER_PARTS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OUTPUT_FILES = ("config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json",
                "tokenizer.model", "tokenizer_config.json")
SCALING_KEYS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                  "original_max_position_embeddings")}


# ---- read ---------------------------------------------------------------------------------------

def read(folder: Path) -> Checkpoint:
    """Read a folder. Raises UserError, with the reasons, if model.py does not support the model."""
    architecture = architecture_of(folder)
    if architecture != "LlamaForCausalLM":
        raise UserError(f"{folder} has the architecture {architecture}; expected LlamaForCausalLM or GPT2LMHeadModel")
    args = read_config(common.read_json(folder / "config.json"), folder)
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if "rotary_emb" not in name}
    is_tied = args["tie_embeddings"] and "lm_head.weight" not in tensors
    names = tensor_names(args, is_tied)
    common.check_names(tensors, names.values(), folder)
    model = {}
    for ours, theirs in names.items():
        model[ours] = hf_to_meta_rope(tensors[theirs], args) if has_rope_order(ours) else tensors[theirs]
    return common.make_checkpoint(model, args, *read_tokenizer(folder, args["vocab_size"]))


def check_weight_names(ckpt: Checkpoint, source: str | Path) -> None:
    """Raise UserError if an edited model.py does not have exactly the weights of a Llama."""
    is_tied = ckpt["model_args"]["tie_embeddings"]
    ignored = {"output.weight"} if is_tied else set()
    common.check_names(set(ckpt["model"]) - ignored, tensor_names(ckpt["model_args"], is_tied), Path(source))


def tensor_names(args: dict[str, Any], is_tied: bool) -> dict[str, str]:
    return common.tensor_names(args["n_layers"], MODEL_NAMES, LAYER_PARTS, "model.layers", is_tied=is_tied)


def architecture_of(folder: Path) -> str:
    return (common.read_json(folder / "config.json").get("architectures") or ["nothing"])[0]


def read_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return model_args from a config.json."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    rope_theta = config.get("rope_theta", 10000.0)
    rope = config.get("rope_parameters") or {"rope_theta": rope_theta, **(config.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    common.check_supported({**config, "rope_type": rope_type}, {
        "attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",), "head_dim": (None, dim // heads),
        "quantization_config": (None,), "rope_type": ("default", *SCALING_KEYS),
    }, folder, "model.py")
    rope_scaling = {name: rope[name] for name in SCALING_KEYS.get(rope_type, ())}
    return {"dim": dim, "n_layers": config["num_hidden_layers"], "n_heads": heads,
            "n_kv_heads": config.get("num_key_value_heads") or heads, "vocab_size": config["vocab_size"],
            "hidden_dim": config["intermediate_size"], "norm_eps": config.get("rms_norm_eps", 1e-6),
            "max_seq_len": config.get("max_position_embeddings", 2048), "rope_theta": float(rope["rope_theta"]),
            "rope_scaling": rope_scaling or None, "tie_embeddings": config.get("tie_word_embeddings", False)}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, memory-mapped."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(common.read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; expected weights in safetensors files")
        tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = require_package("safetensors", f"{path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    unknown = {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in DTYPES.values()}
    if unknown:
        raise UserError(f"{path} has tensors of {', '.join(unknown)}; expected {', '.join(DTYPES)}")
    return tensors


def read_tokenizer(folder: Path, vocab_size: int, special: str = "") -> tuple[BaseTokenizer | None, str]:
    """Return the tokenizer and the chat template's name. Prefers a tokenizer.model that has vocab_size entries.

    special: bos and eos for a folder that does not name them.
    """
    path = folder / "tokenizer_config.json"
    config = common.read_json(path) if path.is_file() else {}
    template = folder / "chat_template.jinja"
    has_file = template.is_file()
    chat = common.chat_of_template(template.read_text(encoding="utf-8") if has_file else config.get("chat_template"))
    if (folder / "tokenizer.model").is_file():
        tokenizer = load_tokenizer(folder / "tokenizer.model")
        if tokenizer.vocab_size == vocab_size:
            return tokenizer, chat
    if not (folder / "tokenizer.json").is_file():
        return None, chat
    content = common.read_json(folder / "tokenizer.json")
    bos = token_text(config.get("bos_token", special))
    eos = token_text(config.get("eos_token", special))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bool(bos) and json.dumps(bos) in json.dumps(content.get("post_processor"))
    return load_tokenizer(common.tokenizer_json_with_meta(content, bos, eos, add_bos)), chat


def token_text(token: str | dict[str, Any] | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


# ---- write --------------------------------------------------------------------------------------

def write(ckpt: Checkpoint, folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load without custom code."""
    require_package("safetensors", "a folder of Hugging Face")
    tokenizer = build_tokenizer(ckpt)
    folder.mkdir(parents=True)
    write_tensors(ckpt["model"], ckpt["model_args"], folder / "model.safetensors")
    write_configs(ckpt, tokenizer, folder)
    write_tokenizer(tokenizer, ckpt.get("chat", ""), ckpt["model_args"]["max_seq_len"], folder)
    (folder / "README.md").write_text(model_card(ckpt), encoding="utf-8")


def write_tensors(model: dict[str, Tensor], args: dict[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = {}
    for ours, theirs in tensor_names(args, args["tie_embeddings"]).items():
        tensor = meta_to_hf_rope(model[ours], args) if has_rope_order(ours) else model[ours]
        tensors[theirs] = tensor.contiguous()
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_configs(ckpt: Checkpoint, tokenizer: BaseTokenizer, folder: Path) -> None:
    """Write config.json and generation_config.json."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids = {name: i for name, i in ids.items() if i >= 0}
    dtype = str(ckpt["model"]["norm.weight"].dtype).removeprefix("torch.")
    config = {**make_config(ckpt["model_args"]), **ids, "dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", config)
    chat_format = choose_format("auto", ckpt.get("chat", ""), tokenizer)
    if chat_format:
        ids["eos_token_id"] = [tokenizer.eos_id, chat_format.end_id]
    write_json(folder / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.8, "top_k": 300})


def make_config(model_args: dict[str, Any]) -> dict[str, Any]:
    args = ModelArgs(**model_args)
    scaling = args.rope_scaling
    if scaling and "factors" in scaling:
        raise UserError("the model has a table of rotary factors (from a GGUF file), which config.json cannot store")
    if scaling:
        scaling = {"rope_type": "llama3" if "low_freq_factor" in scaling else "linear", **scaling}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.dim,
            "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads, "head_dim": args.head_dim, "vocab_size": args.vocab_size,
            "intermediate_size": args.ffn_dim, "rms_norm_eps": args.norm_eps,
            "max_position_embeddings": args.max_seq_len, "rope_theta": args.rope_theta, "rope_scaling": scaling,
            "tie_word_embeddings": args.tie_embeddings, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "initializer_range": 0.02}


def write_tokenizer(tokenizer: BaseTokenizer, chat: str, max_seq_len: int, folder: Path) -> None:
    content = common.tokenizer_json(tokenizer)
    write_json(folder / "tokenizer.json", content)
    if isinstance(tokenizer, Tokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len,
              "clean_up_tokenization_spaces": False, "add_bos_token": tokenizer.add_bos}
    texts = {token["id"]: token["content"] for token in content["added_tokens"]}
    for name, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if i in texts:
            config[name] = texts[i]
    if chat in TEMPLATES:
        config["chat_template"] = TEMPLATES[chat]
    write_json(folder / "tokenizer_config.json", config)


def model_card(ckpt: Checkpoint) -> str:
    args = ckpt["model_args"]
    n_parameters = sum(ckpt["model"][name].numel() for name in tensor_names(args, args["tie_embeddings"]))
    trained = f", trained for {ckpt['iter_num']:,} steps" if ckpt["iter_num"] else ""
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\nA Llama with {n_parameters:,} "
            f"parameters{trained}: dim {args['dim']}, {args['n_layers']} layers, {args['n_heads']} heads, vocabulary "
            f"{args['vocab_size']}, context {args['max_seq_len']}. Written by tiny-llm.\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")\n'
            'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids\n'
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=200)[0]))\n```\n")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


# ---- row order ----------------------------------------------------------------------------------

def has_rope_order(name: str) -> bool:
    return name.endswith((".wq.weight", ".wk.weight"))


def hf_to_meta_rope(weight: Tensor, args: dict[str, Any]) -> Tensor:
    """Reorder the rows of each head from Hugging Face's order to Meta's."""
    return weight.unflatten(0, (-1, 2, args["dim"] // args["n_heads"] // 2)).transpose(1, 2).flatten(0, 2)


def meta_to_hf_rope(weight: Tensor, args: dict[str, Any]) -> Tensor:
    """Reorder the rows of each head from Meta's order to Hugging Face's."""
    return weight.unflatten(0, (-1, args["dim"] // args["n_heads"] // 2, 2)).transpose(1, 2).flatten(0, 2)
