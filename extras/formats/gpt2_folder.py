"""Read GPT-2 folders from Hugging Face: config.json, safetensors, and tokenizer.json or OpenAI's two tokenizer files.

    ckpt = read(download("gpt2", "data"))

Tensors have transformers' names, with or without the prefix `transformer.`. Linear layers (Conv1D) store weights as
(in, out).
"""
from pathlib import Path
from typing import Any

from extras.formats import common, huggingface
from tinyllm import download as downloads
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.project import load_tokenizer
from tokenizer import BaseTokenizer

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "tokenizer.json", "model.safetensors")
MIRRORS = {"huggingface": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com"}
END = "<|endoftext|>"           # separates GPT-2's training texts: both bos and eos

MODEL_NAMES = {"tok_embeddings.weight": "wte.weight", "positions.weight": "wpe.weight", "norm.weight": "ln_f.weight",
               "norm.bias": "ln_f.bias"}
LAYER_PARTS = {"attention_norm": "ln_1", "attention.wqkv": "attn.c_attn", "attention.wo": "attn.c_proj",
               "ffn_norm": "ln_2", "feed_forward.w1": "mlp.c_fc", "feed_forward.w2": "mlp.c_proj"}
TRANSPOSED = ("wqkv.weight", "wo.weight", "w1.weight", "w2.weight")
NOT_READ = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")        # tied output layer, attention masks


def download(name: str, data_dir: str | Path) -> Path:
    """Download the missing files of a model in RELEASED to data_dir/name, and return that folder.

    Raises UserError, with the files and the folder, if every mirror fails.
    """
    folder = Path(data_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (folder / file).exists():
            continue
        urls = {mirror: f"{url}/openai-community/{name}/resolve/main/{file}" for mirror, url in MIRRORS.items()}
        try:
            downloads.download_file(urls, folder / file)
        except UserError as error:
            raise UserError(f"{error}\n       {name} needs {', '.join(FILES)}") from error
    return folder


def read(folder: Path) -> Checkpoint:
    """Read a folder. Raises UserError, with the reasons, if extras/gpt2.py does not support the model."""
    args = read_config(common.read_json(folder / "config.json"), folder)
    tensors = {}
    for name, tensor in huggingface.read_tensors(folder).items():
        if not name.endswith(NOT_READ):
            tensors[name.removeprefix("transformer.")] = tensor
    names = tensor_names(args["n_layers"])
    common.check_names(tensors, names.values(), folder)
    model = {}
    for ours, theirs in names.items():
        model[ours] = tensors[theirs].T if ours.endswith(TRANSPOSED) else tensors[theirs]
    tokenizer, chat = read_tokenizer(folder, args["vocab_size"])
    return common.make_checkpoint(model, args, tokenizer, chat, architecture="gpt2")


def tensor_names(n_layers: int) -> dict[str, str]:
    return common.tensor_names(n_layers, MODEL_NAMES, LAYER_PARTS, "h", ("weight", "bias"))


def read_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return model_args from a config.json."""
    common.check_supported(config, {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * config["n_embd"]),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "tie_word_embeddings": (True,), "quantization_config": (None,),
    }, folder, "extras/gpt2.py")
    return {"dim": config["n_embd"], "n_layers": config["n_layer"], "n_heads": config["n_head"],
            "vocab_size": config["vocab_size"], "max_seq_len": config.get("n_positions") or config.get("n_ctx", 1024),
            "norm_eps": config.get("layer_norm_epsilon", 1e-5)}


def read_tokenizer(folder: Path, vocab_size: int) -> tuple[BaseTokenizer | None, str]:
    """Return the tokenizer, from tokenizer.json or OpenAI's files, and the chat template's name."""
    if not (folder / "tokenizer.json").is_file():
        for ids, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / ids).is_file() and (folder / merges).is_file():
                return read_openai_tokenizer(folder / ids, folder / merges), ""
    return huggingface.read_tokenizer(folder, vocab_size, END)


def read_openai_tokenizer(ids_path: Path, merges_path: Path) -> BaseTokenizer:
    """Read a tokenizer from OpenAI's JSON file of ids and its text file of merges, in learned order."""
    ids = common.read_json(ids_path)
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    content = common.byte_level_json(ids, merges, {END: ids[END]}, common.GPT2)
    return load_tokenizer(common.tokenizer_json_with_meta(content, END, END, add_bos=False))
