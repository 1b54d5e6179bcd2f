"""Fast kernels equal model.py's functions, and an edited model.py replaces them."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, load_state, read_log

import model
from model import ModelArgs, Transformer
from tinyllm import kernels

SOURCE = Path(model.__file__).read_text(encoding="utf-8")


# ---- an edit of model.py wins -------------------------------------------------------------------

def test_the_fingerprint_is_current():
    current = kernels.fingerprint(SOURCE)
    assert kernels.MODEL_FINGERPRINT == current, (
        f'model.py has changed. If the other tests here pass, set MODEL_FINGERPRINT = "{current}" in kernels.py')
    assert kernels.model_is_original()


def test_comments_docstrings_and_layout_do_not_change_the_fingerprint():
    code = 'def f(x):\n    """Double."""\n    return 2 * x  # twice\n'
    assert kernels.fingerprint(code) == kernels.fingerprint('"""A module."""\ndef f(x):\n\n  return (2\n    * x)\n')
    assert kernels.fingerprint(code) != kernels.fingerprint(code.replace("2 * x", "3 * x"))
    assert kernels.fingerprint("x = f(None)") != kernels.fingerprint("x = f()")


def test_the_fingerprint_is_the_same_in_all_versions_of_python():
    """Syntax trees of Python versions differ in empty fields. The value is from 3.11; CI runs 3.10 to 3.14."""
    assert kernels.fingerprint("class A(B):\n    x: int = 1\n    def f(self, *a, k=None): return f'{a!r:.9} {k}'\n"
                               ) == "2b4cc204f3fe8b90"


def test_edited_model_uses_its_own_functions(project, tmp_path):
    """An edited copy returns zeros as attention and doubles the loss: wq is constant, the first loss 2 ln 512."""
    for name in ("tinyllm", "extras"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, path.name)
    edited = SOURCE.replace("return F.scaled_dot_product_attention(", "return 0 * F.scaled_dot_product_attention(")
    edited = edited.replace("return F.cross_entropy(", "return 2 * F.cross_entropy(")
    Path("model.py").write_text(edited, encoding="utf-8")
    result = subprocess.run([sys.executable, "train.py", "--data_dir", str(project), "--out_dir", "out", *TINY,
                             "--max_iters", "2", "--optimizer", "adamw", "--weight_decay", "0", "--sample_tokens", "0"],
                            capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("note: model.py was edited") == 1
    trained = load_state("out")
    torch.manual_seed(trained["config"]["seed"])
    untrained = Transformer(ModelArgs(**trained["model_args"])).state_dict()
    assert torch.equal(trained["model"]["layers.0.attention.wq.weight"], untrained["layers.0.attention.wq.weight"])
    assert not torch.equal(trained["model"]["layers.0.feed_forward.w1.weight"],
                           untrained["layers.0.feed_forward.w1.weight"])
    losses = [entry["loss"] for entry in read_log("out") if "loss" in entry]
    assert losses[0] == pytest.approx(2 * 6.238, rel=0.02)


def test_kernels_equal_model_py():
    args = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=97, max_seq_len=40)
    torch.manual_seed(1)
    fast = kernels.build_transformer(args)
    plain = Transformer(args)
    plain.load_state_dict(fast.state_dict())
    tokens = torch.randint(0, 97, (3, 26))
    losses = [each(tokens[:, :-1], tokens[:, 1:]) for each in (fast, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for one, two in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert torch.equal(fast(tokens), plain(tokens))


# ---- attention ----------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [1, 63, 64, 150])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_blocked_attention_equals_attention(length, heads, kv_heads):
    """Compare bfloat16 on a CPU with PyTorch in float64, forward and backward."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(3, length, n, 16).bfloat16().transpose(1, 2) for n in (heads, kv_heads, kv_heads))
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    found = kernels.causal_attention(*mine)
    want.square().sum().backward()
    found.square().sum().backward()
    for a, b in zip([found, *(x.grad for x in mine)], [want, *(x.grad for x in exact)]):
        assert a.shape == b.shape and (a.double() - b).norm() <= 0.01 * b.norm()


def test_dropout_in_blocked_attention():
    torch.manual_seed(4)
    q, k, v = (torch.randn(500, 2, 70, 16).bfloat16() for _ in range(3))
    k[:], v[:] = k[0], v[0]
    q[:] = q[0]
    found, plain = kernels.causal_attention(q, k, v, dropout=0.5), kernels.causal_attention(q, k, v)
    first = found[:, :, 0] / v[:, :, 0]                     # the first token has but itself to look at
    assert set(first.unique().tolist()) == {0.0, 2.0} and 400 < first[..., 0].sum() / 2 < 600
    assert ((found.double().mean(0) - plain[0].double()).norm() < 0.1 * plain[0].double().norm()
            < found[0].double().sub(plain[0].double()).norm())


def test_blocked_attention_is_causal():
    """Repeats test_causality of test_model.py in bfloat16."""
    torch.manual_seed(1)
    args = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=97, max_seq_len=200)
    model = kernels.build_transformer(args)
    for weight in model.parameters():           # larger than at the start of training, so that errors show
        torch.nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else torch.nn.init.uniform_(weight, 0.5, 1.5)
    tokens = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(tokens)
        for at in (63, 64, 130, 199):
            changed = tokens.clone()
            changed[0, at] = (changed[0, at] + 1) % 97
            after = model(changed)
            assert torch.equal(after[:, :at], before[:, :at]) and not torch.equal(after[:, at], before[:, at])


# ---- loss ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("at_a_time", [1, 97 * 7, 1 << 20])
def test_chunked_loss_equals_cross_entropy(at_a_time, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_LOGITS_ON_CPU", at_a_time)
    torch.manual_seed(5)
    targets = torch.randint(-1, 97, (40,))
    one = [torch.randn(40, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)]
    two = [x.detach().clone().requires_grad_() for x in one]
    mine = kernels.LinearCrossEntropy()(one[0][None], one[1], targets[None])
    want = torch.nn.functional.cross_entropy(two[0] @ two[1].T, targets, ignore_index=-1)
    (3 * mine).backward()
    (3 * want).backward()
    for a, b in [(mine, want), (one[0].grad, two[0].grad), (one[1].grad, two[1].grad)]:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradients(mode, monkeypatch):
    def check(h, weight, targets, grad_weight):
        assert grad_weight is None
        return h.sum(), None
    loss_fn = kernels.LinearCrossEntropy()
    monkeypatch.setattr(loss_fn.chunk, "forward", check)
    with mode():
        loss_fn(torch.zeros(1, 4, 8), torch.nn.Parameter(torch.zeros(16, 8)), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("vocab_size, device, rows", [
    (4096, "cpu", 256), (50257, "cpu", 16), (1 << 22, "cpu", 1), (4096, "cuda", 1024), (50257, "cuda", 256)])
def test_rows_of_a_loss_chunk(vocab_size, device, rows):
    assert kernels.chunk_rows(vocab_size, device) == rows


def test_byte_order_mark_keeps_the_fingerprint():
    assert kernels.fingerprint(b"\xef\xbb\xbf" + SOURCE.encode()) == kernels.MODEL_FINGERPRINT
