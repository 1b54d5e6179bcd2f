"""GPT-2: logits, ids and folders equal transformers', and the engine equals the model."""
import json
import shutil
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from extras.formats import gpt2_folder
from extras.gpt2 import GPT2, GPT2Args
from sample import TextGenerator
from tinyllm import checkpoint, dataset, demo_stories, device, download, shards
from tinyllm.cli import UserError
from tinyllm.engine import build_engine
from tinyllm.sampling import SamplingParams
from tools import bench

safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ARGS = GPT2Args(dim=32, n_layers=2, n_heads=4, vocab_size=400, max_seq_len=24)
GREEDY = SamplingParams(temperature=0)
CLOSE = dict(atol=1e-4, rtol=1e-4)
TEXTS = ["Once upon a time, there was a dog.", "  two  spaces\n\n\tand tabs ", "I'll say: it's 1234!",
         "naïve 猫 🙂\u00a0é", "<|endoftext|> is text here", ""]


@pytest.fixture(scope="module")
def theirs():
    """A GPT-2 of transformers, with weights large enough to reveal errors."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=ARGS.vocab_size, n_embd=ARGS.dim, n_layer=ARGS.n_layers, n_head=ARGS.n_heads,
        n_positions=ARGS.max_seq_len, bos_token_id=0, eos_token_id=0)).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    """A folder written by transformers, with a small trained tokenizer."""
    path = tmp_path_factory.mktemp("gpt2") / "model"
    theirs.save_pretrained(path)
    learner = tokenizers.ByteLevelBPETokenizer()
    texts = [*demo_stories.generate_stories(50), *TEXTS]
    learner.train_from_iterator(texts, ARGS.vocab_size, 1, False, ["<|endoftext|>"])
    learner.save_model(str(path))
    transformers.GPT2Tokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder) -> GPT2:
    return checkpoint.build_model(checkpoint.read_model(folder), copy_weights=False).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, ARGS.vocab_size, (3, ARGS.max_seq_len + 1), generator=torch.Generator().manual_seed(1))


def rows(steps, count):
    found = [[] for _ in range(count)]
    for step in steps:
        for row, token in zip(found, step.tokens, strict=True):
            row.append(token)
    return found


@torch.no_grad()
def plain(model, context, count):
    """Return the most probable tokens by the model's own forward, also beyond the context."""
    window, found = model.args.max_seq_len, []
    for _ in range(count):
        if len(context) > window:
            context = context[:1] + context[-(window // 2):]
        found.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context = context + found[-1:]
    return found


def changed(folder: Path, **config) -> Path:
    """Return a copy of the folder with another config.json."""
    copy = Path("changed")
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**content, **config}), encoding="utf-8")
    return copy


# ---- the model ----------------------------------------------------------------------------------

def test_logits_loss_and_gradients_equal_transformers(theirs, folder, tokens):
    model = checkpoint.build_model(checkpoint.read_model(folder))
    assert model.args == ARGS and model.count_parameters() == theirs.num_parameters()
    logits, loss = model(tokens[:, :-1]), model(tokens[:, :-1], tokens[:, 1:])
    other = theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(logits, other, **CLOSE)
    other_loss = torch.nn.functional.cross_entropy(other.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, other_loss, **CLOSE)
    theirs.zero_grad()
    loss.backward()
    other_loss.backward()
    names = gpt2_folder.tensor_names(ARGS.n_layers)
    for name, weight in model.named_parameters():
        grad = theirs.transformer.get_parameter(names[name]).grad
        torch.testing.assert_close(weight.grad, grad.T if name.endswith(gpt2_folder.TRANSPOSED) else grad, **CLOSE)


def test_parameter_counts_equal_the_release():
    with torch.device("meta"):
        assert GPT2(GPT2Args()).count_parameters() == 124_439_808


def test_bench_builds_a_peer_of_equal_size():
    theirs = bench.transformers_model(ARGS, device.choose_backend("cpu", "float32"))
    assert theirs.num_parameters() == GPT2(ARGS).count_parameters()


def test_initialization_equals_gpt2():
    model, deep = GPT2(ARGS), 0.02 / (2 * ARGS.n_layers) ** 0.5
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        elif weight.dim() > 1:
            expected = deep if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert abs(weight.std() - expected) < 0.1 * expected


@pytest.mark.parametrize("change, message", [({"n_heads": 5}, "32 is not a multiple of n_heads 5"),
                                             ({"dim": 0}, "dim must be a positive integer"),
                                             ({"dropout": 1.0}, "dropout")])
def test_invalid_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ARGS, **change)


