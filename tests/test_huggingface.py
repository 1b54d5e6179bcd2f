"""Hugging Face folders: transformers reads ours, and we read theirs."""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, learn_tokenizer, run_captured
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from extras import formats
from extras.tokenizers import JsonTokenizer
from model import ModelArgs, Transformer
from sample import TextGenerator
from tinyllm import checkpoint
from tinyllm.cli import UserError

TEXTS = ["Once upon a time", "", " ", "  two  spaces ", "a\nb\n\n c\t", "Café, 12345 cats 😀 中文", "don't stop"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def vocabulary():
    return learn_tokenizer(["Once upon a time there were two cats. They said: don't stop!\nYes."] * 3, 310)


def make_state(vocabulary, **shape):
    torch.manual_seed(1)
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocabulary.n_words,
                                  max_seq_len=64, **shape))
    return {**checkpoint.model_state(model), "iter_num": 7, "config": {}, "tokenizer": vocabulary.model,
            "tokenizer_sha256": vocabulary.sha256}


def ours(state, ids):
    with torch.no_grad():
        return checkpoint.build_model(state)(ids)


def theirs(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False, "rope_theta": 500000.0, "hidden_dim": 48},
                                   {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_type"}},
                                   {"rope_scaling": {"factor": 2.0}, "norm_eps": 1e-3}])
def test_transformers_reads_our_folders(vocabulary, shape):
    state = make_state(vocabulary, **shape)
    formats.WRITERS["hf"](state, Path("out"))
    ids = torch.arange(40)[None] * 7 % vocabulary.n_words
    torch.testing.assert_close(theirs("out", ids), ours(state, ids), atol=1e-5, rtol=1e-5)
    back = checkpoint.read_model("out")
    assert all(torch.equal(back["model"][name], weight) for name, weight in state["model"].items())
    assert ModelArgs(**back["model_args"]).ffn_dim == ModelArgs(**state["model_args"]).ffn_dim
    assert back["tokenizer_sha256"] == vocabulary.sha256


def test_tokenizer_ids_equal_transformers(vocabulary):
    formats.WRITERS["hf"](make_state(vocabulary), Path("out"))
    found = AutoTokenizer.from_pretrained("out")
    for text in TEXTS:
        assert found(text).input_ids == vocabulary.encode(text, bos=True)
        assert found.decode(vocabulary.encode(text), skip_special_tokens=True) == text
    assert (found.bos_token_id, found.eos_token_id) == (vocabulary.bos_id, vocabulary.eos_id)
    Path("out/tokenizer.model").unlink()
    again = checkpoint.build_tokenizer(checkpoint.read_model("out"))
    assert isinstance(again, JsonTokenizer) and again.add_bos
    for text in TEXTS:
        assert again.encode(text, bos=True, eos=True) == vocabulary.encode(text, bos=True, eos=True)
        assert again.decode(vocabulary.encode(text, bos=True, eos=True)) == text


@pytest.fixture
def folder(vocabulary):
    """A tiny Llama with grouped-query attention, written by transformers in three files."""
    torch.manual_seed(2)
    config = LlamaConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=vocabulary.n_words, max_position_embeddings=64,
                         rope_parameters={"rope_theta": 500000.0, **LLAMA3}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained("theirs", max_shard_size="20KB")
    assert len(list(Path("theirs").glob("*.safetensors"))) > 1
    return Path("theirs")


def test_we_read_folders_of_transformers(folder, vocabulary):
    ids = torch.arange(40)[None] * 7 % vocabulary.n_words
    torch.testing.assert_close(ours(checkpoint.read_model(folder), ids), theirs(folder, ids), atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers(folder, vocabulary):
    tokens, targets = torch.arange(80).view(2, 40) * 7 % vocabulary.n_words, torch.arange(80).view(2, 40) % 50
    state, model = checkpoint.read_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = checkpoint.build_model(state)
    own(tokens, targets).backward()
    torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    found = dict(own.named_parameters())
    names = {"layers.1.feed_forward.w2.weight": "model.layers.1.mlp.down_proj.weight",
             "layers.0.attention.wv.weight": "model.layers.0.self_attn.v_proj.weight",
             "tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for name, theirs_name in names.items():
        torch.testing.assert_close(found[name].grad, model.get_parameter(theirs_name).grad, atol=1e-6, rtol=1e-4)
    grad = model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad
    turned = formats.huggingface.hf_to_meta_rope(grad, state["model_args"])
    torch.testing.assert_close(found["layers.0.attention.wq.weight"].grad, turned, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("change, part", [
    ({"attention_bias": True}, "attention_bias True"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"head_dim": 16}, "head_dim 16"), ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "yarn"),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"), ({"num_hidden_layers": 3}, "lacks 9 tensors"),
    ({"num_hidden_layers": 1}, "unknown tensors"), ({"quantization_config": {"bits": 4}}, "quantization_config")])
def test_unsupported_values_are_named(folder, change, part):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UserError, match=part):
        checkpoint.read_model(folder)


