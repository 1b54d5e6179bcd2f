"""torchrun sample.py: several processes generate the same text as one."""
import contextlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, learn_tokenizer, random_model, run_captured

import sample
from extras import tensor_parallel
from extras.gpt2 import GPT2Args
from extras.tensor_parallel import TensorParallelGroup
from model import Transformer
from sample import TextGenerator
from tinyllm import checkpoint, distributed
from tinyllm.cli import UserError
from tinyllm.device import Backend, _has_fbgemm
from tinyllm.engine import Engine
from tinyllm.sampling import SamplingParams

PROMPTS = [[1, 5, 9, 30], [1], [1, 60, 2, 3, 4, 5, 6]]
CPU = torch.device("cpu")
LENGTH = 40                                             # beyond the window of the model


def make(**shape) -> Transformer:
    return random_model(**{"n_heads": 8, "n_kv_heads": 4, "vocab_size": 299, **shape})


def save(path: Path, **shape) -> Path:
    vocabulary = learn_tokenizer(["One day, a dog met a cat."] * 3, 299)
    checkpoint.save_checkpoint(path, {**checkpoint.model_state(make(**shape)), "iter_num": 0, "config": {},
                           "tokenizer": vocabulary.model, "tokenizer_sha256": vocabulary.sha256})
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("out") / "ckpt.pt")