@pytest.mark.parametrize("value", ["x", [1], float("nan"), 0])
def test_invalid_norm_eps_is_refused(value):
    args = {**vars(ARGS), "norm_eps": value}
    with pytest.raises(UserError, match="invalid model_args"):
        checkpoint.load_model_args({"architecture": "gpt2", "model_args": args, "model": {}})


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(ValueError, match="25 tokens do not fit into max_seq_len 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


# ---- writing ------------------------------------------------------------------------------------

def test_engine_logits_equal_the_model(model):
    prompts = [[1, 5, 9, 30], [1], [1, 60, 2, 3, 4, 5, 6]]
    texts = [list(prompt) for prompt in prompts]
    for step in build_engine(model).generate(prompts, 15, SamplingParams(seed=2)):
        for text, token, logits in zip(texts, step.tokens, step.logits):
            torch.testing.assert_close(logits, model(torch.tensor([text]))[0, -1], **CLOSE)
            text.append(token)


def test_ragged_batch_equals_single_prompts(model):
    prompts, engine = [[1, 5, 9], [1, 7, 7, 7, 7, 7], [1, *range(60)]], build_engine(model)
    together = rows(engine.generate(prompts, 30, GREEDY), 3)
    assert together == [rows(engine.generate([prompt], 30, GREEDY), 1)[0] for prompt in prompts]
    assert together == [plain(model, prompt, 30) for prompt in prompts]


def test_scores_equal_the_model(model, tokens):
    ids = tokens[0].tolist()
    found = torch.cat(list(build_engine(model).logprobs(ids)))
    torch.testing.assert_close(found, model(tokens[:1, :-1])[0].log_softmax(-1), **CLOSE)


def test_dtypes_agree(model):
    prompts = [[1, 5, 9], [1, 7]]
    want = next(build_engine(model).generate(prompts, 1)).logits
    for options, share in [({"dtype": torch.bfloat16}, 0.1), ({"quantize": "int8"}, 0.1),
                           *[({"dtype": torch.float16}, 0.005)] * device._has_fbgemm()]:
        found = next(build_engine(model, **options).generate(prompts, 1)).logits
        assert (found - want).norm() < share * want.norm() and not torch.equal(found, want), options


def test_generated_text_equals_transformers(theirs, folder):
    """Compare from text to text: tokenizer, model and engine together."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)("One day", return_tensors="pt").input_ids
    written = theirs.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
    found = TextGenerator(folder, device="cpu", dtype="float32").completions(["One day"], 15, temperature=0)[0].tokens
    assert found == [token for token in written if token] and len(set(found)) > 2


def test_compile_on_a_cpu_needs_llama(folder):
    with pytest.raises(UserError, match="only Llama models"):
        TextGenerator(folder, device="cpu", compile=True)


# ---- folders ------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [None, {"vocab.json": "vocab.json", "merges.txt": "merges.txt"},
                                   {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}])
def test_ids_equal_transformers(folder, names):
    """Read tokenizer.json, and OpenAI's two files by either name."""
    theirs, copy = transformers.AutoTokenizer.from_pretrained(folder), changed(folder)
    if names:
        (copy / "tokenizer.json").unlink()
        for old, new in names.items():
            (copy / old).rename(copy / new)
    vocabulary = checkpoint.build_tokenizer(checkpoint.read_model(copy))
    end = theirs.convert_tokens_to_ids("<|endoftext|>")
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos) == (end, end, False)
    assert vocabulary.n_words == len(theirs) == ARGS.vocab_size
    for text in [*TEXTS, *demo_stories.generate_stories(5)]:
        ids = vocabulary.encode(text)
        assert ids == theirs(text, split_special_tokens=True).input_ids and vocabulary.decode(ids) == text


def test_names_without_a_prefix_and_masks_are_read(theirs, folder, tokens):
    copy = changed(folder)
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in theirs.state_dict().items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    safetensors.save_file(tensors, copy / "model.safetensors")
    model = checkpoint.build_model(checkpoint.read_model(copy), copy_weights=False)
    torch.testing.assert_close(model(tokens[:, :-1]), theirs(tokens[:, :-1]).logits, **CLOSE)


@pytest.mark.parametrize("config", [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True},
                                    {"n_inner": 50}, {"tie_word_embeddings": False}, {"scale_attn_weights": False}])
def test_unsupported_values_are_named(folder, config):
    with pytest.raises(UserError, match=" ".join(f"{name} {value!r}" for name, value in config.items())):
        checkpoint.read_model(changed(folder, **config))


