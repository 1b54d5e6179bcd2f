"""Step 4, from Python and from the command line."""
import ast
import inspect
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, learn_tokenizer, run_captured, run_subprocess, start_script

import sample
from sample import Completion, TextGenerator
from tinyllm import checkpoint, shards
from tinyllm.cli import UserError
from tinyllm.engine import DecodeStep, Engine
from tinyllm.files import file_lock


def fake_engine(monkeypatch, generator, *rows):
    """Make the engine yield these tokens, one list for each text."""
    size = generator.tokenizer.vocab_size
    steps = [DecodeStep([row[i] if i < len(row) else None for row in rows],
                        torch.zeros(len(rows), size), [0.0] * len(rows))
             for i in range(max(map(len, rows)))]
    monkeypatch.setattr(generator.engine, "generate", lambda *args, **options: iter(steps))


def test_samples_start_with_the_prompt(ckpt):
    generator = TextGenerator(ckpt)
    texts = generator.sample("Once upon a time", num_samples=3, max_new_tokens=40)
    assert len(texts) == 3 and all(text.startswith("Once upon a time") for text in texts) and len(set(texts)) == 3
    assert generator.sample("Once upon a time", 3, 40) == texts         # the same seed, in the same process
    assert TextGenerator(ckpt).sample("Once upon a time", 3, 40) == texts
    assert TextGenerator(ckpt, seed=5).sample("Once upon a time", 3, 40) != texts
    assert generator.sample("Once upon a time", 1, 40) == texts[:1]     # alone as in company


def test_settings_block_defines_all_defaults():
    """tinyllm/generator.py has no defaults, and every default of the subclass is the setting of that name."""
    old_names = {"start": "prompt", "tokenizer_model_path": "tokenizer"}
    for method in ("__init__", "sample", "stream", "generate"):
        defaults = {name: parameter.default for name, parameter
                    in inspect.signature(getattr(TextGenerator, method)).parameters.items()
                    if parameter.default is not parameter.empty and name != "tp_group"}
        assert defaults == {name: getattr(sample, old_names.get(name, name)) for name in defaults} and defaults
    base = inspect.signature(TextGenerator.__base__.generate).parameters
    assert base["temperature"].default is inspect.Parameter.empty


def test_grow_is_an_alias_of_generate(ckpt):
    generator = TextGenerator(ckpt)
    tokenizer = generator.tokenizer
    prompt_ids = [tokenizer.encode_prompt("The dog"), tokenizer.encode_prompt("A cat")]
    free = generator.completions(["The dog", "A cat"], 12, 0)
    stop_id = free[0].tokens[4]
    ended = [Completion("The dog"), Completion("A cat")]
    for _ in generator.generate(ended, 12, 0, prompt_ids=prompt_ids, stop_ids=[stop_id]):
        pass
    assert len(ended[0].tokens) < 5 and ended[0].stop_reason == "eos"
    grown = [Completion(""), Completion("")]
    for _ in generator.grow(grown, 12, 0, heads=prompt_ids, ends=[stop_id]):
        pass
    assert [completion.tokens for completion in grown] == [completion.tokens for completion in ended]


def test_greedy_needs_no_seed(ckpt):
    generator = TextGenerator(ckpt)
    assert generator.sample("The", 2, 20, 0, seed=1) == generator.sample("The", 2, 20, temperature=0, seed=2)
    assert len(set(generator.sample("The", 2, 20, 0))) == 1
    assert generator.sample("The", 1, 20, 0) == generator.sample("The", 1, 20, 1.0, top_k=1)


def test_stream_yields_whole_characters(byte_checkpoint):
    generator = TextGenerator(byte_checkpoint)
    want = generator.sample("你好", 3, 120, 1.5, top_k=0)
    done = [Completion("你好") for _ in range(3)]
    pieces = list(generator.generate(done, 120, 1.5, top_k=0))
    for row in range(3):
        mine = [piece for number, piece in pieces if number == row]
        assert "你好" + "".join(mine) == want[row] and all(mine) and "".join(mine) == done[row].text
    streamed = list(generator.stream("你好", 120, 1.5, top_k=0))
    assert "".join(streamed) == want[0] and all(streamed) and streamed[0] == "你好"


