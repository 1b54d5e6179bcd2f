"""convert.py: targets are complete and verified, and are replaced only with --force."""
import errno
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, learn_tokenizer, run_captured

import convert
from extras import formats
from model import ModelArgs, Transformer
from sample import TextGenerator
from tinyllm import checkpoint
from tinyllm.cli import UserError


@pytest.fixture
def source():
    torch.manual_seed(1)
    vocabulary = learn_tokenizer(["a few words of a story, and of another"], 300)
    model = Transformer(ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocabulary.n_words,
                                  max_seq_len=48))
    checkpoint.save_checkpoint("ckpt.pt", {
        **checkpoint.model_state(model), "iter_num": 7, "config": {}, "chat": "chatml",
                                "tokenizer": vocabulary.model, "tokenizer_sha256": vocabulary.sha256})
    return "ckpt.pt"


@pytest.mark.parametrize("to", [kind for kind in formats.WRITERS if kind != "pt"])
def test_round_trip_generates_the_same_story(source, to):
    result = run_captured("convert", source, "there", "--to", to)
    assert result.returncode == 0 and "largest logit difference" in result.stdout, result.stderr
    assert run_captured("convert", "there", "back.pt").returncode == 0
    how = {"temperature": 0, "max_new_tokens": 30}
    want, found = (TextGenerator(path, dtype="float32").completions(["a story"], **how)[0]
                   for path in (source, "back.pt"))
    exact = to in ("hf", "llama2c", "llama2c-v1", "gguf")
    assert found.tokens == want.tokens if exact else found.tokens[:3] == want.tokens[:3]
    assert torch.tensor(found.logprobs[:3]).sub(torch.tensor(want.logprobs[:3])).abs().max() < (1e-5 if exact else 0.05)


def test_comparison_disables_dropout(source):
    state = checkpoint.load_checkpoint(source)
    checkpoint.save_checkpoint("dropout.pt", {**state, "model_args": {**state["model_args"], "dropout": 0.5}})
    assert run_captured("convert", "dropout.pt", "a.gguf").returncode == 0


def test_target_suffix_selects_the_format(source):
    for name in ("a.gguf", "a.bin", "a", "a.pt"):
        assert run_captured("convert", source, name).returncode == 0
    assert Path("a.gguf").read_bytes()[:4] == b"GGUF" and Path("a/config.json").is_file()
    assert_user_error(run_captured("convert", source, "a.safetensors"), "a.safetensors", "no known format",
                      "llama2c-int8")


@pytest.mark.parametrize("name", ["a.gguf", "a.bin", "a"])
def test_existing_target_needs_force(source, name):
    assert run_captured("convert", source, name).returncode == 0
    there = Path(name) / "model.safetensors" if Path(name).is_dir() else Path(name)
    there.write_bytes(b"mine")
    assert_user_error(run_captured("convert", source, name), f"{name} exists already", "--force")
    assert there.read_bytes() == b"mine"
    assert run_captured("convert", source, name, "--force").returncode == 0 and there.read_bytes() != b"mine"


def test_force_keeps_folders(source):
    for name in ("a", "b.gguf"):
        Path(name).mkdir()
        Path(name, "mine").write_text("x", encoding="utf-8")
        assert_user_error(run_captured("convert", source, name, "--force"), f"{name} is a folder")
        assert Path(name, "mine").exists() and not Path(f"{name}.tmp").exists()


