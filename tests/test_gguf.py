"""GGUF files: round trips, equality with transformers, and errors that name the unsupported value."""
import base64
import json
import random
from functools import cache

import numpy as np
import pytest
import torch
from conftest import learn_tokenizer

from extras.formats import common
from extras.tokenizers import JsonTokenizer, TiktokenTokenizer
from model import ModelArgs, Transformer
from tinyllm import checkpoint, demo_stories
from tinyllm.cli import UserError

gguf = pytest.importorskip("gguf")
from extras.formats import gguf_file  # noqa: E402

TEXTS = [*demo_stories.generate_stories(20), "12345 and 67,\n\n  8", "It's DON'T  x\t\ty ", "中文, 🙂 é",
         "<s></s>"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@cache
def sentencepiece():
    return learn_tokenizer(demo_stories.generate_stories(50), 400)


def make_state(vocabulary=None, **args):
    torch.manual_seed(1)
    vocabulary = vocabulary or sentencepiece()
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": vocabulary.n_words}
    model = Transformer(ModelArgs(**{**shape, **args}))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.1)
    return {**checkpoint.model_state(model), "iter_num": 3, "config": {}, "tokenizer": vocabulary.model,
            "tokenizer_sha256": vocabulary.sha256, "chat": "chatml"}


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write a file, optionally with other metadata or another matrix type, and return its path."""
    def run(state, kind="F32", as_type="", values={}):
        plain = gguf.GGUFWriter.write_header_to_file

        def with_values(writer):
            for key, value in values.items():
                writer.kv_data[0].pop(key, None)
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
            plain(writer)
        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_values)
            if as_type:
                patch.setattr(gguf_file, "ggml_type_for", lambda tensor, _: "F32" if tensor.dim() == 1 else as_type)
            gguf_file.write(state, tmp_path / "a.gguf.tmp", kind)
        return tmp_path / "a.gguf.tmp"
    return run


@torch.inference_mode()
def logits(state):
    return checkpoint.build_model(state)(torch.arange(40)[None] * 7 % 256)


def ids(state):
    return checkpoint.build_tokenizer(state).encode_batch(TEXTS, bos=True, eos=True)


def largest(found, expected):
    return max((found["model"][name].float() - weight).abs().max().item() for name, weight in expected["model"].items())


def test_float32_round_trip(state, write):
    found = checkpoint.read_model(write(state))
    assert found["model"].keys() == state["model"].keys() and largest(found, state) == 0
    assert found["chat"] == "chatml" and found["model_args"]["tie_embeddings"]
    assert ids(found) == ids(state) and checkpoint.build_tokenizer(found).is_lossless
    assert torch.equal(logits(found), logits(state))


@pytest.mark.parametrize("kind, dtype, tolerance", [("F16", torch.float16, 3e-4), ("Q8_0", torch.float32, 3e-3)])
def test_smaller_formats_round_trip(state, write, kind, dtype, tolerance):
    found = checkpoint.read_model(write(state, kind))
    assert 0 < largest(found, state) < tolerance
    assert found["model"]["layers.0.attention.wq.weight"].dtype == dtype
    assert torch.equal(found["model"]["norm.weight"], state["model"]["norm.weight"])


def test_rows_without_whole_blocks_become_float16(write):
    state = make_state(dim=48, hidden_dim=64)
    found = checkpoint.read_model(write(state, "Q8_0"))["model"]
    assert found["layers.0.attention.wq.weight"].dtype == torch.float16
    assert found["layers.0.feed_forward.w2.weight"].dtype == torch.float32


@pytest.mark.parametrize("args", [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"tie_embeddings": False}, {"rope_theta": 5e5},
                                  {"rope_scaling": {"factor": 4.0}}, {"rope_scaling": LLAMA3}, {"norm_eps": 1e-3},
                                  {"rope_scaling": {"factors": [1.0, 1.5] + [4.0] * 6}}], ids=str)
def test_every_shape_computes_the_same(args, write):
    state = make_state(**args)
    found = checkpoint.read_model(write(state))
    torch.testing.assert_close(logits(found), logits(state), rtol=0, atol=2e-5)
    assert found["model_args"]["tie_embeddings"] == args.get("tie_embeddings", True)


@pytest.mark.parametrize("args", [{"n_kv_heads": 1}, {"tie_embeddings": False, "rope_theta": 5e5}], ids=str)
def test_transformers_computes_the_same_from_the_file(args, write):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    state = make_state(**args)
    path = write(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.arange(40)[None] * 7 % 256).logits
    torch.testing.assert_close(logits(state), expected, rtol=0, atol=1e-4)


# ---- other types of tensors ---------------------------------------------------------------------

@pytest.mark.parametrize("name, dtype, tolerance", [("BF16", torch.bfloat16, 0.003), ("Q4_0", torch.float32, 0.08),
                                                    ("Q4_1", torch.float32, 0.08)])
def test_other_types_are_read(state, write, name, dtype, tolerance):
    found = checkpoint.read_model(write(state, as_type=name))
    assert 0 < largest(found, state) < tolerance
    assert found["model"]["tok_embeddings.weight"].dtype == dtype


def test_q6_k_is_read(write, monkeypatch):
    """Build a block: 6-bit quants minus 32, times a scale per 16 quants, times a scale per block."""
    quantize, low, high = gguf.quants.quantize, [0x21] * 128, [0] * 64          # 64 times 1, 64 times 2, and again
    block = np.array([*low, *high, *[3] * 16, *np.float16([0.5]).tobytes()], np.uint8)
    monkeypatch.setattr(gguf.quants, "quantize", lambda array, kind: np.tile(block, (len(array), array.shape[1] // 256))
                        if kind == gguf.GGMLQuantizationType.Q6_K else quantize(array, kind))
    state = checkpoint.read_model(write(make_state(dim=256, hidden_dim=256), as_type="Q6_K"))
    found = state["model"]["tok_embeddings.weight"]
    assert torch.equal(found[7], torch.tensor([(1 - 32) * 1.5] * 64 + [(2 - 32) * 1.5] * 64).repeat(2))


def test_unsupported_types_are_named(state, write):
    with pytest.raises(UserError, match="token_embd.weight is quantized as Q5_1"):
        checkpoint.read_model(write(state, as_type="Q5_1"))


# ---- vocabularies -------------------------------------------------------------------------------

def byte_level(cut, bos="<|begin|>", add_bos=True):
    """Return a small tokenizer like GPT-2's, with two special tokens and one added text token."""
    tokenizers = pytest.importorskip("tokenizers")
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.train_from_iterator(demo_stories.generate_stories(50), tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=common.byte_letters(), show_progress=False))
    entries = learned.get_vocab()
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    special = {name: len(entries) + i for i, name in enumerate(("<|begin|>", "<|im_end|>", "<think>"))}
    content = common.byte_level_json({**entries, **special}, merges, special, bos=bos, **cut)
    content["added_tokens"][2]["special"] = False
    return JsonTokenizer(common.tokenizer_json_with_meta(content, bos, "<|im_end|>", add_bos))


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_byte_level_round_trip(name, add_bos, write):
    vocabulary = byte_level(gguf_file.PRETOKENIZERS[name], add_bos=add_bos)
    path = write(make_state(vocabulary))
    found = checkpoint.build_tokenizer(checkpoint.read_model(path))
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    assert found.encode_batch(TEXTS) == vocabulary.encode_batch(TEXTS)
    assert (found.bos_id, found.eos_id, found.add_bos) == (vocabulary.bos_id, vocabulary.eos_id, add_bos)
    added = found.encode("a<think><|im_end|>")
    assert found.special_token_id("<think>") in added and found.eos_id not in added
    assert found.decode([found.bos_id, *added]) == "a<think><|im_end|>"


