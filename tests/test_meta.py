"""Meta's folders, with weights in one file and in several."""
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import learn_tokenizer

from extras import formats
from model import ModelArgs, Transformer
from tinyllm import checkpoint
from tinyllm.cli import UserError

SCALED = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@pytest.fixture
def vocabulary():
    return learn_tokenizer(["a few words"], 300)


def publish(vocabulary, parts: int, tie: bool = False, axis_of_embedding: int = 0, **params) -> Transformer:
    """Write a random model to the folder `llama` in Meta's format, with every matrix in `parts` parts."""
    torch.manual_seed(3)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocabulary.n_words, multiple_of=8,
                     ffn_dim_multiplier=1.3, tie_embeddings=tie, rope_theta=params.get("rope_theta", 10000.0),
                     rope_scaling=SCALED if params.get("use_scaled_rope") else None)
    model, folder = Transformer(args), Path("llama")
    folder.mkdir()
    for number in range(parts):
        part = {"rope.freqs": torch.ones(4)}
        for name, weight in model.state_dict().items():
            if weight.dim() == 1:
                part[name] = weight.bfloat16()
            elif not (tie and name == "output.weight"):
                axis = axis_of_embedding if "tok_emb" in name else int(name.endswith(("wo.weight", "w2.weight")))
                part[name] = weight.chunk(parts, axis)[number].clone().bfloat16()
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    known = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 8,
             "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(known | params), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(vocabulary.model)
    return model


@pytest.mark.parametrize("parts, options", [
    (1, {}), (2, {"axis_of_embedding": 1}), (4, {"rope_theta": 500000.0}), (2, {"tie": True, "use_scaled_rope": True,
                                                                               "rope_scaling_factor": 8})])
def test_split_model_equals_the_model(vocabulary, parts, options):
    model, state = publish(vocabulary, parts, **options), checkpoint.read_model("llama")
    assert all(torch.equal(state["model"][name], weight.bfloat16()) for name, weight in model.state_dict().items())
    ids = torch.arange(50)[None] * 3 % vocabulary.n_words
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build_model(state)(ids), model.bfloat16().float()(ids))
    assert state["tokenizer_sha256"] == vocabulary.sha256


def test_defaults_for_missing_params(vocabulary):
    publish(vocabulary, 1, use_scaled_rope=True, rope_theta=500000.0)
    args = checkpoint.read_model("llama")["model_args"]
    assert args["max_seq_len"] == 131072 and args["rope_scaling"]["factor"] == 32           # as small as Llama 3.2
    params = json.loads(Path("llama/params.json").read_text(encoding="utf-8"))
    assert formats.meta.read_params(params | {"dim": 4096}, [{}], 9)["rope_scaling"] == SCALED
    assert formats.meta.read_params({**params, "use_scaled_rope": False}, [{}], 9)["max_seq_len"] == 8192
    del params["use_scaled_rope"], params["rope_theta"], params["n_kv_heads"], params["ffn_dim_multiplier"]
    old = formats.meta.read_params(params, [{"output.weight": 0}], 9)
    assert (old["rope_theta"], old["n_kv_heads"], old["ffn_dim_multiplier"], old["max_seq_len"]) == (1e4, 4, 1, 4096)
    assert not old["tie_embeddings"] and old["vocab_size"] == 9


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("it_ran",))


def test_damaged_folders_are_user_errors(vocabulary):
    publish(vocabulary, 2)
    first, second = Path("llama/consolidated.00.pth"), Path("llama/consolidated.01.pth")
    whole = second.read_bytes()

    def refused(part: str) -> None:
        with pytest.raises(UserError, match=part):
            checkpoint.read_model("llama")
    second.unlink()
    refused("has 1 parts of")
    second.write_bytes(whole[:-500])
    refused("is damaged")
    torch.save({"tok_embeddings.weight": Payload()}, second)
    refused("is damaged")
    assert not Path("it_ran").exists()
    torch.save({name: weight for name, weight in torch.load(first).items() if "wq" not in name}, second)
    refused("lacks 2 tensors: layers.0.attention.wq.weight")
    second.write_bytes(whole)
    path = Path("llama/params.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"n_layers": 10**9}), encoding="utf-8")
    refused(r"lacks \d+ tensors: layers.10")
    path.write_text('{"dim": 32}', encoding="utf-8")
    refused("llama is damaged.*KeyError\\('n_layers'\\)")
    for path in (first, second):
        path.unlink()
    refused("no consolidated.00.pth")
