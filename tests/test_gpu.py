"""The project on a device that does not exist (fake_device.py): wrong devices and dtypes, waits, slow copies.

Budgets: a training step waits for nothing, a log line once, an evaluation twice for all its batches.
A generated token is one asynchronous copy to the CPU. Steps and tokens copy to the device from pinned memory only.
"""
import math
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import conftest
import pytest
import torch
from fake_backend import DEVICE, is_on_device
from fake_device import FakeDevice, WrongOnDevice, fake_device
from torch.utils._pytree import tree_leaves

import train
from extras.compiled import CudaGraphStep
from extras.gpt2 import GPT2, GPT2Args
from model import ModelArgs, Transformer
from sample import TextGenerator
from tinyllm import checkpoint, generator, resume, sampling
from tinyllm.device import Backend
from tinyllm.engine import PlainEngine, build_engine
from tinyllm.run import TrainRun
from tinyllm.sampling import SamplingParams

SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 512, "max_seq_len": 32}
SMALL = ["--n_layers", 1, "--gradient_accumulation_steps", 1, "--sample_tokens", 4]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "attention")
IN_FLOAT32 = ("exp", "log", "amax", "gather", "_softmax", "_log_softmax", "rsqrt", "mean.dim", "pow.Tensor_Scalar",
              "native_layer_norm", "native_layer_norm_backward", "linalg_vector_norm", "embedding", "_fused_adamw_",
              "_foreach_lerp_.Scalar", "_foreach_add_.List")


@pytest.fixture
def device(project, ckpt):
    with fake_device() as device:
        yield device


@pytest.fixture
def use_device(monkeypatch):
    """Choose the fake device for everything that is built afterwards."""
    def use(dtype: torch.dtype) -> None:
        for module in (resume, generator):
            monkeypatch.setattr(module, "choose_backend", lambda *_, **__: Backend(DEVICE, dtype, "fake"))
    return use


def new_model(kind: str) -> torch.nn.Module:
    return GPT2(GPT2Args(**SHAPE)) if kind == "gpt2" else Transformer(ModelArgs(**SHAPE, n_kv_heads=2))


def count_events(device: FakeDevice, first: int = 0) -> Counter:
    return Counter(kind for kind, _ in device.events[first:])


def dtypes_of(device: FakeDevice, names: tuple[str, ...]) -> set[torch.dtype]:
    return {dtype for name, dtype in device.dtypes if name in names}


def waits(events: Counter) -> int:
    return events["read"] + events["wait"]


@pytest.fixture
def events_of(device, monkeypatch):
    """Count the events of each call of a function: events_of(train, "evaluate")."""
    def record(owner, name: str) -> list[Counter]:
        function, calls = getattr(owner, name), []

        def recorded(*args, **kwargs):
            first = len(device.events)
            result = function(*args, **kwargs)
            calls.append(count_events(device, first))
            return result
        monkeypatch.setattr(owner, name, recorded)
        return calls
    return record


# ---- training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, options", [("llama", []), ("gpt2", ["--dropout", 0.1, "--grad_clip", 0])])
def test_training_step_waits_for_nothing(device, use_device, planned_run, monkeypatch, kind, options, dtype):
    use_device(dtype)
    monkeypatch.setattr(checkpoint, "new_model", lambda args: new_model(kind))
    run = planned_run("--gradient_accumulation_steps", 2, *options)
    batches = train.training_batches(run)
    device.events.clear()
    for _ in range(2):                                          # the first step creates the state of the optimizers
        _, loss, norm = train.train_step(run, batches)
    in_scaler = {"float64": count_events(device)["float64"]} if dtype == torch.float16 else {}
    assert count_events(device) == {"upload": 4, **in_scaler}, device.events
    assert dtypes_of(device, PRODUCTS) == {dtype}
    assert dtypes_of(device, IN_FLOAT32) == {torch.float32}
    assert all(map(is_on_device, [loss, norm, *moments_of(run), *run.model.state_dict().values()]))


