"""Convert models: the same weights in another project's format.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf output/smol.pt    # in: a file or folder of another project
    python convert.py output/ckpt.pt output/hf                          # out: a folder for transformers
    python convert.py output/ckpt.pt story.gguf                         # for llama.cpp, Ollama, LM Studio
    python convert.py output/ckpt.pt story.bin                          # for llama2.c; beside it story.tokenizer.bin
    python convert.py model.bin output/story.pt --tokenizer tokenizer.bin

It reads our checkpoints and llama2.c's, folders of Meta (Llama 2 and 3) and Hugging Face (Llama, GPT-2), GGUF files and
llama2.c's .bin. It reads what it has written and compares the logits with the source's. A target that differs by more
than its dtype explains is not kept.
"""
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from tinyllm import checkpoint, cli, kernels, optional
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.files import atomic_replace

# ---- settings -----------------------------------------------------------------------------------
source = ""                     # the model: a file or a folder
target = ""                     # what to write
to = "auto"                     # pt, hf, gguf, gguf-f16, gguf-q8_0, llama2c, llama2c-v1, llama2c-int8; auto: by the
                                # name of the target: .pt, .gguf, .bin, and a folder for hf
tokenizer = ""                  # file of the tokenizer, if the source has none
force = False                   # replace an existing target
# ---- end of settings ----------------------------------------------------------------------------

FORMAT_BY_SUFFIX = {".pt": "pt", ".gguf": "gguf", ".bin": "llama2c", "": "hf"}
# the largest difference of a logit, as a share of the largest logit
TOLERANCE = {"gguf-f16": 0.02, "gguf-q8_0": 0.1, "llama2c-int8": 0.1}
EXACT_TOLERANCE = 1e-4
ROUND_TRIP_TEXT = "Once upon a time, there were 25 cats.\n  They didn't say: \u00fc \u732b \U0001f600"


def main() -> None:
    cfg, _ = cli.parse_settings(globals(), positional=("source", "target"))
    formats = optional.load("formats")
    kind = choose_format(cfg, formats)
    targets = formats.output_files(Path(cfg.target), kind)
    check_targets(targets, kind, cfg.force, formats.huggingface.OUTPUT_FILES)
    ckpt = checkpoint.read_model(cfg.source, cfg.tokenizer)
    if ckpt.get("architecture", "llama") != "llama" and kind != "pt":
        raise UserError(f"{cfg.source} is a GPT-2, which can be written as .pt alone, not as {kind}")
    print(f"{cfg.source}: {describe(ckpt)}")
    if kind != "pt" and not kernels.model_is_original():
        print("note: model.py was edited; other programs compute the original model")
        formats.huggingface.check_weight_names(ckpt, cfg.source)
    convert(ckpt, targets, kind, formats)
    print(f"wrote {' and '.join(map(str, targets))}\nnext: {cli.format_command('sample', checkpoint=targets[0])}")


