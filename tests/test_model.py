"""The model against a reference from the formulas, against transformers, and against itself."""
import math

import pytest
import torch

from model import ModelArgs, Transformer, rope_frequencies

SMALL = dict(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=97, max_seq_len=40, multiple_of=16)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CLOSE = dict(rtol=1e-4, atol=1e-4)      # kernels differ in rounding from one CPU to the next; logits are of order 2


def build(**changes) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(ModelArgs(**{**SMALL, **changes})).eval()
    for weight in model.parameters():           # larger than at the start of training, so that errors show
        torch.nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, SMALL["vocab_size"], (3, 25), generator=torch.Generator().manual_seed(2))


def reference(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Return the logits of one sequence from the papers' formulas: float64, token by token, without batches."""
    args = model.args
    w = {name: weight.detach().double() for name, weight in model.named_parameters()}
    w.setdefault("output.weight", w["tok_embeddings.weight"])

    def norm(x, gain):
        return x / torch.sqrt((x * x).mean() + args.norm_eps) * gain

    def rotate(x, position):            # x: one head; pairs (x[0], x[1]), (x[2], x[3]), ... as complex numbers
        pairs = torch.complex(x[0::2], x[1::2])
        angles = torch.tensor([position * args.rope_theta ** (-2 * i / len(x)) for i in range(len(pairs))]).double()
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.stack((turned.real, turned.imag), 1).flatten()

    stream = [w["tok_embeddings.weight"][i] for i in ids]
    for n in range(args.n_layers):
        layer = {name.removeprefix(f"layers.{n}."): weight for name, weight in w.items() if f"layers.{n}." in name}
        keys, values, out = [], [], []
        for position, x in enumerate(stream):
            x = norm(x, layer["attention_norm.weight"])
            q = (layer["attention.wq.weight"] @ x).reshape(args.n_heads, -1)
            k = (layer["attention.wk.weight"] @ x).reshape(args.n_kv_heads, -1)
            keys.append([rotate(head, position) for head in k])
            values.append((layer["attention.wv.weight"] @ x).reshape(args.n_kv_heads, -1))
            heads = []
            for h in range(args.n_heads):
                shared = h * args.n_kv_heads // args.n_heads
                query = rotate(q[h], position)
                scores = torch.stack([query @ key[shared] / math.sqrt(args.head_dim) for key in keys])
                chances = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
                heads.append(sum(chance * value[shared] for chance, value in zip(chances, values)))
            out.append(stream[position] + layer["attention.wo.weight"] @ torch.cat(heads))
        for position, x in enumerate(out):
            x = norm(x, layer["ffn_norm.weight"])
            gate, up = layer["feed_forward.w1.weight"] @ x, layer["feed_forward.w3.weight"] @ x
            stream[position] = out[position] + layer["feed_forward.w2.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    return torch.stack([w["output.weight"] @ norm(x, w["norm.weight"]) for x in stream])


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 6}, {"n_kv_heads": 1}, {"tie_embeddings": False},
                                     {"rope_theta": 500.0, "norm_eps": 1e-3, "hidden_dim": 50}])