def test_whole_run(device, use_device, events_of, train_small):
    """Only log lines, evaluations and checkpoints wait, also in float16."""
    use_device(torch.float16)
    loop = events_of(train, "train")
    steps = events_of(train, "train_step")
    log_lines = events_of(train, "read_pending_metrics")
    evaluations = events_of(train, "evaluate")
    samples = events_of(train, "generate_samples")
    checks = events_of(train, "require_finite_weights")
    saves = events_of(TrainRun, "save")
    train_small("out", *SMALL, "--max_seq_len", 128, "--max_iters", 3, "--eval_interval", 3, "--log_interval", 3)
    assert [waits(events) + events["pageable"] for events in steps] == [0] * 3
    assert [waits(events) for events in log_lines] == [1, 1]    # for the metrics of all steps since the last line
    assert [waits(events) for events in evaluations] == [2]
    assert [events["download"] for events in samples] == [4]
    assert [events["read"] + events["pageable"] for events in samples] == [0]
    assert [waits(events) for events in checks] == [1, 1]
    parts = chain(log_lines, evaluations, samples, checks, saves[1:])           # saves[0] precedes the loop
    assert sum(map(waits, loop)) == sum(map(waits, parts))


def moments_of(run) -> list[torch.Tensor]:
    states = [optimizer.state.values() for optimizer in run.optimizers]
    return [value for state in chain(*states) for value in state.values()]


def test_save_and_restore(device, use_device, planned_run):
    """A checkpoint has its tensors on the CPU. A resumed run has them on the device."""
    use_device(torch.float16)
    run = planned_run(*SMALL, "--dropout", 0.1)
    train.train_step(run, train.training_batches(run))
    torch.gpu.rng_state = [1, 2, 3]
    run.save("last.pt")
    saved = torch.load("output/last.pt", weights_only=True)         # on the devices that the file names
    tensors = [value for value in tree_leaves(saved) if isinstance(value, torch.Tensor)]
    assert len(tensors) > 20 and not any(map(is_on_device, tensors))
    assert saved["rng"]["cuda"][0].tolist() == [1, 2, 3]
    weights = saved["model"]
    assert weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()

    torch.gpu.rng_state = [0]
    resumed = planned_run(*SMALL, "--dropout", 0.1)
    assert resumed.state.iter_num == 1 and torch.gpu.rng_state == [1, 2, 3]
    assert resumed.scaler.get_scale() == saved["scaler"]["scale"] == 1          # a new scaler begins with 65,536
    assert len(moments_of(resumed)) == len(moments_of(run))
    assert all(map(is_on_device, [*moments_of(resumed), *resumed.model.state_dict().values()]))
    device.events.clear()
    train.train_step(resumed, train.training_batches(resumed))
    assert waits(count_events(device)) == 0


@pytest.mark.parametrize("batch_size", [4, 16])
def test_evaluation_waits_for_all_batches_at_once(device, use_device, planned_run, batch_size):
    use_device(torch.bfloat16)
    run = planned_run(*SMALL, "--max_seq_len", 128, "--batch_size", batch_size)
    device.events.clear()
    train.evaluate(run)
    assert dtypes_of(device, PRODUCTS) == {torch.bfloat16}
    assert count_events(device) == {"read": 2, "upload": math.ceil(17 / batch_size)}    # 17 windows


# ---- sampling -----------------------------------------------------------------------------------

ONE = [[1, 5, 6]]
SEVERAL = [[1, 5, 6], [1], [1, 7]]
FILTERS = SamplingParams(top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.1)


@pytest.mark.parametrize("kind, prompts, params", [
    ("llama", ONE, SamplingParams()), ("llama", SEVERAL, FILTERS), ("gpt2", ONE, FILTERS),
    ("gpt2", SEVERAL, SamplingParams(temperature=0))], ids=["llama-one", "llama-several", "gpt2-one", "gpt2-several"])
def test_token_is_one_copy_to_the_cpu(device, monkeypatch, kind, params, prompts):
    """Each step waits for the copy of the step before, after it has given the device its own work."""
    monkeypatch.setattr(sampling, "NOISE_CHUNK", 2)
    engine = build_engine(new_model(kind), torch.bfloat16, device=DEVICE)
    device.events.clear()
    device.dtypes.clear()
    steps = list(engine.generate(prompts, 6, params))
    assert [step.tokens for step in steps] == [[1] * len(prompts)] * 6      # not -1 from an unfinished copy
    order = [name for name, _ in device.events if name != "upload"]
    assert order == ["download", *["download", "wait"] * 5, "wait"], device.events
    assert dtypes_of(device, PRODUCTS) == {torch.bfloat16} and dtypes_of(device, IN_FLOAT32) == {torch.float32}
    per_token = 6 if prompts == SEVERAL else 0                  # positions, because the lengths differ
    assert len(device.lines("upload")) <= 4 + per_token         # the prompts: ids, rows, ends and penalties


