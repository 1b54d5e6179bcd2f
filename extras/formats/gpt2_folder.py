"""Folders of GPT-2: config.json, safetensors, and tokenizer.json or OpenAI's two files of the vocabulary.

    state = read(download("gpt2", "data"))

Tensor names are those of transformers, with or without `transformer.` before them. Its linear layers (Conv1D) keep
their weights as (in, out).
"""
from pathlib import Path
from typing import Any

from extras.formats.common import (
    GPT2,
    byte_level_json,
    check_names,
    check_supported,
    layer_names,
    make_state,
    read_json,
    tokenizer_json_with_meta,
)
from extras.formats.huggingface import read_tensors
from extras.formats.huggingface import read_vocabulary as read_tokenizer_json
from tinyllm.cli import UserError
from tinyllm.project import load_tokenizer
from tokenizer import BaseTokenizer

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "tokenizer.json", "model.safetensors")
MIRRORS = {"huggingface": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com"}
END = "<|endoftext|>"           # between the texts that GPT-2 was trained on: both bos and eos

OF_MODEL = {"tok_embeddings.weight": "wte.weight", "positions.weight": "wpe.weight", "norm.weight": "ln_f.weight",
            "norm.bias": "ln_f.bias"}
OF_LAYER = {f"layers.{{}}.{ours}.{kind}": f"h.{{}}.{theirs}.{kind}" for kind in ("weight", "bias") for ours, theirs in {
    "attention_norm": "ln_1", "attention.wqkv": "attn.c_attn", "attention.wo": "attn.c_proj", "ffn_norm": "ln_2",
    "feed_forward.w1": "mlp.c_fc", "feed_forward.w2": "mlp.c_proj"}.items()}
TURNED = ("wqkv.weight", "wo.weight", "w1.weight", "w2.weight")


def download(name: str, data_dir: str | Path) -> Path:
    """Fetch what is missing of a model of RELEASED to a folder of data_dir, and return that folder.

    Raises:
        UserError: when no mirror delivers; it names the files and the folder.
    """
    from tinyllm import download
    folder = Path(data_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        urls = {mirror: f"{url}/openai-community/{name}/resolve/main/{file}" for mirror, url in MIRRORS.items()}
        if not (folder / file).exists():
            try:
                download.download_file(urls, folder / file)
            except UserError as error:
                raise UserError(f"{error}\n       all that {name} needs there: {', '.join(FILES)}") from error
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Read a folder. Raises UserError for what gpt2.py cannot represent, by name."""
    args = read_config(read_json(folder / "config.json"), folder)
    found = {name.removeprefix("transformer."): tensor for name, tensor in read_tensors(folder).items()}
    tensors = {name: tensor for name, tensor in found.items()           # the mask of attention, and the tied output
               if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight"}
    names = layer_names(args["n_layers"], OF_LAYER, OF_MODEL)
    check_names(tensors, names.values(), folder)
    model = {ours: tensors[theirs].T if ours.endswith(TURNED) else tensors[theirs] for ours, theirs in names.items()}
    return make_state(model, args, *read_vocabulary(folder, args["vocab_size"]), architecture="gpt2")


def read_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """model_args of a config.json."""
    known = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * config["n_embd"]),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,), "tie_word_embeddings": (True,), "quantization_config": (None,)}
    check_supported(config, known, folder, "gpt2.py")
    return {"dim": config["n_embd"], "n_layers": config["n_layer"], "n_heads": config["n_head"],
            "vocab_size": config["vocab_size"], "max_seq_len": config.get("n_positions") or config.get("n_ctx", 1024),
            "norm_eps": config.get("layer_norm_epsilon", 1e-5)}


def read_vocabulary(folder: Path, vocab_size: int) -> tuple[BaseTokenizer | None, str]:
    """The vocabulary and the chat format of a folder, from tokenizer.json, or from OpenAI's files by either name."""
    for ids, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if not (folder / "tokenizer.json").is_file() and (folder / ids).is_file() and (folder / merges).is_file():
            return read_openai(folder / ids, folder / merges), ""
    return read_tokenizer_json(folder, vocab_size, END)


def read_openai(ids_path: Path, merges_path: Path) -> BaseTokenizer:
    """A vocabulary from its entries, and the merges in the order of their learning, one a line."""
    ids = read_json(ids_path)
    if END not in ids:
        raise UserError(f"{ids_path} has no {END}, so it is not the vocabulary of a GPT-2")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    return load_tokenizer(tokenizer_json_with_meta(byte_level_json(ids, merges, {END: ids[END]}, GPT2), END, END, add_bos=False))
