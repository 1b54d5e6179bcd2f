"""The engine: the model's logits, and independent rows of a batch."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from model import ModelArgs, Transformer
from tinyllm import checkpoint, device
from tinyllm.engine import Engine, PlainEngine, linear_int8, quantize_int8
from tinyllm.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_seq_len=24)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4) if weight.dim() > 1 else None
    return model


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model)


def tokens_by_row(steps, count):
    rows = [[] for _ in range(count)]
    for step in steps:
        for row, token in zip(rows, step.tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def greedy_tokens(model, context, count):
    """Return the most probable tokens by the model's own forward, also beyond the context."""
    window, tokens = model.args.max_seq_len, []
    for _ in range(count):
        if len(context) > window:
            context = context[:1] + context[-(window // 2):]
        tokens.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context = context + tokens[-1:]
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("tied, kv_heads, scaling", [(True, 2, None), (False, 4, None), (True, 1, {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16})])
def test_logits_equal_the_model(tied, kv_heads, scaling):
    """Compare the logits of prompts, then of single tokens, with norm weights other than 1."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=kv_heads, vocab_size=61, max_seq_len=24,
                                  tie_embeddings=tied, rope_scaling=scaling)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.dim() > 1 else torch.nn.init.uniform_(weight, 0.5, 2)
    prompts = [[1, 5, 9, 30], [1], [1, 60, 2, 3, 4, 5, 6]]
    texts = [list(prompt) for prompt in prompts]
    for step in Engine(model).generate(prompts, 15, SamplingParams(seed=2)):
        for text, token, logits in zip(texts, step.tokens, step.logits):
            torch.testing.assert_close(logits, model(torch.tensor([text]))[0, -1], atol=1e-4, rtol=1e-4)
            text.append(token)


@pytest.mark.parametrize("options, stop_ids, count", [
    (dict(seed=2), [], 40), (dict(seed=3, repetition_penalty=1.3, top_k=9), [7], 40), (dict(seed=2), [], 1),
    (dict(seed=2), range(50), 5), (dict(temperature=0), [3], 15)])
def test_reading_tokens_late_changes_no_token(model, options, stop_ids, count):
    """As on a GPU, step n reads the tokens of step n - 1. Rows differ in length and outgrow the context of 24."""
    prompts = [[1, 5, 9, 30], [1], [1, 20, 2, 3, 4, 5, 6]]
    engine = Engine(model)
    want = list(engine.generate(prompts, count, SamplingParams(**options), stop_ids, with_logprobs=True))
    engine.read_ahead = 1
    found = list(engine.generate(prompts, count, SamplingParams(**options), stop_ids, with_logprobs=True))
    assert [step.tokens for step in found] == [step.tokens for step in want]
    assert [step.logprobs for step in found] == [step.logprobs for step in want]


def test_logprobs_are_of_the_sampled_tokens(engine):
    for step in engine.generate([[1, 5, 9], [1, 7]], 5, SamplingParams(seed=1, top_k=5), with_logprobs=True):
        for token, logprob, logits in zip(step.tokens, step.logprobs, step.logits, strict=True):
            assert logprob == pytest.approx((logits.double().exp() / logits.double().exp().sum()).log()[token].item())
    assert next(engine.generate([[1]], 1)).logprobs is None


@pytest.mark.parametrize("read_ahead", [0, 1])
def test_at_most_one_step_is_dropped(engine, monkeypatch, read_ahead):
    """The stop id is the greedy token of step 4, so 3 steps are shown and 4, or 5, are computed."""
    monkeypatch.setattr(engine, "read_ahead", read_ahead)
    first = [step.tokens[0] for step in engine.generate([[1, 5, 9]], 9, GREEDY)]
    stop_id = first[3]
    assert stop_id not in first[:3]
    computed = []
    decode = engine.decode

    def count_and_decode(*args):
        computed.append(1)
        return decode(*args)
    monkeypatch.setattr(engine, "decode", count_and_decode)
    assert [step.tokens[0] for step in engine.generate([[1, 5, 9]], 9, GREEDY, [stop_id])] == first[:3]
    assert 1 + len(computed) == 4 + read_ahead           # the first step is the prompt's


def test_greedy_equals_the_model(model, engine):
    prompts = [[1, 5, 9], [1, 7, 3]]
    want = model.generate(torch.tensor(prompts), 15, temperature=0)[:, 3:].tolist()
    assert tokens_by_row(engine.generate(prompts, 15, GREEDY), 2) == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_rounded_once_more(dtype):
    model = Transformer(ModelArgs(dim=192, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=99, max_seq_len=32))
    state = checkpoint.model_state(model)
    state["model"] = {name: (weight * 3).to(dtype) for name, weight in state["model"].items()}
    want = checkpoint.build_model(state)(torch.arange(20)[None])[0, :-1].log_softmax(-1)
    found = torch.cat(list(Engine(checkpoint.build_model(state, copy_weights=False)).logprobs(list(range(20)))))
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ragged_batch_equals_single_prompts(engine, temperature):
    prompts, params = [[1], [1, 4, 8, 15, 16, 23, 42], [1, 30, 31], [1, 2, 2]], SamplingParams(temperature, seed=4)
    together = tokens_by_row(engine.generate(prompts, 60, params, [7]), 4)
    for i, prompt in enumerate(prompts):
        assert tokens_by_row(engine.generate([prompt], 60, params, [7], sample_ids=[i]), 1)[0] == together[i]
    assert len({len(row) for row in together}) > 1 and max(map(len, together)) > engine.args.max_seq_len


def test_each_row_stops_at_eos(engine):
    prompts, params = [[1, i] for i in range(10, 30)], SamplingParams(seed=3)
    free = tokens_by_row(engine.generate(prompts, 20, params), 20)
    eos = free[0][5]
    stopped = tokens_by_row(engine.generate(prompts, 20, params, [eos]), 20)
    for long, short in zip(free, stopped):
        assert short == (long[:long.index(eos)] if eos in long else long)
    assert len({len(row) for row in stopped}) > 1


def test_steps_end_when_all_rows_end(engine):
    first = tokens_by_row(engine.generate([[1, 2]], 1, GREEDY), 1)[0][0]
    assert list(engine.generate([[1, 2]], 50, GREEDY, [first])) == []
    assert len(list(engine.generate([[1, 2]], 7))) == 7 and list(engine.generate([[1, 2]], 0)) == []


@torch.no_grad()
def test_full_context_keeps_bos_and_newer_half(model, engine):
    prompts = [[1, 5, 9], [1, 6], [1, 7, 7, 7, 7, 7]]           # which get there at different times
    want = [greedy_tokens(model, prompt, 70) for prompt in prompts]
    assert tokens_by_row(engine.generate(prompts, 70, GREEDY), 3) == want


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 1, 60])
def test_long_prompt_keeps_bos_and_newer_half(model, engine, more):
    prompts = [[1] + [i % 40 + 5 for i in range(1, model.args.max_seq_len + more)], [1, 3]]
    want = [greedy_tokens(model, prompt, 5) for prompt in prompts]
    assert tokens_by_row(engine.generate(prompts, 5, GREEDY), 2) == want


def test_seeds(engine):
    prompts = [[1, 5]] * 3
    first = tokens_by_row(engine.generate(prompts, 20, SamplingParams(seed=1)), 3)
    assert tokens_by_row(engine.generate(prompts, 20, SamplingParams(seed=1)), 3) == first
    assert tokens_by_row(engine.generate(prompts, 20, SamplingParams(seed=2)), 3) != first and first[0] != first[1]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert tokens_by_row(engine.generate(prompts[:1], 20, SamplingParams(seed=1)), 1) == first[:1]
    assert torch.equal(torch.get_rng_state(), before)


def test_each_token_has_its_own_random_numbers():
    """With uniform logits, tokens are uniformly distributed within a row and across rows."""
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=8, max_seq_len=16))
    torch.nn.init.zeros_(model.output.weight)
    found = torch.tensor(tokens_by_row(Engine(model).generate([[1]] * 20, 400), 20))
    for counts in (torch.bincount(found.flatten(), minlength=8), torch.bincount(found[0], minlength=8) * 20):
        assert (counts - 1000).abs().max() < 350
    pairs = torch.bincount((8 * found[:, :-1] + found[:, 1:]).flatten(), minlength=64)
    assert (pairs - 7980 / 64).abs().max() < 70


@pytest.mark.parametrize("width", [64, 100, 36, 13])
def test_int8_products_are_close(width):
    """Rounding to 255 levels changes a product by less than 1 %, alone and in a batch."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, width) * torch.rand(96, 1), torch.randn(200, width)
    product, want = linear_int8(weight), x @ weight.T
    found = product(x)
    assert found.shape == want.shape and (found - want).norm() < 0.015 * want.norm()
    assert (product(x[:3]) - found[:3]).abs().max() < 1e-4


def test_int8_error_is_at_most_half_a_level():
    """This includes the largest weight of each row: a bfloat16 scale moves it by 1/4 level, and never beyond 127."""
    weight = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    levels, scale = quantize_int8(weight)
    moved = (weight / scale.float()[:, None] - levels).abs()
    assert moved.max() < 0.75 and moved.quantile(0.99) < 0.5


def test_dtypes_agree(model):
    prompts = [[1, 5, 9], [1, 7]]
    want = next(Engine(model).generate(prompts, 1)).logits
    for options, share in [({"dtype": torch.bfloat16}, 0.1), ({"quantize": "int8"}, 0.1),
                           *[({"dtype": torch.float16}, 0.005)] * device._has_fbgemm()]:
        found = next(Engine(model, **options).generate(prompts, 1)).logits
        assert (found - want).norm() < share * want.norm() and not torch.equal(found, want), options


def test_plain_engine_generates_the_same(model, engine):
    prompts, params = [[1, 5, 9], [1, 6], [1] + [7] * 30], SamplingParams(seed=3, repetition_penalty=1.2)
    plain = PlainEngine(model)
    want = tokens_by_row(engine.generate(prompts, 40, params, [7]), 3)
    assert tokens_by_row(plain.generate(prompts, 40, params, [7]), 3) == want
    for one, two in zip(engine.logprobs([1] * 30), plain.logprobs([1] * 30), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


USE_EDITED_MODEL = """
import torch
from model import ModelArgs, Transformer
from tinyllm.cli import UserError
from tinyllm.engine import build_engine
model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_seq_len=24))
model.output.weight.data.mul_(50)
for step in build_engine(model).generate([[1, 5, 9, 3]], 1):
    want = model(torch.tensor([[1, 5, 9, 3]]))[:, -1]
    assert torch.equal(step.logits, want)
    assert torch.equal(want, model(torch.tensor([[1, 7, 7, 3]]))[:, -1])      # nothing but the last token counts
try:
    build_engine(model, quantize="int8")
except UserError as error:
    print(error)
"""


def test_edited_model_uses_its_own_functions():
    """The test edits a copy so that attention returns zeros."""
    for name in ("tinyllm", "extras"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, path.name)
    source = Path("model.py").read_text(encoding="utf-8")
    edited = source.replace("return F.scaled_dot_product_attention(", "return 0 * F.scaled_dot_product_attention(")
    assert edited != source
    Path("model.py").write_text(edited, encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", USE_EDITED_MODEL], capture_output=True, encoding="utf-8", timeout=60)
    assert result.returncode == 0 and "model.py was edited" in result.stdout, result.stderr
