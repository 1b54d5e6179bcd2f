"""A GGUF file, which llama.cpp, Ollama and LM Studio run. Architecture llama.

Needs the package gguf, which knows how weights are quantised. The format is that of ggml-org/ggml docs/gguf.md; the
rows of wq and wk have Meta's order there, as here. The header is read by this file: the package takes seconds for it,
and fills the memory when a length in it is damaged.
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
from extras.formats.common import (
    GPT2,
    LLAMA3,
    byte_level_json,
    chat_of_template,
    check_names,
    check_supported,
    layer_names,
    make_state,
    sentencepiece_model,
    tokenizer_json,
    tokenizer_json_with_meta,
)
from model import ModelArgs, rope_frequencies
from tinyllm.checkpoint import build_tokenizer
from tinyllm.cli import UserError
from tinyllm.optional import require_package
from tinyllm.project import load_tokenizer
from tokenizer import CONTROL, NORMAL, UNUSED, BaseTokenizer, Tokenizer

OF_MODEL = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
            "output.weight": "output.weight"}
OF_LAYER = {f"layers.{{}}.{ours}.weight": f"blk.{{}}.{theirs}.weight" for ours, theirs in {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}.items()}
INT_FIELDS = {"n_layers": "block_count", "max_seq_len": "context_length", "dim": "embedding_length",
         "hidden_dim": "feed_forward_length", "n_heads": "attention.head_count",
         "n_kv_heads": "attention.head_count_kv"}
FLOAT_FIELDS = {"norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
FACTORS = "rope_freqs.weight"           # by which each pair of dimensions turns slower

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q6_K")
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9                      # the other types of values
USER_DEFINED = 4                        # kind of tokens that are added, and yet text; the others as in tokenizer.py
# tokenizer.ggml.pre: how text is cut before the merges
LLAMA_BPE = {"pattern": LLAMA3, "whole_words": True}
PRETOKENIZERS = {"llama-bpe": LLAMA_BPE, "llama3": LLAMA_BPE, "llama-v3": LLAMA_BPE, "gpt-2": {"pattern": GPT2},
        "smollm": {"pattern": GPT2, "single_digits": True}}


# ---- in -----------------------------------------------------------------------------------------

class Header:
    """What stands before the tensors.

    Attributes:
        meta: the values by name.
        tensors: of each tensor by name, its shape, the number of its type, and where in the file it begins.
    """

    def __init__(self, data: np.ndarray):
        """data: the bytes of the file. Raises struct.error, LookupError, ValueError or ArithmeticError if damaged."""
        self._data, self._place = data, 4
        version, = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; there are 2 and 3")
        n_tensors, n_values = self._take("Q", 2)
        self.meta = {self._text(): self._value(*self._take("I")) for _ in range(n_values)}
        found = {self._text(): self._tensor() for _ in range(n_tensors)}
        alignment = self.meta.get("general.alignment", 32)
        start = -(-self._place // alignment) * alignment
        self.tensors = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}

    def _take(self, form: str, count: int = 1) -> tuple:
        """The next values; form is a letter of the module struct."""
        form = f"<{count}{form}"
        found = struct.unpack_from(form, self._data, self._place)
        self._place += struct.calcsize(form)
        return found

    def _text(self) -> str:
        return self._take("s", *self._take("Q"))[0].decode()

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            return self._take(NUMBERS[kind])[0]
        (kind,), (count,) = self._take("I"), self._take("Q")
        return [self._text() for _ in range(count)] if kind == TEXT else list(self._take(NUMBERS[kind], count))

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        shape = self._take("Q", *self._take("I"))[::-1]
        return shape, *self._take("I"), *self._take("Q")


def read(path: Path) -> dict[str, Any]:
    """Read a file. Raises UserError for what model.py cannot represent, by name; as Header when it is damaged."""
    require_package("gguf", f"{path}")
    data = np.asarray(np.memmap(path, mode="c"))
    header = Header(data)
    architecture = header.meta["general.architecture"]
    if architecture != "llama":
        raise UserError(f"{path} holds the architecture {architecture!r}; llama is what can be read")
    found = header.tensors
    factors = read_tensor(data, FACTORS, *found.pop(FACTORS)) if FACTORS in found else None
    args = read_args(header.meta, factors, path)
    names = layer_names(min(args["n_layers"], len(found)), OF_LAYER, OF_MODEL)
    tied = "output.weight" not in found
    if tied:
        del names["output.weight"]
    check_names(found, names.values(), path)
    args |= {"vocab_size": found["token_embd.weight"][0][0], "tie_embeddings": tied}
    vocabulary = read_vocabulary(header.meta, args["vocab_size"], path)
    model = {ours: read_tensor(data, theirs, *found[theirs]) for ours, theirs in names.items()}
    return make_state(model, args, vocabulary, chat_of_template(header.meta.get("tokenizer.chat_template")))


def read_tensor(data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, begin: int) -> Tensor:
    """A tensor that is mapped from the file, or one in float32 if it is quantised there."""
    import gguf
    kind = gguf.GGMLQuantizationType(kind)
    if kind.name not in (*DTYPES, *QUANTISED):
        raise UserError(f"{name} is quantised as {kind.name}; what can be read: {', '.join((*DTYPES, *QUANTISED))}")
    shape = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    content = data[begin:begin + math.prod(shape)].reshape(shape)
    if kind.name in DTYPES:
        return torch.from_numpy(content).view(DTYPES[kind.name])
    return torch.from_numpy(gguf.quants.dequantize(content, kind))


def read_args(meta: dict[str, Any], factors: Tensor | None, path: Path) -> dict[str, Any]:
    """model_args of the metadata. factors: (D / 2,), by which the rotary embedding is slowed down."""
    llama = {key.removeprefix("llama."): value for key, value in meta.items()}
    llama = {"attention.head_count_kv": llama["attention.head_count"], "rope.freq_base": 10000.0, **llama}
    args = {ours: llama[theirs] for ours, theirs in (INT_FIELDS | FLOAT_FIELDS).items()}
    known = {**dict.fromkeys(INT_FIELDS.values(), range(1, 1 << 24)), "expert_count": (0,),
             "rope.scaling.type": ("none", "linear"), "rope.scale_linear": (1,)}
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        known[name] = (llama["embedding_length"] // llama["attention.head_count"],)
    check_supported(llama, known, path, "model.py")
    factor = llama.get("rope.scaling.factor", 0) if llama.get("rope.scaling.type") != "none" else 0
    scaling = {"factor": factor} if factor else None
    if factors is not None:
        scaling = {"factors": (factors * (factor or 1)).tolist()}
    return {**args, "rope_scaling": scaling}


def read_vocabulary(meta: dict[str, Any], vocab_size: int, path: Path) -> BaseTokenizer | None:
    """The vocabulary inside the file, None if it has none."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    kind = values.get("model", "none")
    if kind in ("none", "no_vocab"):
        return None
    readers = {"llama": read_sentencepiece, "gpt2": read_byte_level}
    if kind not in readers:
        raise UserError(f"{path} has a vocabulary of the kind {kind!r}; llama and gpt2 can be read")
    vocabulary = readers[kind]({"token_type": [NORMAL] * len(values["tokens"]), **values}, path)
    if vocabulary.n_words != vocab_size:
        raise UserError(f"{path} has a vocabulary of {vocabulary.n_words} entries, and {vocab_size} embeddings")
    return vocabulary


