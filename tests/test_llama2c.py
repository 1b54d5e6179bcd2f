"""llama2.c files: round trips of weights and tokenizer, and equal stories by its programs."""
import os
import struct
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import learn_tokenizer, run_captured

import tokenizer
from extras import formats
from extras.formats import llama2c
from extras.formats.common import sentencepiece_model
from model import ModelArgs, Transformer
from sample import TextGenerator
from tinyllm import checkpoint, demo_stories
from tinyllm.cli import UserError
from tokenizer import Tokenizer

STORIES = list(demo_stories.generate_stories(100))
TEXTS = [*STORIES[:20], "", " ", "  a  b ", "\n", " \n\n x\t\ty\r\n", "Lily has 1234567890 dolls.", "😀👍🏽",
         "你好，世界", "é e\u0301", "a\u2581b", "<s></s><unk><0x0A>"]
VERSIONS = {0: "llama2c", 1: "llama2c-v1", 2: "llama2c-int8"}
C_SOURCES = os.environ.get("TINY_LLM_LLAMA2C", "")


@pytest.fixture(scope="module")
def vocabulary():
    return learn_tokenizer(STORIES, 400)


def make_state(vocabulary, **shape):
    torch.manual_seed(1)
    model = Transformer(ModelArgs(**{"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16,
                                     "vocab_size": vocabulary.n_words, **shape}))
    return {**checkpoint.model_state(model), "iter_num": 3, "config": {}, "tokenizer": vocabulary.model,
            "tokenizer_sha256": vocabulary.sha256}


@pytest.fixture
def state(vocabulary):
    return make_state(vocabulary)


def write(state, version, name="story.bin"):
    path = Path(name)
    formats.WRITERS[VERSIONS[version]](state, path)
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_round_trip(vocabulary, version, tied):
    state = make_state(vocabulary, tie_embeddings=tied, dim=48, multiple_of=8, n_heads=6)
    state["model"]["layers.0.attention.wq.weight"][:2] = 0          # a group of zeros has no scale
    found = checkpoint.read_model(write(state, version))
    assert found["model"].keys() == state["model"].keys()
    assert found["model_args"] == {**state["model_args"], "hidden_dim": 128, "multiple_of": 32}
    for name, weight in state["model"].items():
        level = weight.reshape(-1, 16).abs().amax(1, keepdim=True) / 127 if version == 2 and weight.dim() > 1 else 0
        difference = (found["model"][name] - weight).reshape(-1, 16).abs()
        assert (difference <= level * 0.5001).all(), name


@pytest.mark.parametrize("version, header", [(0, 28), (1, 256)])
def test_weights_are_mapped_from_the_file(state, version, header):
    path = write(state, version)
    weights, whole = checkpoint.read_model(path)["model"].values(), path.read_bytes()
    begin = min(weight.data_ptr() for weight in weights) - header
    for weight in weights:
        assert whole[weight.data_ptr() - begin:].startswith(weight.numpy().tobytes())


def test_tokenizer_round_trip(state, vocabulary):
    found = checkpoint.build_tokenizer(checkpoint.read_model(write(state, 0)))
    assert found.is_lossless and found.pieces() == vocabulary.pieces()
    for text in TEXTS:
        ids = found.encode(text)
        assert ids == vocabulary.encode(text) and found.decode(ids) == vocabulary.decode(ids) == text