def test_spellings_of_hugging_face_have_the_same_name(write):
    vocabulary = byte_level(gguf_file.PRETOKENIZERS["smollm"])
    content = common.tokenizer_json(vocabulary)
    content["pre_tokenizer"]["pretokenizers"][1:] = [{"type": "ByteLevel", "add_prefix_space": False,
                                                      "trim_offsets": True, "use_regex": True}]
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    other = JsonTokenizer(common.tokenizer_json_with_meta(content, "", "<|im_end|>", False))
    found = checkpoint.build_tokenizer(checkpoint.read_model(write(make_state(other))))
    assert found.encode_batch(TEXTS) == vocabulary.encode_batch(TEXTS) and found.bos_id == -1


def test_missing_entries_become_unused(write):
    vocabulary = byte_level(gguf_file.PRETOKENIZERS["gpt-2"])
    path = write(make_state(vocabulary, vocab_size=vocabulary.n_words + 5))
    found = checkpoint.build_tokenizer(checkpoint.read_model(path))
    assert found.n_words == vocabulary.n_words + 5 and found.encode_batch(TEXTS) == vocabulary.encode_batch(TEXTS)


def test_llama3_round_trip(write):
    pytest.importorskip("tiktoken")
    merged = [b"th", b"he", b" t", b"the", b" the", b"in"]
    tokens = [bytes([byte]) for byte in range(256)] + merged
    lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))
    vocabulary = TiktokenTokenizer(b"".join(lines))
    found = checkpoint.build_tokenizer(checkpoint.read_model(write(make_state(vocabulary))))
    assert found.encode_batch(TEXTS, bos=True) == vocabulary.encode_batch(TEXTS, bos=True)
    assert (found.n_words, found.eos_id) == (vocabulary.n_words, vocabulary.eos_id)