def test_damaged_folders_are_user_errors(folder):
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text(encoding="utf-8"))
    last = folder / sorted(set(names["weight_map"].values()))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_model(folder)
    last.unlink()
    with pytest.raises(UserError, match=f"has no {last.name}"):
        checkpoint.read_model(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match="has no ../../secret"):
        checkpoint.read_model(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="config.json is damaged"):
        checkpoint.read_model(folder)


def test_half_precision_is_kept(vocabulary):
    state = make_state(vocabulary)
    state["model"] = {name: weight.bfloat16() for name, weight in state["model"].items()}
    formats.WRITERS["hf"](state, Path("out"))
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads(Path("out/config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert checkpoint.read_model("out")["model"]["norm.weight"].dtype == torch.bfloat16
    assert checkpoint.build_model(checkpoint.read_model("out")).norm.weight.dtype == torch.float32


def test_tied_output_layer_is_optional_in_the_file(vocabulary):
    formats.WRITERS["hf"](make_state(vocabulary), Path("out"))
    tensors = load_file("out/model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, "out/model.safetensors")
    assert checkpoint.read_model("out")["model_args"]["tie_embeddings"]


def test_a_model_without_bos_and_eos_writes_and_scores(vocabulary):
    """Folders without a tokenizer_config.json do not name bos and eos."""
    formats.WRITERS["hf"](make_state(vocabulary), Path("out"))
    for name in ("tokenizer_config.json", "tokenizer.model"):
        Path("out", name).unlink()
    assert_user_error(run_captured("sample", "--checkpoint", "out"), "error: this tokenizer has no bos")
    assert run_captured("sample", "--checkpoint", "out", "--prompt", "Once", "--max_new_tokens", 3).returncode == 0
    Path("a.txt").write_text("Once upon a time", encoding="utf-8")
    result, generator = run_captured("sample", "--checkpoint", "out", "--score", "a.txt"), TextGenerator("out")
    ids = vocabulary.encode("Once upon a time")
    assert generator.tokenizer.encode("Once upon a time") == ids and generator.tokenizer.bos_id == -1
    nats = -sum(token.logprob for token in generator.read(ids))
    size = len("Once upon a time") - len(vocabulary.decode(ids[:1]))
    assert result.stdout.startswith(f"{len(ids) - 1} tokens, {size} bytes: loss {nats / (len(ids) - 1):.4f}  ")
    assert f"bits per byte {nats / math.log(2) / size:.4f}\n" in result.stdout
    Path("a.txt").write_text(vocabulary.decode(ids[:1]), encoding="utf-8")
    assert_user_error(run_captured("sample", "--checkpoint", "out", "--score", "a.txt"), "the text is one token")


def test_single_token_without_bos_is_not_scored(vocabulary):
    formats.WRITERS["hf"](make_state(vocabulary), Path("out"))
    Path("out", "tokenizer.model").unlink()
    path = Path("out", "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8")) | {"bos_token": None, "add_bos_token": False}
    path.write_text(json.dumps(config), encoding="utf-8")
    found = TextGenerator("out").tokenizer
    assert found.bos_id < 0 <= found.eos_id
    Path("a.txt").write_text(vocabulary.decode(vocabulary.encode("the")[:1]), encoding="utf-8")
    assert_user_error(run_captured("sample", "--checkpoint", "out", "--score", "a.txt"), "the text is one token")


def test_chat_template_detection(vocabulary):
    formats.WRITERS["hf"](make_state(vocabulary) | {"chat": "alpaca"}, Path("other"))      # is nothing to write
    assert not checkpoint.read_model("other")["chat"]
    formats.WRITERS["hf"](make_state(vocabulary) | {"chat": "chatml"}, Path("out"))
    assert checkpoint.read_model("out")["chat"] == "chatml"
    found = AutoTokenizer.from_pretrained("out")
    found = found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert found == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