def test_missing_tensors_are_listed(folder):
    copy = changed(folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"], tensors["transformer.wpe.weight"]
    safetensors.save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match="lacks 2 tensors: h.1.mlp.c_fc.bias, wpe.weight"):
        checkpoint.read_model(copy)


def test_convert_writes_only_pt(run_in_process, folder, tokens, model):
    run_in_process("convert", folder, "gpt2.pt")
    again = checkpoint.build_model(checkpoint.read_model("gpt2.pt"))
    assert torch.equal(again(tokens[:, :-1]), model(tokens[:, :-1]))
    assert checkpoint.model_state(again)["architecture"] == "gpt2"
    with pytest.raises(UserError, match="is a GPT-2; expected the format pt, not gguf"):
        run_in_process("convert", folder, "gpt2.gguf")


# ---- the download -------------------------------------------------------------------------------

@pytest.fixture
def released(folder, monkeypatch):
    """A server that serves the folder as gpt2 and counts requests; the first mirror does not exist."""
    place = Path("server/openai-community/gpt2/resolve/main")
    place.mkdir(parents=True)
    for name in gpt2_folder.FILES:
        (place / name).write_bytes((folder / name).read_bytes())
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append((Path(self.path).name, code))
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory="server"))
    threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(gpt2_folder, "MIRRORS", {"first": f"{url}/nowhere", "second": url})
    monkeypatch.setattr(download, "RETRIES", 0)
    yield asked
    http.shutdown()
    http.server_close()


def test_a_released_model_is_downloaded_once(released, capsys, run_in_process):
    run_in_process("sample", "--checkpoint", "gpt2", "--max_new_tokens", 3, "--device", "cpu")
    assert sorted(path.name for path in Path("data/gpt2").iterdir()) == sorted(gpt2_folder.FILES)
    assert [name for name, code in released if code == 200] == list(gpt2_folder.FILES)
    assert "parameters" in capsys.readouterr().err
    before = len(released)
    Path("data/gpt2/config.json").unlink()
    checkpoint.read_model("gpt2")
    assert [name for name, code in released[before:] if code == 200] == ["config.json"]


def test_local_folder_takes_precedence(released, folder):
    shutil.copytree(folder, "gpt2")
    checkpoint.read_model("gpt2")
    assert not released and not Path("data").exists()


def test_offline_error_lists_files_and_folder(monkeypatch):
    monkeypatch.setattr(gpt2_folder, "MIRRORS", {"gone": "http://127.0.0.1:9"})
    monkeypatch.setattr(download, "RETRIES", 0)
    with pytest.raises(UserError) as found:
        checkpoint.read_model("gpt2-medium")
    for part in (str(Path("data/gpt2-medium/config.json").resolve()), *gpt2_folder.FILES,
                 "http://127.0.0.1:9/openai-community/gpt2-medium/resolve/main/config.json"):
        assert part in str(found.value)
    assert not list(Path("data/gpt2-medium").iterdir())


# ---- training -----------------------------------------------------------------------------------

def test_fine_tuning(run_in_process, folder, capsys):
    """preprocess.py uses its vocabulary, where bos is eos; train.py writes a GPT-2 with lower loss."""
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, demo_stories.generate_stories(100))), encoding="utf-8")
    run_in_process("preprocess", "--tokenizer", folder, "--data", "texts.jsonl", "--num_workers", 1)
    few = ("--device", "cpu", "--compile", "False", "--batch_size", 8, "--sample_tokens", 5)
    run_in_process("train", "--eval_only", "--init_from", folder, *few)
    before = float(capsys.readouterr().out.rpartition("bits per byte ")[2])
    run_in_process("train", "--init_from", folder, "--max_iters", 15, "--warmup_iters", 2, "--learning_rate", 1e-2,
                   *few)
    run_in_process("train", "--eval_only", *few)
    assert float(capsys.readouterr().out.rpartition("bits per byte ")[2]) < before - 1
    generator = TextGenerator("output/ckpt.pt", device="cpu")
    assert generator.engine.args == ARGS and generator.sample("One day", max_new_tokens=5)[0].startswith("One day")
    with pytest.raises(UserError, match="size mismatch for positions.weight"):
        run_in_process("train", "--init_from", folder, "--max_seq_len", 25, *few)


def test_scoring_includes_eos_if_bos_is_eos():
    ids = np.array([7, 1, 2, 7, 7, 3, 7], dtype=np.uint16)
    assert shards.document_starts(ids).tolist() == [0, 4]
    assert [part.tolist() for part in dataset.find_windows(ids, 8)] == [[0, 4], [4, 7]]
    assert shards.document_starts(ids[:0]).tolist() == []