def test_sequences_longer_than_the_context(device):
    engine = build_engine(new_model("llama"), torch.bfloat16, device=DEVICE)
    device.events.clear()
    assert len(list(engine.generate([[1] * 30, [1] * 20], 16))) == 16
    events = count_events(device)
    assert (events["download"], events["read"], events["pageable"]) == (16, 0, 0), device.events


def test_text_generator(device, use_device, ckpt):
    use_device(torch.bfloat16)
    writer = TextGenerator(ckpt)
    device.events.clear()
    stories = writer.completions(["Once", "One day, Lily"], max_new_tokens=5)
    assert [story.tokens for story in stories] == [[1] * 5] * 2
    events = count_events(device)
    assert (events["download"], events["read"], events["pageable"]) == (5, 0, 0), device.events


def test_text_is_scored_with_three_reads_per_window(device, use_device, ckpt):
    use_device(torch.bfloat16)
    reader = TextGenerator(ckpt)
    device.events.clear()
    assert len(reader.read([1] * 70)) == 69                     # 3 windows of 32
    assert count_events(device) == {"read": 9, "upload": 6}, device.events


def test_edited_model(device):
    engine = PlainEngine(new_model("llama"), DEVICE)
    assert len(list(engine.generate([[1, 2], [1]], 3))) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lengths", [[5, 5], [3, 0]])
def test_cuda_graph_holds_work_of_the_device_alone(device, monkeypatch, kind, lengths):
    def record(step, cache):
        device.refuses_cpu = True
        step.logits = step.run(cache)
        device.refuses_cpu = False
        step.graph = SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr(CudaGraphStep, "record", record)
    engine = build_engine(new_model(kind), torch.bfloat16, device=DEVICE)
    cache = engine.new_cache(2, 16)
    cache.lengths = lengths
    step = CudaGraphStep(engine._decode_at_position)
    device.events.clear()
    with torch.inference_mode():
        tokens = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        assert is_on_device(step(tokens, cache)) and is_on_device(step(tokens, cache))
    assert count_events(device) == {"upload": 2}                # the positions of each token


# ---- the tests themselves ----------------------------------------------------------------------

@pytest.mark.parametrize("code, kind", [
    ("x.sum().item()", "read"), ("x.tolist()", "read"), ("x.cpu()", "read"), ("bool(x.isfinite().all())", "read"),
    ("torch.empty(4).copy_(x)", "read"), ("torch.tensor([1.0, 2.0], device=DEVICE)", "pageable"),
    ("torch.ones(4).to(DEVICE, non_blocking=True)", "pageable"), ("torch.ones(4).pin_memory().to(DEVICE)", "pageable"),
    ("x.copy_(torch.ones(4))", "pageable"), ("x.double()", "float64"), ("x.to('cpu', non_blocking=True)", "download"),
    ("torch.ones(4).pin_memory().to(DEVICE, non_blocking=True)", "upload")])
def test_fake_device_records(device, code, kind):
    eval(code, {"torch": torch, "DEVICE": DEVICE, "x": torch.ones(4, device=DEVICE)})
    assert [kind for kind, _ in device.events] == [kind]


@pytest.mark.parametrize("code", ["x + torch.ones(4)", "x[torch.tensor([0])]", "x.nonzero()", "x[x > 0]",
                                  "torch.stack([x.sum(), torch.tensor(1.0)])"])
def test_fake_device_refuses(device, code):
    with pytest.raises(WrongOnDevice, match="test_gpu.py|<string>"):
        eval(code, {"torch": torch, "x": torch.ones(4, device=DEVICE)})


def test_option_gpu_fails_without_a_gpu(request, monkeypatch):
    monkeypatch.setattr(conftest, "WANTS_GPU", True)
    with pytest.raises(pytest.UsageError, match="finds no GPU"):
        conftest.pytest_configure(request.config)