def convert(ckpt: Checkpoint, targets: list[Path], kind: str, formats: ModuleType) -> None:
    """Write a checkpoint to a temporary folder, read it back, compare, and give it its name."""
    expected = reference_logits(ckpt)
    path = targets[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        try:
            formats.WRITERS[kind](ckpt, unfinished)
        except OSError as error:
            raise UserError(f"{path.name} cannot be written: {error}; is the disk full?") from error
        written = checkpoint.read_model(unfinished)
        logits = reference_logits(written)
        del written["model"]            # Windows neither renames nor deletes a file that is mapped into memory
        compare_logits(expected, logits, kind)
        compare_tokenizers(ckpt, written)
        for target in reversed(targets):
            install_target(Path(folder, target.name), target)


# ---- checks -------------------------------------------------------------------------------------

def choose_format(cfg: SimpleNamespace, formats: ModuleType) -> str:
    """Return the format to write: --to, or by the suffix of the target."""
    if not cfg.source or not cfg.target:
        raise UserError("name a model and what to write: python convert.py output/ckpt.pt story.gguf")
    kind = FORMAT_BY_SUFFIX.get(Path(cfg.target).suffix.lower()) if cfg.to == "auto" else cfg.to
    if kind not in formats.WRITERS:
        raise UserError(f"{cfg.target} with --to {cfg.to} names no format; use --to {', '.join(formats.WRITERS)}")
    return kind


def check_targets(targets: list[Path], kind: str, force: bool, folder_files: tuple[str, ...]) -> None:
    """Raise UserError for an existing target that may not be replaced. folder_files: the files of a written folder."""
    for target in filter(Path.exists, targets):
        others = [file for file in target.iterdir() if file.name not in folder_files] if target.is_dir() else []
        if others or target.is_dir() and kind != "hf":
            raise UserError(f"{target} is a folder with other things in it, which --force does not delete; "
                            "another name")
        if not target.is_dir() and kind == "hf":
            raise UserError(f"{target} is a file, which --force does not delete; another name")
        if not force:
            raise UserError(f"{target} is there already; another name, or --force")


def describe(ckpt: Checkpoint) -> str:
    args = checkpoint.load_model_args(ckpt)
    return (f"{ckpt.get('architecture', 'llama')}, dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
            f"{args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, window {args.max_seq_len}")


# ---- comparison ---------------------------------------------------------------------------------

@torch.inference_mode()
def reference_logits(ckpt: Checkpoint) -> Tensor:
    """Return the model's logits for fixed ids, (1, T, vocab_size), computed in float32 whatever its dtype is."""
    model = checkpoint.build_model(ckpt, copy_weights=False).eval()        # without dropout
    for part in model.modules():
        upcast_during_forward(part)
    ids = torch.arange(min(model.args.max_seq_len, 64)) * 7919 % model.args.vocab_size
    return model(ids[None])


def upcast_during_forward(part: nn.Module) -> None:
    """Give a module float32 weights while it runs, so that a large model is never in float32 as a whole."""
    stored = {name: weight.data for name, weight in part.named_parameters(recurse=False)}

    def upcast(part: nn.Module, *_) -> None:
        for name, data in stored.items():
            getattr(part, name).data = data.float()

    def restore(part: nn.Module, *_) -> None:
        for name, data in stored.items():
            getattr(part, name).data = data

    part.register_forward_pre_hook(upcast)
    part.register_forward_hook(restore)


def compare_tokenizers(source: Checkpoint, written: Checkpoint) -> None:
    """Raise UserError if the text has other ids than before."""
    if not source.get("tokenizer"):
        return
    ids = [checkpoint.build_tokenizer(ckpt).encode(ROUND_TRIP_TEXT, bos=True, eos=True) for ckpt in (source, written)]
    if ids[0] != ids[1]:
        raise UserError("the tokenizer gives other ids after writing; the target is not kept. Please report this")


def compare_logits(expected: Tensor, logits: Tensor, kind: str) -> None:
    """Print the largest difference of the logits. Raises UserError if it is too large."""
    difference = (expected - logits).abs().max().item()
    largest = expected.abs().max().item()
    print(f"largest difference of a logit: {difference:.2g}, the largest logit being {largest:.3g}")
    if not difference <= TOLERANCE.get(kind, EXACT_TOLERANCE) * max(largest, 1):        # also for NaN
        raise UserError(f"that is more than {kind} may differ; the target is not kept. Please report this")


def install_target(unfinished: Path, target: Path) -> None:
    """Give a finished file or folder its name. A folder cannot be renamed over, so an old one is moved away first."""
    if not target.is_dir():
        atomic_replace(unfinished, target)
        return
    old = unfinished.with_name(f"{target.name}.old")
    atomic_replace(target, old)
    try:
        atomic_replace(unfinished, target)
    except BaseException:
        atomic_replace(old, target)
        raise


if __name__ == "__main__":
    cli.run_script(main)
