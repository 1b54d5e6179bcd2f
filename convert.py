"""Weights in and out: the same model as a file of another project.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf output/smol.pt    # in: from a file or folder of others
    python convert.py output/ckpt.pt output/hf                          # out: a folder for transformers
    python convert.py output/ckpt.pt story.gguf                         # for llama.cpp, Ollama, LM Studio
    python convert.py output/ckpt.pt story.bin                          # for llama2.c; beside it story.tokenizer.bin
    python convert.py model.bin output/story.pt --tokenizer tokenizer.bin

What is read: our checkpoints and those of llama2.c; folders of Meta (Llama 2 and 3) and Hugging Face (Llama, GPT-2);
GGUF; llama2.c's .bin. After writing, the target is read again and its logits are compared with those of the source:
what differs by more than its number format explains is not kept.
"""
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
import formats
import settings
from files import replace
from formats.huggingface import WRITTEN
from settings import UserError

# ---- settings -----------------------------------------------------------------------------------
source = ""                     # a model that is there: a file or a folder
target = ""                     # what to write
to = "auto"                     # pt, hf, gguf, gguf-f16, gguf-q8_0, llama2c, llama2c-v1, llama2c-int8; auto: by the
                                # name of the target: .pt, .gguf, .bin, and a folder for hf
tokenizer = ""                  # file of the vocabulary, where the source has none
force = False                   # replace a target that is there
# ---- end of settings ----------------------------------------------------------------------------

BY_NAME = {".pt": "pt", ".gguf": "gguf", ".bin": "llama2c", "": "hf"}
# the largest difference of a logit, as a share of the largest logit
TOLERANCE = {"gguf-f16": 0.02, "gguf-q8_0": 0.1, "llama2c-int8": 0.1}
EXACT = 1e-4


def main() -> None:
    cfg, _ = settings.read(globals(), positional=("source", "target"))
    targets, kind = check_settings(cfg)
    path = targets[0]
    state = formats.read(cfg.source, cfg.tokenizer)
    if state.get("architecture", "llama") != "llama" and kind != "pt":
        raise UserError(f"{cfg.source} is a GPT-2, which can be written as .pt alone, not as {kind}")
    expected = logits(state)
    print(f"{cfg.source}: {describe(state)}")
    unfinished = path.with_name(path.name + ".tmp")         # a folder, for there may be several files
    remove(unfinished)
    try:
        unfinished.mkdir(parents=True)
        formats.WRITERS[kind](state, unfinished / path.name)
        compare(expected, logits(formats.read(unfinished / path.name)), kind)
        for each in reversed(targets):
            if each.is_dir():       # it cannot be renamed over
                replace(each, unfinished / f"{each.name}.old")
            replace(unfinished / each.name, each)
    finally:
        remove(unfinished)
    print(f"wrote {' and '.join(map(str, targets))}")


def check_settings(cfg: SimpleNamespace) -> tuple[list[Path], str]:
    """The target with what comes beside it, and its format. Raises UserError for settings that cannot be."""
    if not cfg.source or not cfg.target:
        raise UserError("name a model that is there, and what to write: python convert.py output/ckpt.pt story.gguf")
    path = Path(cfg.target)
    kind = cfg.to if cfg.to != "auto" else BY_NAME.get(path.suffix, "")
    if kind not in formats.WRITERS:
        raise UserError(f"--to {cfg.to} is no format for {path.name}; there are {', '.join(formats.WRITERS)}")
    targets = formats.targets(path, kind)
    for each in targets:
        if each.exists() and not cfg.force:
            raise UserError(f"{each} is there already; another name, or --force")
        others = [path.name for path in each.iterdir() if path.name not in WRITTEN] if each.is_dir() else []
        if others or each.is_dir() and kind != "hf":
            raise UserError(f"{each} is a folder with other things in it; --force does not delete those. Another name")
    return targets, kind


def describe(state: dict[str, Any]) -> str:
    args = checkpoint.build_model(state, own=False).args
    return (f"{state.get('architecture', 'llama')}, dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
            f"{args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, window {args.max_seq_len}")


@torch.inference_mode()
def logits(state: dict[str, Any]) -> Tensor:
    """What the model makes of fixed ids, (1, T, vocab_size), computed in float32 whatever its weights are."""
    model = checkpoint.build_model(state, own=False)
    for part in model.modules():
        if list(part.parameters(recurse=False)):
            lend_float32(part)
    ids = torch.arange(min(model.args.max_seq_len, 64)) * 7919 % model.args.vocab_size
    return model(ids[None])


def lend_float32(part: nn.Module) -> None:
    """Have float32 weights while it runs, so that a large model is not all in float32 at once."""
    kept: dict[str, Tensor] = {}

    def before(part: nn.Module, _: Any) -> None:
        for name, weight in part.named_parameters(recurse=False):
            kept[name], weight.data = weight.data, weight.data.float()

    def after(part: nn.Module, *_: Any) -> None:
        for name, weight in part.named_parameters(recurse=False):
            weight.data = kept.pop(name)

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after)


def compare(expected: Tensor, found: Tensor, kind: str) -> None:
    """Print how far the logits are apart. Raises UserError when that is too far."""
    difference, largest = (expected - found).abs().max().item(), expected.abs().max().item()
    print(f"largest difference of a logit: {difference:.2g}, the largest logit being {largest:.3g}")
    if not difference <= TOLERANCE.get(kind, EXACT) * max(largest, 1):
        raise UserError(f"that is more than {kind} may differ; the target is not kept. Please report this")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    settings.run(main)