def test_characters_of_several_tokens_are_whole(byte_checkpoint, monkeypatch):
    generator = TextGenerator(byte_checkpoint)
    ids = generator.tokenizer.encode("好😀!")[1:]       # without the space in front
    assert len(ids) == 3 + 4 + 1
    fake_engine(monkeypatch, generator, ids)
    assert list(generator.stream("x", 9)) == ["x", "好", "😀", "!"]
    fake_engine(monkeypatch, generator, ids[:2])
    assert "".join(generator.stream("x", 9)) == "x\ufffd\ufffd"


def test_stories_end_at_eos(ckpt, monkeypatch):
    generator = TextGenerator(ckpt)
    eos = torch.tensor(generator.tokenizer.eos_id)
    monkeypatch.setattr(generator.engine, "output", lambda x: 99.0 * (
        torch.nn.functional.one_hot(eos.expand(len(x)), generator.tokenizer.vocab_size)))
    assert generator.sample("Once upon", 2, 50) == ["Once upon"] * 2
    assert [one.stop_reason for one in generator.completions(["a", "b"])] == ["eos"] * 2


def test_stop_text_is_not_shown(byte_checkpoint, monkeypatch):
    """Includes stop texts of several tokens and partial matches."""
    generator = TextGenerator(byte_checkpoint)
    ids = generator.tokenizer.encode("a cab ca. cat b")
    assert len(ids) > 6
    for stop, text in [
            (["cat"], "a cab ca. "), (["ca"], "a "), (["b c", "zz"], "a ca"), (["cat b", "t b"], "a cab ca. "),
            (["dog"], "a cab ca. cat b"), (["", "cat bb"], "a cab ca. cat b"), ([], "a cab ca. cat b")]:
        fake_engine(monkeypatch, generator, ids)
        one, = generator.completions(["x"], 99, stop=stop)
        assert (one.text, one.stop_reason) == (" " + text, "stop" if len(text) < 15 else "eos"), stop
        fake_engine(monkeypatch, generator, ids)
        pieces = list(generator.stream("", 99, stop=stop))
        assert "".join(pieces) == text and not any("cat" in piece for piece in pieces[1:-1])


@torch.no_grad()
def test_completions(ckpt):
    generator = TextGenerator(ckpt, dtype="float32")
    prompts = ["Once upon a time", "", "The dog and the cat went out to play. They"]
    done = generator.completions(prompts, 12, temperature=1.0)
    model = checkpoint.build_model(checkpoint.load_checkpoint(ckpt))
    for one, prompt in zip(done, prompts, strict=True):
        head = generator.tokenizer.encode(prompt, bos=True)
        assert one.prompt == prompt and (one.stop_reason == "length") == (len(one.tokens) == 12)
        assert generator.tokenizer.decode(head + one.tokens) == prompt + one.text
        logprobs = model(torch.tensor([head + one.tokens]))[0].log_softmax(-1)
        for place, (token, found) in enumerate(zip(one.tokens, one.logprobs, strict=True), len(head) - 1):
            assert found == pytest.approx(logprobs[place, token].item(), abs=1e-4)
    assert generator.completions([]) == [] and generator.completions(["The"], stop="e")[0].text.count("e") == 0
    assert generator.completions(prompts[1:2], 12, temperature=1.0, rows=[1])[0].tokens == done[1].tokens


def test_score_equals_evaluation(ckpt, project):
    """Compare over the full val split, document by document."""
    state = checkpoint.load_checkpoint(ckpt)
    vocabulary = checkpoint.build_tokenizer(state)
    data = shards.load_shards(project / "tok512", vocabulary.sha256)
    generator, nats, tokens = TextGenerator(ckpt, dtype="float32"), 0.0, 0
    for shard in data.shards_of("val"):
        ids = data.memmap(shard).tolist()
        begins = [at for at, id in enumerate(ids) if id == vocabulary.bos_id]
        for begin, end in zip(begins, [*begins[1:], len(ids)]):
            found = generator.read(ids[begin:end])
            nats, tokens = nats - sum(token.logprob for token in found), tokens + len(found)
    assert nats / tokens == pytest.approx(json.loads((ckpt.parent / "log.jsonl").read_text(
        encoding="utf-8").splitlines()[-1])["val_loss"], rel=0.01)