def test_tokenizer_file_equals_llama2c(vocabulary):
    llama2c.write_tokenizer(vocabulary, Path("tokenizer.bin"))
    content = Path("tokenizer.bin").read_bytes()
    assert content[4:].startswith(b"".join(struct.pack("<fi", 0, len(text)) + text
                                           for text in (b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>", b"<0x01>")))
    assert struct.pack("<fi", vocabulary.pieces()[-1][1], 1) in content and b" the" in content
    assert int.from_bytes(content[:4], "little") == max(len(text.encode().replace(b"\xe2\x96\x81", b" "))
                                                        for text, *_ in vocabulary.pieces()[3:])


def test_tokenizer_beside_the_model_needs_the_right_size(state, vocabulary):
    path, shared = write(state, 0), Path("tokenizer.bin")
    Path("story.tokenizer.bin").rename(shared)
    assert Tokenizer(checkpoint.read_model(path)["tokenizer"]).pieces() == vocabulary.pieces()
    llama2c.write_tokenizer(learn_tokenizer(STORIES, 390), shared)
    state = checkpoint.read_model(path)
    with pytest.raises(UserError, match="--tokenizer"):
        checkpoint.build_tokenizer(state)
    with pytest.raises(UserError, match="390 tokens, but the model's vocab_size is 400"):
        checkpoint.read_model(path, shared)


def test_tokenizer_in_either_format(state, vocabulary):
    path = write(state, 0)
    Path("story.model").write_bytes(vocabulary.model)
    for name in ("story.model", "story.tokenizer.bin"):
        assert checkpoint.build_tokenizer(checkpoint.read_model(path, name)).pieces() == vocabulary.pieces()


@pytest.mark.parametrize("shape, reason", [({"rope_theta": 5e5}, "rope_theta 500000"),
                                           ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
                                           ({"rope_scaling": {"factor": 2.0}}, "rope_scaling")])
def test_models_unsupported_by_run_c_are_refused(vocabulary, shape, reason):
    with pytest.raises(UserError, match=reason):
        write(make_state(vocabulary, **shape), 0)
    assert not Path("story.bin").exists()


def test_tokenizers_unsupported_by_run_c_are_refused(vocabulary):
    pieces = vocabulary.pieces()
    other_order = Tokenizer(sentencepiece_model([*pieces[1:3], pieces[0], *pieces[3:]], bos_id=0, eos_id=1))
    for other in (tokenizer.BaseTokenizer(b"{}"), other_order):
        with pytest.raises(UserError, match="like Llama 2's"):
            llama2c.write_tokenizer(other, Path("tokenizer.bin"))
    assert not Path("tokenizer.bin").exists()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_cut_and_overlong_files_are_refused_with_their_sizes(state, version):
    whole = write(state, version).read_bytes()
    for content in (whole[:-1], whole[:len(whole) // 2], whole + b"\0"):
        Path("bad.bin").write_bytes(content)
        with pytest.raises(UserError, match=f"{len(content):,} bytes.* {len(whole):,}"):
            llama2c.read(Path("bad.bin"))
        with pytest.raises(UserError, match="bad.bin"):
            checkpoint.read_model("bad.bin")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_damaged_headers_are_user_errors(state, version):
    whole = write(state, version).read_bytes()
    for place in range(0 if version == 0 else 4, 41, 1 if version else 4):
        for number in (0, -1, 1, 7, 2**31 - 1, -2**31):
            Path("bad.bin").write_bytes(whole[:place] + struct.pack("<i", number) + whole[place + 4:])
            try:
                llama2c.read(Path("bad.bin"))
            except UserError:
                pass


@pytest.mark.parametrize("content", [b"", b"24ka", b"hello" * 100, bytes(1000), struct.pack("<7i", *[1] * 7)])
def test_other_files_are_refused(content):
    Path("foreign").write_bytes(content)
    assert not llama2c.is_legacy(Path("foreign")) and llama2c.read_tokenizer(Path("foreign")) is None
    with pytest.raises(UserError, match="foreign"):
        checkpoint.read_model("foreign")


@pytest.mark.parametrize("kind", VERSIONS.values())
def test_convert_round_trip(state, run_in_process, kind, capsys):
    checkpoint.save_checkpoint("ckpt.pt", state)
    run_in_process("convert", "ckpt.pt", "out/story.bin", "--to", kind)
    assert sorted(os.listdir("out")) == ["story.bin", "story.tokenizer.bin"]
    run_in_process("convert", "out/story.bin", "back.pt")
    assert checkpoint.build_tokenizer(checkpoint.load_checkpoint("back.pt")).is_lossless
    assert "wrote out/story.bin and out/story.tokenizer.bin" in capsys.readouterr().out.replace("\\", "/")


@pytest.mark.parametrize("there", ["story.bin", "story.tokenizer.bin"])
def test_convert_keeps_both_files_unless_forced(state, run_in_process, there):
    checkpoint.save_checkpoint("ckpt.pt", state)
    Path(there).write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=f"{there} exists already"):
        run_in_process("convert", "ckpt.pt", "story.bin")
    assert Path(there).read_text(encoding="utf-8") == "precious" and sorted(os.listdir()) == ["ckpt.pt", there]
    run_in_process("convert", "ckpt.pt", "story.bin", "--force")
    assert sorted(os.listdir()) == ["ckpt.pt", "story.bin", "story.tokenizer.bin"]
    assert checkpoint.read_model("story.bin")["tokenizer"]


def test_a_failed_conversion_leaves_nothing(state, run_in_process):
    checkpoint.save_checkpoint("ckpt.pt", {**state, "model_args": {**state["model_args"], "norm_eps": 1e-6}})
    with pytest.raises(UserError, match="norm_eps"):
        run_in_process("convert", "ckpt.pt", "story.bin")
    assert os.listdir() == ["ckpt.pt"]


def test_llama2c_checkpoints_load(vocabulary):
    """Checkpoints of its train.py, and of older versions with extra entries in the state_dict."""
    state = make_state(vocabulary, n_kv_heads=4)
    names = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len", "dropout")
    args = {name: state["model_args"][name] for name in names} | {"n_kv_heads": None, "hidden_dim": None}
    weights = {f"_orig_mod.{name}": weight for name, weight in state["model"].items()}
    constants = {f"_orig_mod.{name}": torch.ones(1) for name in ("layers.0.attention.mask", "freqs_cos", "freqs_sin")}
    torch.save({"model": weights | constants, "optimizer": {"state": {}, "param_groups": []}, "model_args": args,
                "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"out_dir": "out"}}, "ckpt.pt")
    llama2c.write_tokenizer(vocabulary, Path("tokenizer.bin"))
    found = checkpoint.read_model("ckpt.pt", "tokenizer.bin")
    assert found["model_args"] == asdict(ModelArgs(**{**state["model_args"], "n_kv_heads": 4}))
    assert all(torch.equal(found["model"][name], weight) for name, weight in state["model"].items())
    done = run_captured("sample", "--checkpoint", "ckpt.pt", "--tokenizer", "tokenizer.bin", "--max_new_tokens", 3,
                        "--device", "cpu")
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.fixture(scope="module")
def storyteller(vocabulary):
    """A model that memorized a story, so that rounding does not change its output."""
    state = make_state(vocabulary, dim=64, max_seq_len=96)
    model = checkpoint.build_model(state)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    ids = torch.tensor([[1, *vocabulary.encode(STORIES[0])[:80], 2, 1]])
    for _ in range(80):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**state, **checkpoint.model_state(model)}


@pytest.mark.skipif(not C_SOURCES, reason="TINY_LLM_LLAMA2C names no folder with llama2.c's run.c and runq.c")
@pytest.mark.parametrize("program, version", [("run", 0), ("runq", 2)])
def test_llama2c_programs_generate_the_same_story(storyteller, program, version):
    subprocess.run(["gcc", "-O2", Path(C_SOURCES) / f"{program}.c", "-lm", "-o", program], check=True)
    write(storyteller, version)
    generator = TextGenerator("story.bin", device="cpu", dtype="float32")
    for prompt in ("", STORIES[0][:12], STORIES[0][:30]):
        begun = ["-i", prompt] if prompt else []
        done = subprocess.run([Path(program).resolve(), "story.bin", "-z", "story.tokenizer.bin", "-t", "0", *begun],
                              capture_output=True, check=True, encoding="utf-8")
        story, end = done.stdout.split("\n</s>\n")
        assert [story] == generator.sample(prompt, temperature=0) and len(story) > 100 and not end.strip()