def read_sentencepiece(values: dict[str, Any], path: Path) -> BaseTokenizer:
    for name in ("add_bos_token", "add_space_prefix"):
        if not values.get(name, True):
            raise UserError(f"{path} has {name} false, which tokenizer.py cannot represent for SentencePiece")
    pieces = list(zip(values["tokens"], values["scores"], values["token_type"]))
    return load_tokenizer(sentencepiece_model(pieces, values.get("bos_token_id", 1), values.get("eos_token_id", 2)))


def read_byte_level(values: dict[str, Any], path: Path) -> BaseTokenizer:
    cut = values.get("pre", "default")
    if cut not in PRETOKENIZERS:
        raise UserError(f"{path} cuts text by {cut!r} (tokenizer.ggml.pre); what can be read: {', '.join(PRETOKENIZERS)}")
    tokens, kinds = values["tokens"], values["token_type"]
    bos, eos = (tokens[values[name]] if name in values else "" for name in ("bos_token_id", "eos_token_id"))
    special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds))
               if kind in (CONTROL, USER_DEFINED) or token in (bos, eos)}
    add_bos = bool(bos) and values.get("add_bos_token", PRETOKENIZERS[cut] is LLAMA_BPE)
    content = byte_level_json({token: i for i, token in enumerate(tokens)},
                              [tuple(pair.split(" ")) for pair in values["merges"]], special,
                              bos=bos if add_bos else "", **PRETOKENIZERS[cut])
    for token in content["added_tokens"]:
        token["special"] = kinds[token["id"]] != USER_DEFINED
    return load_tokenizer(tokenizer_json_with_meta(content, bos, eos, add_bos))


