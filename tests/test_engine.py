"""Sampling: the right distribution, exact filters, and rows of a batch that do not disturb each other."""
import math

import pytest
import torch

from engine import choose, generate
from model import ModelArgs, Transformer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_seq_len=24)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4) if weight.dim() > 1 else None
    return model


def rows(steps, count):
    found = [[] for _ in range(count)]
    for step in steps:
        for row, token in zip(found, step, strict=True):
            row += [token] if token is not None else []
    return found


def draw(logits, count, **options):
    """Draw `count` tokens, each with generators of its own."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return choose(torch.tensor(logits).expand(count, -1), generators=generators, **options)


def test_greedy_equals_the_plain_form(model):
    prompts = [[1, 5, 9], [1, 7, 3]]
    plain = model.generate(torch.tensor(prompts), 15, temperature=0)[:, 3:].tolist()
    assert rows(generate(model, prompts, 15, temperature=0), 2) == plain


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ragged_prompts_give_what_each_gives_alone(model, temperature):
    prompts = [[1], [1, 4, 8, 15, 16, 23, 42], [1, 30, 31], [1, 2, 2]]
    together = rows(generate(model, prompts, 60, temperature=temperature, eos_id=7), 4)
    for i, prompt in enumerate(prompts):
        # alone it has the same place in the batch, and so the same random numbers
        neighbours = [[1]] * i + [prompt]
        assert rows(generate(model, neighbours, 60, temperature=temperature, eos_id=7), i + 1)[i] == together[i]
    assert len({len(row) for row in together}) > 1 and max(map(len, together)) > model.args.max_seq_len


def test_a_row_stops_at_eos_by_itself(model):
    prompts = [[1, i] for i in range(10, 30)]
    free = rows(generate(model, prompts, 20, seed=3), 20)
    eos = free[0][5]
    stopped = rows(generate(model, prompts, 20, seed=3, eos_id=eos), 20)
    for long, short in zip(free, stopped):
        assert short == (long[:long.index(eos)] if eos in long else long)
    assert len({len(row) for row in stopped}) > 1


def test_steps_end_when_all_rows_have(model):
    first = rows(generate(model, [[1, 2]], 1, temperature=0), 1)[0][0]
    assert list(generate(model, [[1, 2]], 50, temperature=0, eos_id=first)) == []
    assert len(list(generate(model, [[1, 2]], 7))) == 7 and list(generate(model, [[1, 2]], 0)) == []


def test_beyond_the_window_bos_and_the_newer_half_stay(model):
    window = model.args.max_seq_len
    context, expected = [1, 5, 9], []
    for _ in range(70):
        if len(context) > window:
            context = context[:1] + context[-(window // 2):]
        logits = model(torch.tensor([context]))
        expected.append(logits[0, -1].argmax().item())
        context.append(expected[-1])
    assert rows(generate(model, [[1, 5, 9]], 70, temperature=0), 1)[0] == expected


def test_a_prompt_longer_than_the_window_is_shortened_the_same_way(model):
    prompt = [1] + [i % 40 + 5 for i in range(60)]
    window = model.args.max_seq_len
    assert rows(generate(model, [prompt], 5, temperature=0), 1) == \
        rows(generate(model, [[1] + prompt[-(window // 2):]], 5, temperature=0), 1)


def test_seeds(model):
    prompts = [[1, 5]] * 3
    first = rows(generate(model, prompts, 20, seed=1), 3)
    assert rows(generate(model, prompts, 20, seed=1), 3) == first != rows(generate(model, prompts, 20, seed=2), 3)
    assert first[0] != first[1]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert rows(generate(model, prompts[:1], 20, seed=1), 1) == first[:1]
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; the 99.99 % point for 9 degrees of freedom is 33.7."""
    logits = [0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.1, 0.2, 2.5]
    temperature, count = 1.3, 20_000
    counts = torch.bincount(torch.tensor(draw(logits, count, temperature=temperature)), minlength=10)
    expected = (torch.tensor(logits) / temperature).softmax(0) * count
    assert ((counts - expected) ** 2 / expected).sum() < 33.7


def test_top_k_is_exact_under_ties():
    drawn = set(draw([1.0, 3.0, 3.0, 3.0, 3.0, 0.0], 500, top_k=2))
    assert len(drawn) == 2 and drawn < {1, 2, 3, 4}
    assert set(draw([1.0, 3.0, 2.0], 200, top_k=1)) == {1} and set(draw([1.0, 1.0, 1.0], 200, top_k=99)) == {0, 1, 2}


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, 500, top_p=0.45)) == {0} and set(draw(logits, 500, top_p=0.55)) == {0, 1}
    assert set(draw(logits, 500, top_p=0.81)) == {0, 1, 2} and set(draw(logits, 2000, top_p=1.0)) == {0, 1, 2, 3}
    assert set(draw(logits, 200, top_p=1e-9)) == {0}
    two = torch.tensor(draw(logits, 5000, top_p=0.55))
    assert (two == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.03)


def test_temperature():
    logits = [1.0, 1.1, 0.9]
    assert draw(logits, 3, temperature=0) == [1, 1, 1] and set(draw(logits, 100, temperature=1e-30)) == {1}
    assert set(draw(logits, 300, temperature=1e6)) == {0, 1, 2}


def test_the_cache_is_used(model, monkeypatch):
    """After the prompt, each step computes one token of each row and no more."""
    widths, forward = [], model.forward

    def counted(tokens, **options):
        widths.append(tokens.shape[1])
        return forward(tokens, **options)
    monkeypatch.setattr(model, "forward", counted)
    list(generate(model, [[1, 2, 3, 4, 5]], 10))
    assert widths == [5] + [1] * 9