def test_a_score_from_the_command_line(ckpt):
    Path("story.txt").write_text("The dog and the cat went out — to play.", encoding="utf-8")
    result = run_captured("sample", "--checkpoint", ckpt, "--score", "story.txt")
    tokens = TextGenerator(ckpt).read(TextGenerator(ckpt).tokenizer.encode(
        "The dog and the cat went out — to play.", bos=True, eos=True))
    loss = -sum(token.logprob for token in tokens) / len(tokens)
    assert result.stdout.startswith(f"{len(tokens)} tokens, 41 bytes: loss {loss:.4f}  "), result.stderr
    assert f"bits per byte {loss * len(tokens) / math.log(2) / 41:.4f}" in result.stdout
    worst = min(tokens, key=lambda token: token.logprob)
    assert result.stdout.splitlines()[2].strip().startswith(f"{worst.logprob:.3f}")


def test_tokens_are_listed_with_their_probability(ckpt):
    plain = run_captured("sample", "--checkpoint", ckpt, "--prompt", "The dog", "--max_new_tokens", "6")
    listed = run_captured("sample", "--checkpoint", ckpt, "--prompt", "The dog", "--max_new_tokens", "6", "--logprobs")
    pieces = [ast.literal_eval(line.split("  ")[-1]) for line in listed.stdout.splitlines()]
    assert "".join(pieces).replace("\u2581", " ").strip() == plain.stdout.strip()
    shown = run_captured("sample", "--checkpoint", ckpt, "--prompt", "The dog", "--max_new_tokens", "6", "--show_probs",
                   "--no_echo").stdout.splitlines()
    assert shown[0] == plain.stdout.rstrip("\n").removeprefix("The dog") and "likeliest:" in shown[1]
    assert len(shown) == 1 + len(TextGenerator(ckpt).completions(["The dog"], 6)[0].tokens)


def test_story_format(ckpt):
    command = ["sample", "--checkpoint", ckpt, "--prompt", "The dog", "--max_new_tokens", "20", "--num_samples", "2"]
    plain = run_captured(*command).stdout
    assert run_captured(*command, "--stream", "False").stdout == plain
    assert run_captured(*command, "--echo", "False").stdout == plain.replace("The dog", "")
    assert run_captured(*command, "--quantize", "int8").stdout.count("The dog") == 2


def test_output_file_keeps_any_language_readable(ckpt):
    prompts = ["从前，", "line\u2028separator\x85"]
    Path("in.txt").write_text("\n".join(prompts), encoding="utf-8")
    for _ in range(2):                      # the second run has nothing to do
        result = run_captured("sample", "--checkpoint", ckpt, "--input_file", "in.txt", "--output_file", "out.jsonl",
                              "--max_new_tokens", 3)
        assert result.returncode == 0, result.stderr
    text = Path("out.jsonl").read_text(encoding="utf-8")
    assert "从前，" in text and [json.loads(line)["prompt"] for line in text.splitlines()] == prompts


def test_score_strips_white_space(ckpt):
    """White space around the text is stripped, and characters of several tokens are shown whole."""
    for name, text in ("a.txt", "Once 天 upon"), ("b.txt", "\n Once 天 upon\n"):
        Path(name).write_text(text, encoding="utf-8")
    one, two = (run_captured("sample", "--checkpoint", ckpt, "--score", name).stdout for name in ("a.txt", "b.txt"))
    assert one == two and "天" in one


PROMPTS = ["The dog", "", "Once upon a time there was", "A cat", "Tom ☃ and\u2028Mia"]


@pytest.fixture
def input_file_command(ckpt):
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return ["sample", "--checkpoint", ckpt, "--input_file", "prompts.txt", "--max_new_tokens", "9", "--batch_size", "2"]


@pytest.fixture
def output_file_command(input_file_command):
    return [*input_file_command, "--output_file", "out.jsonl"]


def test_each_line_of_an_input_file_becomes_a_record(ckpt, output_file_command):
    assert run_captured(*output_file_command).returncode == 0
    records = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [record["prompt"] for record in records] == PROMPTS
    assert set(records[0]) == {"prompt", "text", "tokens", "logprobs", "stop_reason"}
    alone = TextGenerator(ckpt).completions(["A cat"], 9, rows=[3])[0]
    assert records[3]["text"] == alone.text and records[3]["tokens"] == alone.tokens


def test_without_an_output_file_the_texts_are_printed(ckpt, input_file_command):
    completions = TextGenerator(ckpt).completions(PROMPTS, 9)
    printed = run_captured(*input_file_command).stdout.removesuffix("\n").split("\n---\n")
    assert printed == [completion.prompt + completion.text for completion in completions]


