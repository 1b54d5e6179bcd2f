"""Read and write GGUF files for llama.cpp, Ollama and LM Studio. Architecture llama.

Requires the package gguf, which quantizes weights. ggml-org/ggml docs/gguf.md documents the format. The rows of wq and
wk have Meta's order, as in model.py. This file parses the header itself: the package takes seconds, and allocates too
much memory when a length is damaged.
"""
import math
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extras.chat import TEMPLATES
from extras.formats import common
from model import ModelArgs, rope_frequencies
from tinyllm.checkpoint import Checkpoint, build_tokenizer
from tinyllm.cli import UserError
from tinyllm.optional import require_package
from tinyllm.project import load_tokenizer
from tokenizer import CONTROL, NORMAL, UNUSED, BaseTokenizer, Tokenizer

MODEL_NAMES = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
               "output.weight": "output.weight"}
LAYER_PARTS = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
INT_FIELDS = {"n_layers": "block_count", "max_seq_len": "context_length", "dim": "embedding_length",
              "hidden_dim": "feed_forward_length", "n_heads": "attention.head_count",
              "n_kv_heads": "attention.head_count_kv"}
FLOAT_FIELDS = {"norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
ROPE_FACTORS = "rope_freqs.weight"      # tensor of divisors of the rotary frequencies

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q6_K")
VALUE_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9                      # value types without an entry in VALUE_TYPES
USER_DEFINED = 4                        # kind of added text tokens; tokenizer.py defines the other kinds
# tokenizer.ggml.pre: the rule that splits text before the merges
LLAMA_BPE = {"pattern": common.LLAMA3, "whole_words": True}
PRETOKENIZERS = {"llama-bpe": LLAMA_BPE, "llama3": LLAMA_BPE, "llama-v3": LLAMA_BPE, "gpt-2": {"pattern": common.GPT2},
                 "smollm": {"pattern": common.GPT2, "single_digits": True}}


# ---- read ---------------------------------------------------------------------------------------

class Header:
    """The header of a GGUF file.

    Attributes:
        meta: metadata by name.
        tensors: shape, type number and file offset by name.
    """

    def __init__(self, data: np.ndarray):
        """Parse the bytes of a file. Raises struct.error, LookupError, ValueError or ArithmeticError if damaged."""
        self._data = data
        self._offset = 4
        version, = self._read("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; expected 2 or 3")
        n_tensors, n_values = self._read("Q", 2)
        self.meta = {self._read_text(): self._read_value(*self._read("I")) for _ in range(n_values)}
        tensors = {self._read_text(): self._read_tensor() for _ in range(n_tensors)}
        alignment = self.meta.get("general.alignment", 32)
        start = -(-self._offset // alignment) * alignment
        self.tensors = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}

    def _read(self, letter: str, count: int = 1) -> tuple:
        """Read the next values. letter: format character of the module struct."""
        layout = f"<{count}{letter}"
        values = struct.unpack_from(layout, self._data, self._offset)
        self._offset += struct.calcsize(layout)
        return values

    def _read_text(self) -> str:
        length, = self._read("Q")
        return self._read("s", length)[0].decode()

    def _read_value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._read_text()
        if kind != ARRAY:
            return self._read(VALUE_TYPES[kind])[0]
        item_kind, = self._read("I")
        count, = self._read("Q")
        if item_kind == TEXT:
            return [self._read_text() for _ in range(count)]
        return list(self._read(VALUE_TYPES[item_kind], count))

    def _read_tensor(self) -> tuple[tuple[int, ...], int, int]:
        n_dims, = self._read("I")
        shape = self._read("Q", n_dims)[::-1]
        kind, = self._read("I")
        offset, = self._read("Q")
        return shape, kind, offset


def read(path: Path) -> Checkpoint:
    """Read a GGUF file. Raises UserError, with the reasons, if model.py does not support the model."""
    require_package("gguf", f"{path}")
    data = np.asarray(np.memmap(path, mode="c"))
    header = Header(data)
    architecture = header.meta["general.architecture"]
    if architecture != "llama":
        raise UserError(f"{path} has the architecture {architecture!r}; expected 'llama'")
    tensors = header.tensors
    factors = read_tensor(data, ROPE_FACTORS, *tensors.pop(ROPE_FACTORS)) if ROPE_FACTORS in tensors else None
    args = read_args(header.meta, factors, path)
    is_tied = "output.weight" not in tensors
    names = common.tensor_names(min(args["n_layers"], len(tensors)), MODEL_NAMES, LAYER_PARTS, "blk", is_tied=is_tied)
    common.check_names(tensors, names.values(), path)
    args |= {"vocab_size": tensors["token_embd.weight"][0][0], "tie_embeddings": is_tied}
    tokenizer = read_tokenizer(header.meta, args["vocab_size"], path)
    model = {ours: read_tensor(data, theirs, *tensors[theirs]) for ours, theirs in names.items()}
    chat = common.chat_of_template(header.meta.get("tokenizer.chat_template"))
    return common.make_checkpoint(model, args, tokenizer, chat)


def read_tensor(data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    """Return a memory-mapped tensor, or a float32 copy if it is quantized."""
    import gguf
    kind = gguf.GGMLQuantizationType(kind)
    readable = (*DTYPES, *QUANTIZED)
    if kind.name not in readable:
        raise UserError(f"{name} is quantized as {kind.name}; expected {', '.join(readable)}")
    byte_shape = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    content = data[offset:offset + math.prod(byte_shape)].reshape(byte_shape)
    if kind.name in DTYPES:
        return torch.from_numpy(content).view(DTYPES[kind.name])
    return torch.from_numpy(gguf.quants.dequantize(content, kind))


def read_args(meta: dict[str, Any], factors: Tensor | None, path: Path) -> dict[str, Any]:
    """Return model_args from the metadata. factors: (D / 2,), divisors of the rotary frequencies, or None."""
    llama = {key.removeprefix("llama."): value for key, value in meta.items()}
    llama = {"attention.head_count_kv": llama["attention.head_count"], "rope.freq_base": 10000.0, **llama}
    args = {ours: llama[theirs] for ours, theirs in (INT_FIELDS | FLOAT_FIELDS).items()}
    head_dim = (llama["embedding_length"] // llama["attention.head_count"],)
    common.check_supported(llama, {
        **dict.fromkeys(INT_FIELDS.values(), range(1, 1 << 24)),
        "expert_count": (0,), "rope.scaling.type": ("none", "linear"), "rope.scale_linear": (1,),
        "rope.dimension_count": head_dim, "attention.key_length": head_dim, "attention.value_length": head_dim,
    }, path, "model.py")
    factor = llama.get("rope.scaling.factor", 0) if llama.get("rope.scaling.type") != "none" else 0
    scaling = {"factor": factor} if factor else None
    if factors is not None:
        scaling = {"factors": (factors * (factor or 1)).tolist()}
    return {**args, "rope_scaling": scaling}


def read_tokenizer(meta: dict[str, Any], vocab_size: int, path: Path) -> BaseTokenizer | None:
    """Return the tokenizer in the file; None if there is none."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    kind = values.get("model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("llama", "gpt2"):
        raise UserError(f"{path} has the tokenizer model {kind!r}; expected 'llama' or 'gpt2'")
    values = {"token_type": [NORMAL] * len(values["tokens"]), **values}
    tokenizer = read_sentencepiece(values, path) if kind == "llama" else read_byte_level(values, path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{path} has {vocab_size} embeddings, but {tokenizer.vocab_size} tokenizer entries")
    return tokenizer


def read_sentencepiece(values: dict[str, Any], path: Path) -> BaseTokenizer:
    for name in ("add_bos_token", "add_space_prefix"):
        if not values.get(name, True):
            raise UserError(f"{path} has {name} false, which tokenizer.py does not support for SentencePiece")
    pieces = list(zip(values["tokens"], values["scores"], values["token_type"]))
    model = common.sentencepiece_model(pieces, values.get("bos_token_id", 1), values.get("eos_token_id", 2))
    return load_tokenizer(model)


def read_byte_level(values: dict[str, Any], path: Path) -> BaseTokenizer:
    name = values.get("pre", "default")
    if name not in PRETOKENIZERS:
        raise UserError(f"{path} has tokenizer.ggml.pre {name!r}; expected one of {', '.join(PRETOKENIZERS)}")
    tokens = values["tokens"]
    kinds = values["token_type"]
    bos = tokens[values["bos_token_id"]] if "bos_token_id" in values else ""
    eos = tokens[values["eos_token_id"]] if "eos_token_id" in values else ""
    add_bos = bool(bos) and values.get("add_bos_token", PRETOKENIZERS[name] is LLAMA_BPE)
    ids = {token: i for i, token in enumerate(tokens)}
    special = {token: i for token, i in ids.items() if kinds[i] in (CONTROL, USER_DEFINED) or token in (bos, eos)}
    merges = [tuple(pair.split(" ")) for pair in values["merges"]]
    content = common.byte_level_json(ids, merges, special, bos=bos if add_bos else "", **PRETOKENIZERS[name])
    for token in content["added_tokens"]:
        token["special"] = kinds[token["id"]] != USER_DEFINED
    return load_tokenizer(common.tokenizer_json_with_meta(content, bos, eos, add_bos))


# ---- write --------------------------------------------------------------------------------------

def write(ckpt: Checkpoint, path: Path, kind: str) -> None:
    """Write a GGUF file. Converts one tensor at a time to save memory.

    kind: F32, F16 or Q8_0, for matrices. Vectors are F32. With Q8_0, rows not divisible by 32 become F16.
    Raises UserError if the checkpoint has no tokenizer, or GGUF has no name for its splitting rule.
    """
    gguf = require_package("gguf", "a file for llama.cpp")
    args = ModelArgs(**ckpt["model_args"])
    tokenizer = build_tokenizer(ckpt)
    names = common.tensor_names(args.n_layers, MODEL_NAMES, LAYER_PARTS, "blk", is_tied=args.tie_embeddings)
    tensors = {theirs: ckpt["model"][ours] for ours, theirs in names.items()}
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors |= add_args(writer, args)
        add_tokenizer(writer, tokenizer, args.vocab_size)
        writer.add_string("tokenizer.chat_template", TEMPLATES.get(ckpt.get("chat"), ""))
        write_tensors(writer, tensors, kind)


def write_tensors(writer: Any, tensors: dict[str, Tensor], kind: str) -> None:
    """Write the header, which lists all tensors, then the tensors."""
    import gguf
    kinds = {name: gguf.GGMLQuantizationType[ggml_type_for(tensor, kind)] for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        n_bytes = math.prod(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kinds[name]))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kinds[name]))


def ggml_type_for(tensor: Tensor, kind: str) -> str:
    if tensor.dim() == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[1] % 32 else kind


def add_args(writer: Any, args: ModelArgs) -> dict[str, Tensor]:
    """Write model args as metadata. Return the tensor of rotary factors, if there is one."""
    values = {**vars(args), "hidden_dim": args.ffn_dim}
    for ours, theirs in INT_FIELDS.items():
        writer.add_uint32(f"llama.{theirs}", values[ours])
    for ours, theirs in FLOAT_FIELDS.items():
        writer.add_float32(f"llama.{theirs}", values[ours])
    writer.add_vocab_size(args.vocab_size)
    writer.add_rope_dimension_count(args.head_dim)
    if args.rope_scaling is None:
        return {}
    if args.rope_scaling.keys() != {"factor"}:
        unscaled = ModelArgs(**{**vars(args), "rope_scaling": None})
        return {ROPE_FACTORS: rope_frequencies(unscaled) / rope_frequencies(args)}
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_rope_scaling_factor(args.rope_scaling["factor"])
    return {}


def add_tokenizer(writer: Any, tokenizer: BaseTokenizer, vocab_size: int) -> None:
    is_sentencepiece = isinstance(tokenizer, Tokenizer)
    if is_sentencepiece:
        unused = [(f"[PAD{i}]", 0.0, UNUSED) for i in range(tokenizer.vocab_size, vocab_size)]
        tokens, scores, kinds = zip(*tokenizer.pieces(), *unused)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        writer.add_unk_token_id(0)
    else:
        content = common.tokenizer_json(tokenizer)
        tokens, kinds = zip(*tokens_of(content, vocab_size))
        merges = content["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pretokenizer_name(content))
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(is_sentencepiece)
    for add_id, token in ((writer.add_bos_token_id, tokenizer.bos_id), (writer.add_eos_token_id, tokenizer.eos_id)):
        if token >= 0:
            add_id(token)


def tokens_of(content: dict[str, Any], vocab_size: int) -> list[tuple[str, int]]:
    """Return text and kind of each token of a tokenizer.json; missing ids become unused tokens."""
    entries = {i: (text, NORMAL) for text, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        entries[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return [entries.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]


def pretokenizer_name(content: dict[str, Any]) -> str:
    """Return GGUF's name for the splitting rule of a tokenizer.json. Raises UserError if there is none."""
    for name, options in PRETOKENIZERS.items():
        if pretokenizer_steps(content) == pretokenizer_steps(common.byte_level_json({}, [], {}, **options)):
            return name
    raise UserError("this tokenizer splits text in a way that GGUF does not name; expected one of "
                    f"{', '.join(PRETOKENIZERS)}\n       choose a folder as the target (--to hf)")


def pretokenizer_steps(content: dict[str, Any]) -> list[Any]:
    """Return the steps of a tokenizer.json before the merges. A pattern inside ByteLevel counts as a step."""
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("type") != "ByteLevel":
            steps.append(step.get("pattern", step))
            continue
        if step.get("use_regex", True):
            steps.append({"Regex": common.GPT2})
        steps.append(("ByteLevel", step["add_prefix_space"]))
    return [*steps, content.get("normalizer"), content["model"].get("ignore_merges", False)]
