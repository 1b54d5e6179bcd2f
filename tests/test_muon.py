"""Muon against PyTorch's implementation, and singular values of its updates."""
import pytest
import torch

from tinyllm.optim import Muon, orthogonalize

SHAPES = [(24, 24), (24, 64), (64, 24), (24, 24), (64, 24)]


def weights() -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has had its own Muon since 2.9")
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_equal_pytorch(weight_decay):
    mine, theirs = weights(), weights()
    one = Muon(mine, lr=0.1, momentum=0.9, weight_decay=weight_decay)
    two = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    random = torch.Generator().manual_seed(2)
    for _ in range(4):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        one.step()
        two.step()
    for a, b, start in zip(mine, theirs, weights()):
        assert (a - b).norm() < 0.02 * (b - start).norm()       # both compute in bfloat16, in another order


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_singular_values_are_near_one(scale, dtype):
    x = scale * torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(3))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ orthogonalize(x, dtype).float() @ v.mT          # in the directions of x: its singular values
    values = found.diagonal(dim1=1, dim2=2)
    assert 0.6 < values.min() and values.max() < 1.3
    assert (found - values.diag_embed()).abs().max() < max(1e-3, 10 * torch.finfo(dtype).eps)


def test_saved_optimizer_resumes_exactly():
    def train(steps, given=None):
        found = weights()
        optimizer = Muon(found, lr=0.1)
        if given:
            for weight, old in zip(found, given[0]):
                weight.data.copy_(old)
            optimizer.load_state_dict(given[1])
        for step in steps:
            for i, weight in enumerate(found):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        return [weight.detach().clone() for weight in found], optimizer.state_dict()
    whole, parts = train(range(6)), train(range(3, 6), train(range(3)))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], parts[0]))