def test_an_interrupted_output_file_is_completed(output_file_command):
    assert run_captured(*output_file_command).returncode == 0
    content = Path("out.jsonl").read_bytes()
    for size in (0, 10, content.index(b"\n") + 30, len(content)):
        Path("out.jsonl").write_bytes(content[:size])
        assert run_captured(*output_file_command).returncode == 0 and Path("out.jsonl").read_bytes() == content


@pytest.mark.parametrize("content, message", [
    ("my notes, on one line", "other prompts"), ("my notes\n", "not written by this command"),
    ('{"prompt": "Another"}\n', "other prompts")])
def test_unrelated_output_file_is_refused(output_file_command, content, message):
    Path("out.jsonl").write_text(content, encoding="utf-8")
    assert_user_error(run_captured(*output_file_command), "out.jsonl", message)
    assert Path("out.jsonl").read_text(encoding="utf-8") == content


def test_an_empty_input_file_is_refused(output_file_command):
    Path("prompts.txt").write_text("", encoding="utf-8")
    assert_user_error(run_captured(*output_file_command), "prompts.txt is empty")
    assert not Path("out.jsonl").exists()


def test_an_output_file_is_locked(output_file_command):
    with file_lock(Path("out.jsonl")):
        assert_user_error(run_captured(*output_file_command), "another process is writing to", "out.jsonl")


