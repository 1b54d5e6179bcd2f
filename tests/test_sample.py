"""Step 4: what a user sees, from Python and from the command line."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
import tokenizer
from conftest import ROOT, TINY, assert_user_error, script
from model import ModelArgs, Transformer
from sample import TextGenerator
from settings import UserError


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory) -> Path:
    """A checkpoint of a few steps, as train.py writes it."""
    out = tmp_path_factory.mktemp("out")
    result = script("train", "--data_dir", project, "--out_dir", out, *TINY, "--max_iters", 30, "--learning_rate", 0.02)
    assert result.returncode == 0, result.stderr
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> Path:
    """A checkpoint whose vocabulary knows no Chinese, so that it must spell it in bytes."""
    torch.manual_seed(0)
    vocabulary = tokenizer.train(lambda: ["abc"], 300)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=vocabulary.n_words))
    path = tmp_path_factory.mktemp("bytes") / "ckpt.pt"
    checkpoint.save(path, {**checkpoint.model_state(model), "iter_num": 0, "config": {}, "tokenizer": vocabulary.model,
                           "tokenizer_sha256": vocabulary.sha256})
    return path


def test_samples_are_texts_that_begin_with_the_prompt(trained):
    generator = TextGenerator(trained)
    texts = generator.sample("Once upon a time", num_samples=3, max_new_tokens=40)
    assert len(texts) == 3 and all(text.startswith("Once upon a time") for text in texts) and len(set(texts)) == 3
    assert generator.sample("Once upon a time", 3, 40) == texts         # the same seed, in the same process
    assert TextGenerator(trained).sample("Once upon a time", 3, 40) == texts
    assert TextGenerator(trained, seed=5).sample("Once upon a time", 3, 40) != texts
    assert generator.sample("Once upon a time", 1, 40) == texts[:1]     # alone as in company


def test_greedy_needs_no_seed(trained):
    generator = TextGenerator(trained)
    assert generator.sample("The", 2, 20, 0, seed=1) == generator.sample("The", 2, 20, temperature=0, seed=2)
    assert len(set(generator.sample("The", 2, 20, 0))) == 1
    assert generator.sample("The", 1, 20, 0) == generator.sample("The", 1, 20, 1.0, top_k=1)


def test_the_stream_is_the_sample_in_whole_characters(bytewise):
    generator = TextGenerator(bytewise)
    want = generator.sample("你好", 3, 120, 1.5, top_k=0)
    pieces = list(generator.stream("你好", 3, 120, 1.5, top_k=0))
    for row in range(3):
        mine = [piece for number, piece in pieces if number == row]
        assert "".join(mine) == want[row] and all(mine) and mine[0] == "你好"


def test_a_character_of_several_tokens_comes_whole(bytewise, monkeypatch):
    generator = TextGenerator(bytewise)
    ids = generator.tokenizer.encode("好😀!")[1:]       # without the space in front
    assert len(ids) == 3 + 4 + 1
    monkeypatch.setattr(sample.engine, "generate", lambda *a, **k: iter([[token] for token in ids]))
    assert [piece for _, piece in generator.stream("x", 1, 9)] == ["x", "好", "😀", "!"]
    monkeypatch.setattr(sample.engine, "generate", lambda *a, **k: iter([[token] for token in ids[:2]]))
    assert "".join(piece for _, piece in generator.stream("x", 1, 9)) == "x\ufffd\ufffd"


def test_stories_end_where_the_model_ends_them(trained, monkeypatch):
    generator = TextGenerator(trained)
    eos = generator.tokenizer.eos_id
    monkeypatch.setattr(generator.model, "forward", lambda tokens, **k: 99.0 * (
        torch.nn.functional.one_hot(torch.full((len(tokens), 1), eos), generator.tokenizer.n_words)))
    assert generator.sample("Once upon", 2, 50) == ["Once upon"] * 2


def test_longer_than_the_window(trained):
    text = TextGenerator(trained).sample("Once", 1, 100, temperature=0)[0]
    assert len(text) > 60


@pytest.mark.parametrize("options, message", [
    ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k"), ({"max_new_tokens": -1}, "max_new_tokens")])
def test_settings_out_of_range(trained, options, message):
    with pytest.raises(UserError, match=message):
        TextGenerator(trained).sample("x", **options)


def test_another_vocabulary_is_refused(trained, project):
    other = tokenizer.train(lambda: ["other words"] * 3, 512)
    Path("other.model").write_bytes(other.model)
    with pytest.raises(UserError, match="other.model is not the vocabulary"):
        TextGenerator(trained, "other.model")
    assert TextGenerator(trained, project / "tok512.model").sample("a", 1, 3)


def test_stdout_holds_the_stories_and_nothing_else(trained):
    result = script("sample", "--checkpoint", trained, "--prompt", "One day, Lily met a Shoggoth", "--num_samples", "3",
                    "--max_new_tokens", "20")
    assert result.returncode == 0, result.stderr
    texts = result.stdout.removesuffix("\n").split("\n---\n")
    assert texts == TextGenerator(trained).sample("One day, Lily met a Shoggoth", 3, 20)
    assert "parameters" in result.stderr
    again = script("sample", "--checkpoint", trained, "--prompt=One day, Lily met a Shoggoth", "--num_samples=3",
                   "--max_new_tokens=20")
    assert again.stdout == result.stdout


def test_a_prompt_from_a_file(trained):
    Path("prompt.txt").write_text("Tom — ein Bär\n雨", encoding="utf-8")
    result = script("sample", "--checkpoint", trained, "--prompt", "FILE:prompt.txt", "--max_new_tokens", "5")
    assert result.stdout.startswith("Tom — ein Bär\n雨"), result.stderr
    assert_user_error(script("sample", "--checkpoint", trained, "--prompt", "FILE:nowhere.txt"), "nowhere.txt")


def test_mistakes_are_one_clear_line(trained, tmp_path):
    assert_user_error(script("sample"), "no checkpoint", "python train.py")
    Path("junk.pt").write_bytes(b"junk")
    assert_user_error(script("sample", "--checkpoint", "junk.pt"), "junk.pt", "damaged")
    assert_user_error(script("sample", "--checkpoint", trained, "--temperature", "-1", "--top_p", "2"), "temperature",
                      "top_p")
    assert_user_error(script("sample", "--checkpoint", trained, "--device", "cuda:9"), "cuda:9")
    assert_user_error(script("sample", "--checkpoint", trained, "--tokenizer", "none.model"), "none.model")


def test_a_closed_pipe_ends_quietly(trained):
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(trained), "--max_new_tokens", "5000",
               "--temperature", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    process.stdout.read(10)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and "Exception" not in process.stderr.read()
    process.wait(timeout=60)