@pytest.mark.parametrize("name", ["a.gguf", "a.bin", "a", "a.pt"])
def test_large_difference_discards_the_target(source, name, monkeypatch):
    read = checkpoint.read_model

    def worse(path, *rest):
        state = read(path, *rest)
        if str(path) != source:
            state["model"]["layers.1.feed_forward.w2.weight"] = state["model"]["layers.1.feed_forward.w2.weight"] + 0.01
        return state
    monkeypatch.setattr(checkpoint, "read_model", worse)
    Path(f"{name}.tmp").write_text("mine", encoding="utf-8")        # is nobody's but the user's
    before = set(Path().iterdir())
    assert_user_error(run_captured("convert", source, name), "exceeds the tolerance", "not written")
    assert set(Path().iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of what is mapped into memory")
@pytest.mark.parametrize("name", ["a.gguf", "a.bin", "a", "a.pt"])
def test_target_is_not_mapped_at_rename(source, name, monkeypatch):
    """Windows cannot rename mapped files."""
    real = convert.atomic_replace

    def looks(old, new):
        assert old.parent.name not in Path("/proc/self/maps").read_text(encoding="utf-8")
        real(old, new)
    monkeypatch.setattr(convert, "atomic_replace", looks)
    assert run_captured("convert", source, name).returncode == 0


@pytest.mark.parametrize("name", ["a.gguf", "a"])
def test_kill_before_rename_keeps_the_old_target(source, name, monkeypatch):
    assert run_captured("convert", source, name).returncode == 0
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    real = convert.atomic_replace

    def interrupted(old, new):
        if new == Path(name):
            monkeypatch.setattr(convert, "atomic_replace", real)
            raise KeyboardInterrupt
        real(old, new)
    monkeypatch.setattr(convert, "atomic_replace", interrupted)
    assert run_captured("convert", source, name, "--force").returncode == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("to, error", [("gguf", OSError("12 requested and 5 written")),
                                       ("pt", OSError(errno.ENOSPC, "No space left on device"))])
def test_full_disk_is_a_user_error(source, to, error, monkeypatch):
    def full(*_):
        raise error
    monkeypatch.setitem(formats.WRITERS, to, full)
    before = set(Path().iterdir())
    result = run_captured("convert", source, "target", "--to", to)
    assert_user_error(result, "target cannot be written", "is the disk full?")
    assert set(Path().iterdir()) == before


def test_out_of_memory_is_a_user_error(source, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes.")
    monkeypatch.setattr(convert, "reference_logits", full)
    assert_user_error(run_captured("convert", source, "out.gguf"), "not enough memory", "more memory")


def test_tokenizers_are_compared(source):
    state = checkpoint.read_model(source)
    other = learn_tokenizer(["other words, other ids"], 300)
    with pytest.raises(UserError, match="encodes text differently"):
        convert.compare_tokenizers(state, {**state, "tokenizer": other.model})


def test_more_embeddings_than_entries(source):
    state = checkpoint.load_checkpoint(source)
    entries = state["model_args"]["vocab_size"]
    weight = torch.cat((state["model"]["tok_embeddings.weight"], torch.ones(20, 64)))
    state["model"] |= {"tok_embeddings.weight": weight, "output.weight": weight}
    state["model_args"]["vocab_size"] = entries + 20
    checkpoint.save_checkpoint("padded.pt", state)
    result = run_captured("convert", "padded.pt", "p.bin")
    assert_user_error(result, f"expected {entries + 20}, found {entries}")
    for name in ("p.gguf", "p"):
        assert run_captured("convert", "padded.pt", name).returncode == 0
    generator = TextGenerator("padded.pt")
    assert generator.tokenizer.decode([entries + 5, *generator.tokenizer.encode("a story")]) == "a story"
    assert len(generator.completions(["a"], 30, temperature=5.0, top_k=0)[0].logprobs) > 0


@pytest.mark.parametrize("change", [
    {"num_attention_heads": 0}, {"num_hidden_layers": 10**12}, {"hidden_size": "x"}, {"rms_norm_eps": "x"}, 5, [],
    {"intermediate_size": -1}, {"max_position_embeddings": 10**12}, {"vocab_size": None},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8}}])