def test_interactive(ckpt, monkeypatch):
    """The second answer continues the dialogue; /clear starts over; errors do not end the session."""
    lines = ["/set temperature 0", "/set top_p 7", "The dog", "/set top_p 1", "/set nothing 3", "/set top_k x",
             "The dog", " and", "", "/clear", "The dog", "/what", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8"))
    result = run_captured("sample", "--checkpoint", ckpt, "--interactive", "--max_new_tokens", "8", "--device", "cpu")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    generator = TextGenerator(ckpt)
    first = generator.sample("The dog", 1, 8, temperature=0)[0]
    second = generator.sample(first + " The dog", 1, 8, temperature=0)[0]
    third = generator.sample(second + " and", 1, 8, temperature=0)[0]
    fourth = generator.sample(third, 1, 8, temperature=0)[0]                # an empty line only asks for more
    assert ">>> " + third.removeprefix(second + " and") + "\n>>> " + fourth.removeprefix(third) + "\n" in result.stdout
    assert ">>> " + first.removeprefix("The dog") + "\n" in result.stdout
    assert "top_p must be" in result.stderr and "top_k cannot be 'x'" in result.stderr
    assert "temperature = 0.0" in result.stdout and "/clear   " in result.stdout


def test_invalid_line_does_not_end_interactive_mode(ckpt, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"/set temperature 0\na\xff\nThe dog\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    result = run_captured("sample", "--checkpoint", ckpt, "--interactive", "--max_new_tokens", "8", "--device", "cpu")
    assert result.returncode == 0 and "not UTF-8" in result.stderr, result.stderr
    assert TextGenerator(ckpt).sample("The dog", 1, 8, temperature=0)[0].removeprefix("The dog") in result.stdout


@pytest.mark.parametrize("options, advice", [
    (["--num_samples", 5], "--num_samples 2"), ([], "smaller model, .*--max_new_tokens.*--device cpu.*"),
    (["--input_file", "prompts.txt", "--batch_size", 8], "--batch_size 4"),
    (["--score", "prompts.txt"], "smaller model, or --device cpu.*")])
def test_out_of_memory_names_a_smaller_batch(ckpt, monkeypatch, run_in_process, options, advice):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(Engine, "_run_layers", full)
    Path("prompts.txt").write_text("One day\nOnce", encoding="utf-8")
    with pytest.raises(UserError, match=f"not enough memory\n       .*{advice}$"):
        run_in_process("sample", "--checkpoint", ckpt, *options)


def test_empty_list_does_not_run_the_engine(ckpt, monkeypatch):
    """/set validates a value this way, which must not compile anything."""
    generator = TextGenerator(ckpt)
    monkeypatch.setattr(generator.engine, "generate", lambda *args: pytest.fail("asked"))
    assert generator.completions([]) == []
    with pytest.raises(UserError, match="top_p"):
        generator.completions([], top_p=7)


def test_full_context_is_reported_once(byte_checkpoint, capsys, monkeypatch):
    generator = TextGenerator(byte_checkpoint)
    for count, notes in ((256, 0), (257, 1), (270, 0)):             # the last token is not read any more
        fake_engine(monkeypatch, generator, [97] * count)
        assert len(generator.completions([""], 300)[0].tokens) == count
        assert capsys.readouterr().err.count("note: the context is 256 tokens") == notes


def test_invalid_text_is_refused(ckpt):
    generator = TextGenerator(ckpt)
    with pytest.raises(UserError, match="not UTF-8"):
        generator.completions(["fine", "\ud800"])
    with pytest.raises(TypeError, match="list of texts"):
        generator.completions("cat")
    with pytest.raises(ValueError, match="1 sample_ids for 2 completions"):
        generator.completions(["a", "b"], rows=[0])


@pytest.mark.parametrize("options, message", [
    ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k"), ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"min_p": 1.1}, "min_p"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"num_samples": 0}, "num_samples")])
def test_out_of_range_settings_are_refused(ckpt, options, message):
    with pytest.raises(UserError, match=message):
        TextGenerator(ckpt).sample("x", **options)


def test_another_vocabulary_is_refused(ckpt, project):
    other = learn_tokenizer(["other words"] * 3, 512)
    Path("other.model").write_bytes(other.model)
    with pytest.raises(UserError, match="other.model is not the tokenizer"):
        TextGenerator(ckpt, "other.model")
    assert TextGenerator(ckpt, project / "tok512.model").sample("a", 1, 3)


def test_stdout_holds_only_stories(ckpt):
    result = run_subprocess("sample", "--checkpoint", ckpt, "--prompt", "One day, Lily met a Shoggoth",
                            "--num_samples", "3", "--max_new_tokens", "20", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    texts = result.stdout.removesuffix("\n").split("\n---\n")
    assert texts == TextGenerator(ckpt).sample("One day, Lily met a Shoggoth", 3, 20)
    assert "parameters" in result.stderr
    again = run_captured("sample", "--checkpoint", ckpt, "--prompt=One day, Lily met a Shoggoth", "--num_samples=3",
                         "--max_new_tokens=20", "--device=cpu")
    assert again.stdout == result.stdout


def test_a_prompt_from_a_file(ckpt):
    Path("prompt.txt").write_text("Tom — ein Bär\n雨", encoding="utf-8")
    result = run_captured("sample", "--checkpoint", ckpt, "--prompt", "FILE:prompt.txt", "--max_new_tokens", "5")
    assert result.stdout.startswith("Tom — ein Bär\n雨"), result.stderr
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--prompt", "FILE:nowhere.txt"), "nowhere.txt")


def test_score_reads_its_file_even_if_the_prompt_has_its_name(ckpt, monkeypatch):
    Path("s.txt").write_text("One day a cat sat.", encoding="utf-8")
    monkeypatch.setattr(sample, "prompt", "s.txt")
    assert "18 bytes" in run_captured("sample", "--checkpoint", ckpt, "--score", "s.txt").stdout


def test_errors(ckpt, tmp_path):
    assert_user_error(run_captured("sample"), "no checkpoint", "python train.py")
    Path("junk.pt").write_bytes(b"junk")
    assert_user_error(run_captured("sample", "--checkpoint", "junk.pt"), "junk.pt", "damaged")
    result = run_captured("sample", "--checkpoint", ckpt, "--temperature", "-1", "--top_p", "2")
    assert_user_error(result, "temperature", "top_p")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--device", "cuda:9"), "cuda:9")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--tokenizer", "none.model"), "none.model")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--quantize", "int3"), "int3", "int8")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--output_file", "x"), "--input_file")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--score", "none.txt"), "none.txt")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--score", "junk.pt", "--top_k", 3), "--top_k has")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--compile", "--score", "junk.pt"), "--compile has")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--input_file", "x" * 300), "x" * 300)
    assert_user_error(run_captured("sample", "--prompt", "-x"), "--name=-value")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--system", "x"), "--interactive")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--system", "x", "--interactive"), "chat models")
    assert_user_error(run_captured("sample", "--checkpoint", ckpt, "--interactive", "--prompt", "x"), "--prompt")


@pytest.mark.skipif(os.name == "nt", reason="Windows calls a pipe without a reader an invalid argument")
def test_a_closed_pipe_ends_quietly(ckpt):
    process = start_script("sample", "--checkpoint", ckpt, "--max_new_tokens", "5000", "--temperature", "2",
                           "--device", "cpu", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    assert "Traceback" not in errors and "Exception" not in errors and process.wait(timeout=60) == 0
