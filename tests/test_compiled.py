"""--compile: different arithmetic, the same texts."""
from functools import partial

import pytest
import torch
from conftest import random_model

from extras import compiled
from model import Transformer
from tinyllm import compat, device
from tinyllm.cli import UserError
from tinyllm.engine import Engine, build_engine
from tinyllm.sampling import SamplingParams

COMPILER = pytest.mark.skipif(bool(device.why_no_compiler()), reason=device.why_no_compiler())
EXPORT = pytest.mark.skipif(torch.__version__ < compat.OLDEST_FOR_EXPORT, reason="torch.export is too old")
PROMPT, LENGTH = [1, 5, 9, 30], 40          # beyond the window of the model


def make(**shape) -> Transformer:
    return random_model(**{"n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, **shape})


def logits(engine: Engine, prompts=(PROMPT,), count=LENGTH) -> torch.Tensor:
    return torch.cat([step.logits for step in engine.generate(prompts, count, SamplingParams(seed=2))])


def spell_out(monkeypatch) -> None:
    """Run the arithmetic of the compiled code in Python."""
    monkeypatch.setattr(compiled, "load_function", lambda module, example, dims: lambda inputs: module(*inputs))


@pytest.fixture
def spelled_out(monkeypatch):
    spell_out(monkeypatch)


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4, "tie_embeddings": False}, {"n_kv_heads": 1, "norm_eps": 0.1},
                                   {"dim": 36, "n_heads": 2}])
def test_compiled_arithmetic_equals_engine(spelled_out, shape):
    model = make(**shape)
    torch.testing.assert_close(logits(build_engine(model, compiled=True)), logits(Engine(model)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompts", [[[1, 5], [1, 7]], [[1, 5, 9, 30], [1], [1, 60, 2, 3, 4, 5, 6]]])
def test_batches_equal_uncompiled(spelled_out, prompts):
    """Also of different lengths, which reach the end of the window one after the other."""
    model = make()
    with_it, without = (logits(build_engine(model, compiled=flag), prompts) for flag in (True, False))
    torch.testing.assert_close(with_it, without, atol=1e-4, rtol=1e-4)


@COMPILER
@EXPORT
def test_compiled_code_is_cached(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "kept")
    engine = partial(build_engine, dtype=torch.float16, compiled=True)
    model, texts = make(hidden_dim=40), [([PROMPT], LENGTH), ([[1]], 2), ([PROMPT, [1], [1, 60, 2, 3, 4, 5]], LENGTH)]
    with monkeypatch.context() as patch:
        spell_out(patch)
        spelled = engine(model)
        want = [logits(spelled, *text) for text in texts]
    first = engine(model)
    assert list((tmp_path / "kept").glob("*")) == []            # no engine was compiled before use
    for text, numbers in zip(texts, want):
        torch.testing.assert_close(logits(first, *text), numbers, atol=1e-3, rtol=0)
    assert "single texts, once" in (said := capsys.readouterr().err) and "several texts at a time, once" in said
    path, = (tmp_path / "kept").glob("DecodeLayer*.pt2")
    whole, again = path.read_bytes(), logits(first)
    asked = []

    def copy_file(*args) -> None:
        args[-1].write_bytes(whole)
        asked.append(args[-1])
    monkeypatch.setattr(compiled, "compile_to_file", copy_file)
    torch.testing.assert_close(logits(engine(model)), again, atol=0, rtol=0)
    assert not asked
    for begin, end in (10_000, len(whole)), (200_000, 204_096), (name := whole.index(b"DecodeLayer"), name + 1):
        path.write_bytes(whole[:begin] + b"\xff" * (end - begin) + whole[end:])     # is made again
        torch.testing.assert_close(logits(engine(model)), again, atol=0, rtol=0)
    assert asked == [path, path, path]
    for shape in ({"n_kv_heads": 1}, {"norm_eps": 1e-3}, {"hidden_dim": 64}):
        engine(make(**{"hidden_dim": 40, **shape})).load_layer()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    engine(model).load_layer()
    assert len(set(asked)) == 5


@EXPORT
def test_compiler_without_its_files(monkeypatch, tmp_path):
    def fails(*args, **options):
        raise UnicodeDecodeError("gbk", b"\x94 ", 0, 1, "illegal")
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    monkeypatch.setattr(compiled.device, "why_no_compiler", lambda: "")
    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(UserError, match="does not work here: .*PYTHONUTF8=1"):
        build_engine(make(), compiled=True).generate([PROMPT], 1)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(compiled.device, "why_no_compiler", lambda: "there is no C++ compiler")
    for prompts in ([PROMPT], [PROMPT, PROMPT]):
        with pytest.raises(UserError, match="C\\+\\+ compiler"):
            build_engine(make(), compiled=True).generate(prompts, 1)
    assert not (tmp_path / "kept").exists()


def test_old_pytorch_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    monkeypatch.setattr(compiled.device, "why_no_compiler", lambda: "")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    with pytest.raises(UserError, match=r"2\.7\.1 is too old for --compile; expected 2\.8 or newer\n.*requirements"):
        build_engine(make(), compiled=True).generate([PROMPT], 1)


def test_quantized_weights_are_refused():
    with pytest.raises(UserError, match="--compile does not work with --quantize int8"):
        build_engine(make(), quantize="int8", compiled=True)


class Graph:
    """A CPU stand-in for torch.cuda's graph: replays the recorded step on the same tensors."""

    def replay(self) -> None:
        self.result.copy_(self.run())


def test_recorded_step_equals_a_step(monkeypatch):
    """Also for rows of different lengths, which reach the end of the window one after the other."""
    graphs, prompts = [], [[1, 5, 9, 30], [1], [1, 60, 2, 3, 4, 5, 6]]

    def record(self, cache) -> None:
        self.run(cache)
        self.graph = Graph()
        self.graph.run = lambda: self.run(cache)
        self.logits = self.graph.result = torch.full_like(self.graph.run(), torch.nan)
        graphs.append(self.graph)

    monkeypatch.setattr(compiled.CudaGraphStep, "record", record)
    model = make()
    engine_class = compiled.compiled_engine_class(Engine, "", torch.device("cuda"))
    want = [step.logits for step in Engine(model).generate(prompts, LENGTH, SamplingParams(seed=2))]
    found = [step.logits for step in engine_class(model).generate(prompts, LENGTH, SamplingParams(seed=2))]
    assert len(graphs) == 1
    torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=1e-4, rtol=1e-4)