def test_unnamed_splitting_rule_is_refused(write):
    with pytest.raises(UserError, match="splits text.*gpt-2"):
        write(make_state(byte_level({"pattern": r"\w+|\W+"})))


def test_checkpoint_without_tokenizer_names_the_flag(state, write):
    with pytest.raises(UserError, match="--tokenizer"):
        write({**state, "tokenizer": b""})


# ---- refused files ------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value, message", [
    ("general.architecture", "qwen2", "architecture 'qwen2'"), ("llama.rope.scaling.type", "yarn", "type 'yarn'"),
    ("llama.expert_count", 8, "expert_count 8"), ("llama.rope.dimension_count", 8, "dimension_count 8"),
    ("llama.attention.key_length", 32, "key_length 32"), ("llama.context_length", 1 << 30, "context_length 1073741824"),
    ("llama.block_count", 1 << 23, "lacks"), ("llama.block_count", 1, "unknown tensors"),
    ("llama.feed_forward_length", [192, 96], r"feed_forward_length \[192, 96\]"),
    ("llama.attention.head_count", 0, "damaged"), ("tokenizer.ggml.model", "bert", "tokenizer model 'bert'"),
    ("tokenizer.ggml.add_space_prefix", False, "add_space_prefix"),
])
def test_unsupported_values_are_named(state, write, key, value, message):
    with pytest.raises(UserError, match=f"a.gguf.*{message}"):
        checkpoint.read_model(write(state, values={key: value}))


def test_a_vocabulary_of_another_size_is_refused(write):
    size = sentencepiece().n_words
    with pytest.raises(UserError, match=f"{size - 1} embeddings, but {size} tokenizer entries"):
        checkpoint.read_model(write(make_state(vocab_size=size - 1)))


def test_unknown_splitting_rule_is_named(write):
    with pytest.raises(UserError, match="tokenizer.ggml.pre 'default'"):
        state = make_state(byte_level(gguf_file.PRETOKENIZERS["gpt-2"]))
        checkpoint.read_model(write(state, values={"tokenizer.ggml.pre": "default"}))


def test_cut_and_foreign_files_are_refused(state, write, tmp_path):
    whole, bad = write(state).read_bytes(), tmp_path / "bad.gguf"
    lengths = [4, 8, 23, 24, 100, 5000, 12000, len(whole) // 2, len(whole) - 100]
    for content in [*(whole[:length] for length in lengths), b"GGUF" + b"\xff" * 200, b"GGUF" + bytes(200),
                    whole[:4] + b"\1" + whole[5:]]:
        bad.write_bytes(content)
        with pytest.raises(UserError, match="bad.gguf"):
            checkpoint.read_model(bad)


def test_damaged_headers_are_read_or_refused(state, write, tmp_path):
    whole, bad = write(state).read_bytes(), tmp_path / "bad.gguf"
    end = whole.index(b"token_embd.weight") + 1000
    for place in random.Random(1).sample(range(4, end), 300):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        try:
            checkpoint.read_model(bad)
        except UserError:
            pass


# ---- convert.py ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gguf", "gguf-f16", "gguf-q8_0"])
def test_convert_writes_and_reads(state, run_in_process, capsys, kind):
    checkpoint.save_checkpoint("a.pt", state)
    run_in_process("convert", "a.pt", "story.gguf", "--to", kind)
    run_in_process("convert", "story.gguf", "back.pt")
    found = checkpoint.load_checkpoint("back.pt")
    assert largest(found, state) < 3e-3 and ids(found) == ids(state)
    assert "wrote story.gguf" in capsys.readouterr().out