def test_logits_equal_the_formulas(tokens, changes):
    model = build(**changes)
    logits = model(tokens)
    for row in range(len(tokens)):
        torch.testing.assert_close(logits[row].double(), reference(model, tokens[row].tolist()), **CLOSE)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_logits_and_gradients_equal_transformers(tokens, scaling):
    transformers = pytest.importorskip("transformers")
    model = build(rope_scaling=scaling)
    args = model.args
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_dim, rms_norm_eps=args.norm_eps,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=args.max_seq_len, tie_word_embeddings=True,
        rope_parameters={**rope, "rope_type": "llama3", **scaling} if scaling else rope)).eval()

    def halves(weight, heads):          # their pairs are (i, i + D/2), ours (2i, 2i + 1)
        return weight.unflatten(0, (heads, args.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
             "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
             "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    state = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight,
             "lm_head.weight": model.output.weight}
    for name, weight in model.named_parameters():
        if name.startswith("layers."):
            number, part = name.split(".")[1], name.split(".")[-2]
            heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(part)
            state[f"model.layers.{number}.{names[part]}.weight"] = halves(weight, heads) if heads else weight
    theirs.load_state_dict({name: weight.detach() for name, weight in state.items()})

    logits, loss = model(tokens[:, :-1]), model(tokens[:, :-1], tokens[:, 1:])
    other = theirs(input_ids=tokens[:, :-1])
    torch.testing.assert_close(logits, other.logits, **CLOSE)
    loss.backward()
    torch.nn.functional.cross_entropy(other.logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    mine, their = model.layers[1].feed_forward.w2.weight.grad, theirs.model.layers[1].mlp.down_proj.weight.grad
    torch.testing.assert_close(mine, their, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(model.tok_embeddings.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3,
                               atol=2e-5)


def test_rope_scaling_equals_llama_3():
    """Low frequencies are divided by the factor, high ones kept, and those between interpolated."""
    plain = rope_frequencies(ModelArgs(dim=128, n_heads=1, n_kv_heads=1, rope_theta=500_000.0))
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    scaled = rope_frequencies(ModelArgs(dim=128, n_heads=1, n_kv_heads=1, rope_theta=500_000.0, rope_scaling=scaling))
    for slow, speed in zip(scaled.tolist(), plain.tolist()):
        wave = 2 * math.pi / speed
        if wave < 8192 / 4:
            assert slow == speed
        elif wave > 8192:
            assert slow == pytest.approx(speed / 8)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            assert slow == pytest.approx((1 - smooth) * speed / 8 + smooth * speed)


@torch.no_grad()
def test_causality(tokens):
    model = build()
    before = model(tokens)
    for at in (1, 12, 24):
        changed = tokens.clone()
        changed[:, at:] = (changed[:, at:] + 1) % 97
        after = model(changed)
        assert torch.equal(before[:, :at], after[:, :at]) and not torch.equal(before[:, at], after[:, at])


def test_loss_is_the_mean_over_scored_targets(tokens):
    model = build()
    targets = tokens.roll(-1, 1).clone()
    targets[:, -5:] = -1
    logits, loss = model(tokens), model(tokens, targets)
    chances = logits.log_softmax(-1)[:, :-5].gather(2, targets[:, :-5, None])
    torch.testing.assert_close(loss, -chances.mean())


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=256, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=512))
    small = 0.02 / math.sqrt(2 * 8)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            want = small if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0.02
            assert weight.std().item() == pytest.approx(want, rel=0.03), name
            assert abs(weight.mean().item()) < 0.05 * want + 1e-4, name
        else:
            assert (weight == 1).all(), name


def test_default_model_is_unchanged():
    model = Transformer(ModelArgs())
    assert model.count_parameters() == 8_483_616 and model.args.ffn_dim == 768 and model.args.head_dim == 48
    assert model.flops_per_token() == 6 * 8_483_616 + 6 * 8 * 288 * 256
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {"tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.7.feed_forward.w1.weight",
            "layers.3.ffn_norm.weight", "norm.weight", "output.weight"} <= names
    assert model.output.weight is model.tok_embeddings.weight


def test_feed_forward_width_follows_llama():
    assert ModelArgs(dim=4096, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3).ffn_dim == 14336
    assert ModelArgs(dim=4096, n_heads=32, n_kv_heads=32, multiple_of=256).ffn_dim == 11008
    assert ModelArgs(hidden_dim=1000).ffn_dim == 1000


@pytest.mark.parametrize("changes, message", [
    ({"n_heads": 7}, "dim 48 is not a multiple of n_heads 7"), ({"n_kv_heads": 4}, "n_heads 6 is not a multiple"),
    ({"dim": 30, "n_heads": 2}, "odd"), ({"n_layers": 0}, "n_layers must be a positive integer"),
    ({"dropout": 1.0}, "dropout"), ({"max_seq_len": 64.0}, "max_seq_len must be a positive integer")])
def test_invalid_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{**SMALL, **changes})


def test_too_many_tokens_are_refused_with_both_numbers():
    model = build()
    with pytest.raises(ValueError, match="41 tokens do not fit into max_seq_len 40"):
        model(torch.zeros((1, 41), dtype=torch.long))
    with pytest.raises(ValueError, match="41 tokens"):
        model.generate(torch.zeros((1, 30), dtype=torch.long), 12)


def test_dropout_only_in_training(tokens):
    model = build(dropout=0.5)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_generate_takes_the_likeliest_token_at_temperature_0(tokens):
    model = build()
    story = model.generate(tokens[:, :5], 8, temperature=0)
    for i in range(5, 13):
        logits = model(story[:, :i])
        assert torch.equal(logits[:, -1].argmax(-1), story[:, i])
    assert torch.equal(model.generate(tokens[:, :5], 8, temperature=0.7, top_k=1), story)
    torch.manual_seed(4)
    wild = model.generate(tokens[:, :5], 8, temperature=2.0)
    torch.manual_seed(4)
    assert torch.equal(model.generate(tokens[:, :5], 8, temperature=2.0, top_k=10**6), wild)    # more than there are
    assert wild.shape == (3, 13) and torch.equal(wild[:, :5], tokens[:, :5]) and not torch.equal(wild, story)
