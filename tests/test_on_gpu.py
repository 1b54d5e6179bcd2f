"""Checks on a GPU, with the CPU's float32 results as the reference: `bash test.sh --gpu`."""
import gc
from pathlib import Path

import pytest
import torch
from conftest import find_gpu, random_model, read_log
from torch.utils._pytree import tree_leaves

import train
from extras.gpt2 import GPT2, GPT2Args
from sample import TextGenerator
from tinyllm.engine import build_engine
from tinyllm.estimate import estimate_run_memory, why_not_compilable
from tinyllm.sampling import SamplingParams

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0)
SHAPE = {"n_heads": 4, "vocab_size": 300}
PROMPTS = [[1, 20, 30, 40], [1], list(range(100, 130))]         # the window of random_model is 24
LOSS_TOLERANCE = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2}       # relative


@pytest.fixture
def gpu():
    return find_gpu()


@pytest.fixture
def cuda(gpu):
    if gpu != "cuda":
        pytest.skip("for CUDA only")
    return gpu


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request, gpu):
    """Each dtype that the GPU supports."""
    if request.param != "float32" and gpu != "cuda":
        pytest.skip("float32 only")
    if request.param == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("no bfloat16 in hardware")
    return request.param


def losses(out: str | Path) -> list[float]:
    return [entry["loss"] for entry in read_log(out) if "loss" in entry]


# ---- training -----------------------------------------------------------------------------------

def test_run_learns_as_on_the_cpu(gpu, dtype, ckpt, train_small):
    train_small("out", "--device", gpu, "--dtype", dtype, "--max_iters", 30, "--learning_rate", 0.02)
    assert losses("out") == pytest.approx(losses(ckpt.parent), rel=LOSS_TOLERANCE[dtype])
    assert losses("out")[-1] < losses("out")[0] - 1
    saved = [value for value in tree_leaves(torch.load("out/last.pt", weights_only=True)) if torch.is_tensor(value)]
    assert {tensor.device.type for tensor in saved} == {"cpu"}
    assert TextGenerator("out/ckpt.pt", device="cpu").sample("Once", 1, 5)


def test_resumed_run_continues(gpu, dtype, train_small):
    """The saved random state gives the same dropout."""
    dropout = 0 if gpu == "mps" else 0.1                        # checkpoints have no random state of Apple's GPUs
    options = ["--device", gpu, "--dtype", dtype, "--dropout", dropout, "--lr_decay_iters", 10]
    train_small("whole", *options, "--max_iters", 10)
    train_small("parts", *options, "--max_iters", 5)
    train_small("parts", *options, "--max_iters", 10)
    assert losses("parts") == pytest.approx(losses("whole"), rel=LOSS_TOLERANCE[dtype] / 2)


def test_evaluation_equals_the_cpu(gpu, dtype, ckpt, planned_run):
    scores = train.evaluate(planned_run("--init_from", ckpt, "--device", gpu, "--dtype", dtype))
    expected = train.evaluate(planned_run("--init_from", ckpt, "--dtype", "float32"))
    assert scores == pytest.approx(expected, rel=LOSS_TOLERANCE[dtype])


def test_overflow_skips_a_step(cuda, planned_run):
    run = planned_run("--device", cuda, "--dtype", "float16")
    run.scaler = torch.amp.GradScaler(cuda, init_scale=2.0 ** 60)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    train.train_step(run, train.training_batches(run))
    assert run.scaler.get_scale() == 2.0 ** 59
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_compiled_run_learns(gpu, dtype, train_small):
    if reason := why_not_compilable(torch.device(gpu)):
        pytest.skip(reason)
    for compile in ("False", "True"):
        train_small(compile, "--device", gpu, "--dtype", dtype, "--compile", compile, "--max_iters", 10)
    assert losses("True") == pytest.approx(losses("False"), rel=LOSS_TOLERANCE[dtype])


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_stays_below_the_estimate(cuda, dtype, planned_run, compiled):
    """With the default shape and batch."""
    if compiled and (reason := why_not_compilable(torch.device(cuda))):
        pytest.skip(reason)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "batch_size", "gradient_accumulation_steps")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = planned_run("--device", cuda, "--dtype", dtype, *(f"--{name}={getattr(train, name)}" for name in names))
    if compiled:
        run.compile()
    batches = train.training_batches(run)
    for _ in range(3):
        train.train_step(run, batches)
    assert torch.cuda.max_memory_reserved() < 1.1 * estimate_run_memory(run, compiled, run.cfg.batch_size).total


# ---- sampling -----------------------------------------------------------------------------------

def new_model(kind: str) -> torch.nn.Module:
    if kind == "llama":
        return random_model(**SHAPE, n_kv_heads=2)
    model = GPT2(GPT2Args(**SHAPE, dim=64, n_layers=2, max_seq_len=24)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.dim() > 1 else None
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_engine_equals_the_cpu(gpu, kind):
    """Prompts of unequal lengths, until they exceed the context."""
    model = new_model(kind)
    steps = build_engine(model, device=torch.device(gpu)).generate(PROMPTS, 30, GREEDY)
    for step, expected in zip(steps, build_engine(model).generate(PROMPTS, 30, GREEDY), strict=True):
        torch.testing.assert_close(step.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-2)
        assert step.tokens == expected.tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_engine_equals_the_model(gpu, kind, dtype):
    model = new_model(kind).to(gpu)
    ids = list(range(100, 124))
    engine = build_engine(model, getattr(torch, dtype))
    with torch.no_grad():
        expected = model(torch.tensor([ids[:-1]], device=gpu))[0].log_softmax(-1)
    tolerance = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.6}[dtype]
    torch.testing.assert_close(next(engine.logprobs(ids)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=20, repetition_penalty=1.2)])
def test_cuda_graph_equals_eager(cuda, kind, params):
    model = new_model(kind)
    eager = build_engine(model, device=torch.device(cuda))
    graph = build_engine(model, compiled=True, device=torch.device(cuda))
    for _ in range(2):                                          # the second time with a new cache
        for step, expected in zip(graph.generate(PROMPTS, 30, params), eager.generate(PROMPTS, 30, params)):
            torch.testing.assert_close(step.logits, expected.logits, rtol=1e-3, atol=1e-2)
            assert step.tokens == expected.tokens


def test_seed_repeats_samples(gpu, ckpt):
    texts = [TextGenerator(ckpt, device=gpu, seed=seed).sample("Once", 2, 20) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert TextGenerator(ckpt, device=gpu, seed=1).sample("Once", 1, 20) == texts[0][:1]       # alone as in company


# ---- waiting ------------------------------------------------------------------------------------

@pytest.fixture
def refuse_waits(cuda):
    """Let PyTorch raise an error when the CPU waits for the GPU. It does not count events."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_training_step_does_not_wait(refuse_waits, dtype, planned_run):
    run = planned_run("--device", "cuda", "--dtype", dtype)
    batches = train.training_batches(run)
    for _ in range(2):                                          # creates the optimizers' state
        train.train_step(run, batches)
    refuse_waits()
    train.train_step(run, batches)


@pytest.mark.parametrize("compiled", [False, True])
def test_token_does_not_wait(refuse_waits, compiled):
    engine = build_engine(new_model("llama"), compiled=compiled, device=torch.device("cuda"))
    steps = engine.generate([[1, 2], [3]], 10, SamplingParams(top_p=0.9))
    for _ in range(3):
        next(steps)
    refuse_waits()
    assert len(list(steps)) == 7