def torchrun(count: int, *args, **options) -> subprocess.CompletedProcess:
    if os.name == "nt":
        pytest.skip("PyTorch's torchrun does not start on Windows (pytorch/pytorch#148283)")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
               str(ROOT / "sample.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, **options)


def test_prompts_from_a_file(trained):
    """Temperature 0.8, batches of different lengths, and a resumed run."""
    prompts = ["One day", "", "A dog met a cat, and then", "Mia"]
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    Path("out.jsonl").write_text('{"prompt": "One d', encoding="utf-8")            # as an interrupted run leaves it
    result = torchrun(2, "--checkpoint", trained, "--input_file", "prompts.txt", "--output_file", "out.jsonl",
                      "--batch_size", 3, "--max_new_tokens", LENGTH, "--device", "cpu", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert all(result.stderr.count(once) == 1 for once in ("settings: ", "parameters", "4 of 4", "note: the context"))
    found = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    want = TextGenerator(trained, device="cpu", dtype="float32").completions(prompts, LENGTH)
    assert [(one["prompt"], one["tokens"]) for one in found] == [(one.prompt, one.tokens) for one in want]
    assert found[2]["logprobs"] == pytest.approx(want[2].logprobs, abs=1e-3)


def test_interactive(trained, monkeypatch):
    """Includes an answer that a `stop` text ends, which only rank 0 detects."""
    text = next(one.text for one in TextGenerator(trained, device="cpu", dtype="float32").completions(
        ["One day"], 30, temperature=0))
    stop = next(letter for letter in text[1:] if letter.isalpha())
    lines = "\n".join(["/set temperature 0", f"/set stop {stop}", "One day", "/clear", "/set stop", "One day", "more"])
    args = "--checkpoint", trained, "--interactive", "--max_new_tokens", 30, "--device", "cpu", "--dtype", "float32"
    result = torchrun(2, *args, input=lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    want = run_captured("sample", *args).stdout
    assert result.returncode == 0, result.stderr
    assert result.stdout == io.IncrementalNewlineDecoder(None, translate=True).decode(want) and text in want


def test_indivisible_model_is_refused_once(tmp_path):
    result = torchrun(2, "--checkpoint", save(tmp_path / "ckpt.pt", n_kv_heads=1))
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("error: ") == 1, result.stderr
    assert "2 processes cannot share n_heads 8, n_kv_heads 1 and a feed-forward of 192" in result.stderr
    assert "--nproc_per_node=1" in result.stderr and "sample.py\", line" not in result.stderr


def test_unsupported_options(trained):
    with pytest.raises(UserError, match="nproc_per_node=1 or 2 or 4$"):
        tensor_parallel.check_divisible(make().args, 3)
    with pytest.raises(UserError, match="GPT-2"):
        tensor_parallel.check_divisible(GPT2Args(), 2)
    with pytest.raises(UserError, match="--compile does not work with torchrun"):
        TextGenerator(trained, compile=True, device="cpu", tp_group=object())


# ---- without torchrun, for it takes seconds to start --------------------------------------------

def side_by_side(count: int, work, *args) -> list:
    """Return the result or the UserError of work(*args) from each of several processes."""
    if sys.platform != "linux":
        pytest.skip("a process that has loaded PyTorch can be forked on Linux only")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    forks = multiprocessing.get_context("fork")
    pipes = [forks.Pipe(duplex=False) for _ in range(count)]
    processes = [forks.Process(target=_one_of_them, args=(rank, count, port, pipes[rank][1], work, *args))
                 for rank in range(count)]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()
    found = [_received(pipe) for pipe, _ in pipes]
    for process in processes:
        process.join(60)
    return found


def _received(pipe):
    try:
        return pipe.recv() if pipe.poll(60) else "nothing within a minute"
    except EOFError:
        return None


def _one_of_them(rank, count, port, pipe, work, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    try:
        found = work(*args)
    except UserError as error:
        found = str(error)
    pipe.send(found)


def logits_of(engine: Engine) -> list:
    """Return the logits of generated texts and of a scored text, as lists because pipes copy them easily."""
    written = [step.logits for step in engine.generate(PROMPTS, LENGTH, SamplingParams(seed=2))]
    next(engine.generate(PROMPTS, LENGTH, SamplingParams(seed=2)))            # given up after a token
    return [torch.stack(written).tolist(), torch.cat(list(engine.logprobs(list(range(1, 60))))).tolist()]


def divided_logits(dtype: torch.dtype, quantize: str) -> list:
    with distributed.distributed_context() as dist:
        engine, found = TensorParallelGroup(dist).engine(make(), Backend(CPU, dtype, ""), quantize), []
        engine.run(lambda: found.extend(logits_of(engine)))
    return found


@pytest.mark.parametrize("count, dtype, quantize, share", [
    (2, torch.float32, "", 1e-5), (4, torch.float32, "", 1e-5), (2, torch.float16, "", 1e-3),
    (2, torch.float32, "int8", 0.05)])
def test_logits_equal_one_process(count, dtype, quantize, share):
    if dtype == torch.float16 and not _has_fbgemm():
        pytest.skip("no float16 on this CPU")
    found = side_by_side(count, divided_logits, dtype, quantize)
    assert found[1:] == [[]] * (count - 1)
    for one, want in zip(map(torch.tensor, found[0]), map(torch.tensor, logits_of(Engine(make(), dtype, quantize)))):
        one, want = (one[:1], want[:1]) if quantize else (one, want)    # after another token, all is different
        assert one.shape == want.shape and (one - want).norm() < share * want.norm()
        assert quantize or (one - want).abs().max() < 100 * share


def shown(*args) -> str:
    """Return the output of sample.py."""
    sys.argv = ["sample.py", *map(str, args)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sample.main()
    return out.getvalue()


def test_greedy_text_of_four_processes(trained):
    args = "--checkpoint", trained, "--prompt", "One day", "--max_new_tokens", LENGTH, "--temperature", 0
    for more in ([], ["--show_probs"], ["--num_samples", 2, "--repetition_penalty", 1.1]):
        assert side_by_side(4, shown, *args, *more) == [run_captured("sample", *args, *more).stdout, "", "", ""]


def test_main_process_writes_the_page(trained):
    args = "--checkpoint", trained, "--prompt", "One day", "--max_new_tokens", 8, "--temperature", 0
    assert side_by_side(2, shown, *args, "--show_probs", "page.html") == [run_captured("sample", *args).stdout, ""]
    assert "Generated: 8 tokens, loss " in Path("page.html").read_text(encoding="utf-8")


def test_main_process_prints_errors(trained):
    for args, message in [(["--checkpoint", "none.pt"], "no checkpoint at"), (["--top_p", 2], "top_p must be"),
                          (["--checkpoint", trained, "--prompt", "FILE:none.txt"], "no file at")]:
        first, second = side_by_side(2, shown, *args)
        assert first.startswith(message) and second is None


def fails_while_writing() -> str:
    with distributed.distributed_context() as dist:
        engine = TensorParallelGroup(dist).engine(make(), Backend(CPU, torch.float32, ""), "")

        def lead():
            for step in engine.generate(PROMPTS, 1000):
                raise UserError(f"stopped after {len(step.tokens)} tokens")
        engine.run(lead)
    return "fine"


def test_error_on_rank_0_ends_all():
    assert side_by_side(2, fails_while_writing) == ["stopped after 3 tokens", "fine"]


def dies_while_writing() -> None:
    with distributed.distributed_context() as dist:
        engine = TensorParallelGroup(dist).engine(make(), Backend(CPU, torch.float32, ""), "")
        if dist.rank == 1:
            engine.output = lambda x: os._exit(1)
        engine.run(lambda: list(engine.generate(PROMPTS, 1000)))


def test_dead_process_ends_the_others():
    first, second = side_by_side(2, dies_while_writing)
    assert first.startswith("process 0 of 2 exits: another one has ended") and second is None
