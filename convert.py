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
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from extras import formats
from extras.formats.huggingface import OUTPUT_FILES
from tinyllm import checkpoint, cli
from tinyllm.cli import UserError
from tinyllm.files import atomic_replace

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
ROUND_TRIP_TEXT = "Once upon a time, there were 25 cats.\n  They didn't say: \u00fc \u732b \U0001f600"


def main() -> None:
    cfg, _ = cli.parse_settings(globals(), positional=("source", "target"))
    targets, kind = check_settings(cfg)
    path = targets[0]
    state = formats.read_model(cfg.source, cfg.tokenizer)
    if state.get("architecture", "llama") != "llama" and kind != "pt":
        raise UserError(f"{cfg.source} is a GPT-2, which can be written as .pt alone, not as {kind}")
    expected = reference_logits(state)
    print(f"{cfg.source}: {describe(state)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as unfinished:
        write_model(state, Path(unfinished, path.name), kind)
        found, result = read_back(Path(unfinished, path.name))
        compare_logits(expected, result, kind)
        compare_tokenizers(state, found)
        for each in reversed(targets):
            install_target(Path(unfinished, each.name), each)
    print(f"wrote {' and '.join(map(str, targets))}\nnext: {cli.format_command('sample', checkpoint=targets[0])}")


def check_settings(cfg: SimpleNamespace) -> tuple[list[Path], str]:
    """The target with what comes beside it, and its format. Raises UserError for settings that cannot be."""
    if not cfg.source or not cfg.target:
        raise UserError("name a model that is there, and what to write: python convert.py output/ckpt.pt story.gguf")
    path = Path(cfg.target)
    kind = cfg.to if cfg.to != "auto" else BY_NAME.get(path.suffix.lower(), "")
    if kind not in formats.WRITERS:
        unknown = f"--to {cfg.to} is no format" if cfg.to != "auto" else f"{cfg.target} names none by how it ends"
        raise UserError(f"{unknown}; name one: --to {', '.join(formats.WRITERS)}")
    targets = formats.output_files(path, kind)
    for each in targets:
        others = [other for other in each.iterdir() if other.name not in OUTPUT_FILES] if each.is_dir() else []
        if others or each.exists() and each.is_dir() != (kind == "hf"):
            what = "a folder with other things in it" if each.is_dir() else "a file"
            raise UserError(f"{each} is {what}, which --force does not delete; another name")
        if each.exists() and not cfg.force:
            raise UserError(f"{each} is there already; another name, or --force")
    return targets, kind


def describe(state: dict[str, Any]) -> str:
    args = checkpoint.build_args(state)
    return (f"{state.get('architecture', 'llama')}, dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
            f"{args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, window {args.max_seq_len}")


@torch.inference_mode()
def reference_logits(state: dict[str, Any]) -> Tensor:
    """What the model makes of fixed ids, (1, T, vocab_size), computed in float32 whatever its weights are."""
    model = checkpoint.build_model(state, copy_weights=False)
    for part in model.modules():
        if list(part.parameters(recurse=False)):
            upcast_during_forward(part)
    ids = torch.arange(min(model.args.max_seq_len, 64)) * 7919 % model.args.vocab_size
    return model(ids[None])


def upcast_during_forward(part: nn.Module) -> None:
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


def write_model(state: dict[str, Any], path: Path, kind: str) -> None:
    """Write a state in a format. Raises UserError when that fails half-way, as on a full disk."""
    try:
        formats.WRITERS[kind](state, path)
    except OSError as error:
        raise UserError(f"{path.name} cannot be written: {error}; is the disk full?") from error


def read_back(path: Path) -> tuple[dict[str, Any], Tensor]:
    """A state that was written, without its tensors, and its logits.

    Nothing of the file stays mapped into memory: Windows would neither rename nor delete it.
    """
    found = formats.read_model(path)
    result = reference_logits(found)
    return {key: value for key, value in found.items() if key != "model"}, result


def install_target(unfinished: Path, target: Path) -> None:
    """Give what is finished its name. A folder that is there goes aside first, for it cannot be renamed over."""
    if not target.is_dir():
        atomic_replace(unfinished, target)
        return
    aside = unfinished.with_name(f"{target.name}.old")
    atomic_replace(target, aside)
    try:
        atomic_replace(unfinished, target)
    except BaseException:
        atomic_replace(aside, target)
        raise


def compare_tokenizers(source: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises UserError when a text has other ids than before."""
    if source.get("tokenizer"):
        ours, theirs = checkpoint.build_tokenizer(source), checkpoint.build_tokenizer(found)
        if ours.encode(ROUND_TRIP_TEXT, bos=True, eos=True) != theirs.encode(ROUND_TRIP_TEXT, bos=True, eos=True):
            raise UserError("the vocabulary gives other ids after writing; the target is not kept. Please report this")


def compare_logits(expected: Tensor, found: Tensor, kind: str) -> None:
    """Print how far the logits are apart. Raises UserError when that is too far."""
    difference, largest = (expected - found).abs().max().item(), expected.abs().max().item()
    print(f"largest difference of a logit: {difference:.2g}, the largest logit being {largest:.3g}")
    if not difference <= TOLERANCE.get(kind, EXACT) * max(largest, 1):
        raise UserError(f"that is more than {kind} may differ; the target is not kept. Please report this")


if __name__ == "__main__":
    cli.run_script(main)