# ---- out ----------------------------------------------------------------------------------------

def write(state: dict[str, Any], path: Path, kind: str) -> None:
    """Write a file. One tensor at a time is converted.

    kind: F32, F16 or Q8_0 for matrices; vectors are always in F32, and F16 is for rows that Q8_0 has no blocks for.
    Raises UserError when the state has no vocabulary, or one that GGUF has no name for.
    """
    gguf = require_package("gguf", "a file for llama.cpp")
    args, vocabulary = ModelArgs(**state["model_args"]), build_tokenizer(state)
    tensors = {theirs: state["model"][ours] for ours, theirs in layer_names(args.n_layers, OF_LAYER, OF_MODEL).items()
               if ours != "output.weight" or not args.tie_embeddings}
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
                              "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors |= add_args(writer, args)
        add_vocabulary(writer, vocabulary, args.vocab_size)
        writer.add_string("tokenizer.chat_template", TEMPLATES.get(state.get("chat"), ""))
        kinds = {name: gguf.GGMLQuantizationType[ggml_type_for(tensor, kind)] for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            size = math.prod(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kinds[name]))
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, kinds[name])
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
    """Write the metadata of a shape. Gives the tensor of the rotary embedding if that needs one."""
    values = {**vars(args), "hidden_dim": args.ffn_dim}
    for names, add in ((INT_FIELDS, writer.add_uint32), (FLOAT_FIELDS, writer.add_float32)):
        for ours, theirs in names.items():
            add(f"llama.{theirs}", values[ours])
    writer.add_vocab_size(args.vocab_size)
    writer.add_rope_dimension_count(args.head_dim)
    if args.rope_scaling is None:
        return {}
    factors = rope_frequencies(ModelArgs(**{**vars(args), "rope_scaling": None})) / rope_frequencies(args)
    if args.rope_scaling.keys() != {"factor"}:
        return {FACTORS: factors}
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_rope_scaling_factor(args.rope_scaling["factor"])
    return {}


def add_vocabulary(writer: Any, vocabulary: BaseTokenizer, vocab_size: int) -> None:
    if isinstance(vocabulary, Tokenizer):
        unused = [(f"[PAD{i}]", 0.0, UNUSED) for i in range(vocabulary.n_words, vocab_size)]
        tokens, scores, kinds = zip(*vocabulary.pieces(), *unused)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        writer.add_unk_token_id(0)
    else:
        content = tokenizer_json(vocabulary)
        tokens, kinds = zip(*tokens_of(content, vocab_size))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pretokenizer_name(content))
        merges = content["model"]["merges"]
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(isinstance(vocabulary, Tokenizer))
    for i, add in ((vocabulary.bos_id, writer.add_bos_token_id), (vocabulary.eos_id, writer.add_eos_token_id)):
        if i >= 0:
            add(i)


def tokens_of(content: dict[str, Any], vocab_size: int) -> list[tuple[str, int]]:
    """Text and kind of each entry of a tokenizer.json; ids that it leaves out become unused tokens."""
    entries = {i: (text, NORMAL) for text, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        entries[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return [entries.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]


def pretokenizer_name(content: dict[str, Any]) -> str:
    """The name that GGUF has for how a tokenizer.json cuts text. Raises UserError when there is none."""
    for name, how in PRETOKENIZERS.items():
        if pretokenizer_steps(content) == pretokenizer_steps(byte_level_json({}, [], {}, **how)):
            return name
    raise UserError(f"this vocabulary cuts text in another way than those that can be written: {', '.join(PRETOKENIZERS)}\n"
                    "       --to hf writes a folder for transformers")


def pretokenizer_steps(content: dict[str, Any]) -> list[Any]:
    """What a tokenizer.json does to text before it merges. A pattern inside ByteLevel is written as one before it."""
    first, found = content.get("pre_tokenizer") or {}, []
    for step in first.get("pretokenizers", [first]):
        if step.get("type") == "ByteLevel":
            found += [{"Regex": GPT2}] * step.get("use_regex", True) + [("ByteLevel", step["add_prefix_space"])]
        else:
            found.append(step.get("pattern", step))
    return [*found, content.get("normalizer"), content["model"].get("ignore_merges", False)]