def test_damaged_config_is_a_user_error(source, change):
    assert run_captured("convert", source, "a").returncode == 0
    config = json.loads(Path("a/config.json").read_text(encoding="utf-8"))
    content = {**config, **change} if isinstance(change, dict) else change
    Path("a/config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError):
        checkpoint.read_model("a")


@pytest.mark.parametrize("change", [{"model": 5}, {"model": None}, {"model_args": None}, {"tokenizer": "/etc/passwd"}])
def test_damaged_checkpoint_is_a_user_error(source, change):
    checkpoint.save_checkpoint("bad.pt", checkpoint.load_checkpoint(source) | change)
    with pytest.raises(UserError):
        checkpoint.build_tokenizer(checkpoint.read_model("bad.pt"))


def test_reference_logits_equal_the_model(source):
    state = checkpoint.read_model(source)
    ids = torch.arange(48) * 7919 % state["model_args"]["vocab_size"]
    with torch.no_grad():
        want = checkpoint.build_model(state)(ids[None])
    torch.testing.assert_close(convert.reference_logits(state), want)
    half = {**state, "model": {name: weight.bfloat16() for name, weight in state["model"].items()}}
    found = convert.reference_logits(half)
    assert found.dtype == torch.float32 and 0 < (found - want).abs().max() < 0.1
    assert {weight.dtype for weight in half["model"].values()} == {torch.bfloat16}
    with pytest.raises(UserError):
        convert.compare_logits(want, want * float("nan"), "gguf")


def test_errors(source):
    assert_user_error(run_captured("convert"), "expected a source and a target", "python convert.py")
    assert_user_error(run_captured("convert", "nowhere.pt", "a.gguf"), "no checkpoint at")
    Path("output/mine").mkdir(parents=True)
    Path("output/mine/ckpt.pt").touch()
    found = str(Path("output/mine/ckpt.pt"))
    assert_user_error(run_captured("convert", "outptu/ckpt.pt", "a.gguf"), f"choose from {found}")
    assert_user_error(run_captured("convert", "output/mine", "a.gguf"), f"the model is {found}")
    assert_user_error(run_captured("convert", source, "a.gguf", "--to", "onnx"), "--to onnx", "gguf-f16")
    assert_user_error(run_captured("convert", source, "a.gguf", "more"), "more")
    Path("tok300.model").write_bytes(b"pieces")
    assert_user_error(run_captured("convert", "tok300.model", "a.gguf"), "tok300.model is a tokenizer", "ckpt.pt")
    Path("empty").mkdir()
    assert_user_error(run_captured("convert", "empty", "a.pt"), "config.json", "params.json")
    assert not Path("a.gguf").exists() and not list(Path().glob("*.tmp"))


def test_fine_tuning_keeps_the_model_vocabulary(source, run_in_process, tmp_path):
    """Step 2 takes the vocabulary from the model, and step 3 starts from its weights."""
    stories = [json.dumps({"story": f"a story of {n} words and another"}) for n in range(400)]
    Path("s.jsonl").write_text("\n".join(stories), encoding="utf-8")
    run_in_process("convert", source, "theirs")
    run_in_process("preprocess", "--tokenizer", "theirs", "--data", "s.jsonl", "--data_dir", "tuned")
    run_in_process("train", "--data_dir", "tuned", "--init_from", "theirs", "--out_dir", "out", "--max_iters", 3,
                   "--eval_interval", 3, "--batch_size", 4, "--learning_rate", 1e-3, "--sample_tokens", 0,
                   "--device", "cpu",
                   "--compile", "False", "--max_seq_len", 32)
    with pytest.raises(UserError, match="has dim 64, which cannot change\n.*remove"):
        run_in_process("train", "--data_dir", "tuned", "--init_from", "theirs", "--out_dir", "new", "--dim", 32)
    tuned = checkpoint.load_checkpoint("out/last.pt")
    assert tuned["iter_num"] == 3 and (tuned["model_args"]["dim"], tuned["model_args"]["max_seq_len"]) == (64, 32)
    assert tuned["tokenizer_sha256"] == checkpoint.read_model(source)["tokenizer_sha256"] and tuned["chat"] == "chatml"


def test_weights_without_a_name_elsewhere_are_listed(source, monkeypatch):
    """An edited model.py may have other weights; only a checkpoint stores them."""
    state = checkpoint.load_checkpoint(source)
    monkeypatch.setattr(convert.kernels, "model_is_original", lambda: False)
    monkeypatch.setattr(convert.checkpoint, "read_model", lambda *_: {**state, "model": {**state["model"], "gain": 1}})
    assert_user_error(run_captured("convert", source, "a.gguf"), "unknown tensors: gain")
    kept = {name: weight for name, weight in state["model"].items() if "w3" not in name}
    monkeypatch.setattr(convert.checkpoint, "read_model", lambda *_: {**state, "model": kept})
    assert_user_error(run_captured("convert", source, "a"), "lacks 2 tensors: layers.0.feed_forward.w3.weight")
