"""Convert models: the same weights in another project's format.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf output/smol.pt    # in: a file or folder of another project
    python convert.py output/ckpt.pt output/hf                          # out: a folder for transformers
    python convert.py output/ckpt.pt output/story.gguf                  # for llama.cpp, Ollama, LM Studio
    python convert.py output/ckpt.pt output/story.bin                   # for llama2.c; also writes story.tokenizer.bin
    python convert.py model.bin output/story.pt --tokenizer tokenizer.bin

Inputs: checkpoints from train.py and llama2.c, folders from Meta (Llama 2 and 3) and Hugging Face (Llama, GPT-2), GGUF
files and llama2.c's .bin. convert.py reads its output back, compares the logits with the source's, and keeps the output
only if they agree within the rounding error of the format.
"""
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from tinyllm import checkpoint, cli, kernels, optional
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.device_errors import explain_device_errors
from tinyllm.files import atomic_replace

# ---- settings -----------------------------------------------------------------------------------
source = ""                     # the model to convert: a file or a folder
target = ""                     # the file or folder to write
to = "auto"                     # pt, hf, gguf, gguf-f16, gguf-q8_0, llama2c, llama2c-v1, llama2c-int8; auto: by the
                                # target's suffix: .pt, .gguf, .bin; hf for a name without a suffix
tokenizer = ""                  # tokenizer file; needed only if the source has no tokenizer
force = False                   # replace an existing target
# ---- end of settings ----------------------------------------------------------------------------

FORMAT_BY_SUFFIX = {".pt": "pt", ".gguf": "gguf", ".bin": "llama2c", "": "hf"}
# largest allowed logit difference, as a fraction of the largest logit
TOLERANCE = {"gguf-f16": 0.02, "gguf-q8_0": 0.1, "llama2c-int8": 0.1}
EXACT_TOLERANCE = 1e-4
ROUND_TRIP_TEXT = "Once upon a time, there were 25 cats.\n  They didn't say: \u00fc \u732b \U0001f600"


@explain_device_errors("convert on a machine with more memory")
def main() -> None:
    cfg, _ = cli.parse_settings(globals(), positional=("source", "target"))
    formats = optional.load("formats")
    kind = choose_format(cfg, formats)
    targets = formats.output_files(Path(cfg.target), kind)
    check_targets(targets, kind, cfg.force, formats.huggingface.OUTPUT_FILES)
    ckpt = checkpoint.read_model(cfg.source, cfg.tokenizer)
    if ckpt.get("architecture", "llama") != "llama" and kind != "pt":
        raise UserError(f"{cfg.source} is a GPT-2; expected the format pt, not {kind}")
    print(f"{cfg.source}: {describe(ckpt)}")
    if kind != "pt" and not kernels.model_is_original():
        print("note: model.py was edited; other programs compute the original model")
        formats.huggingface.check_weight_names(ckpt, cfg.source)
    convert(ckpt, targets, kind, formats)
    print(f"wrote {' and '.join(map(str, targets))}\nnext: {cli.format_command('sample', checkpoint=targets[0])}")


def convert(ckpt: Checkpoint, targets: list[Path], kind: str, formats: ModuleType) -> None:
    """Write a checkpoint to a temporary folder, read it back, compare it, and move it to its target."""
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
        del written["model"]            # Windows cannot rename or delete memory-mapped files
        compare_logits(expected, logits, kind)
        compare_tokenizers(ckpt, written)
        for target in reversed(targets):
            install_target(Path(folder, target.name), target)


# ---- checks -------------------------------------------------------------------------------------

def choose_format(cfg: SimpleNamespace, formats: ModuleType) -> str:
    """Return the format: --to, or the format of the target's suffix. Raises UserError if it is unknown."""
    if not cfg.source or not cfg.target:
        raise UserError("expected a source and a target\n       python convert.py output/ckpt.pt output/story.gguf")
    kind = FORMAT_BY_SUFFIX.get(Path(cfg.target).suffix.lower()) if cfg.to == "auto" else cfg.to
    if kind not in formats.WRITERS:
        raise UserError(f"{cfg.target} with --to {cfg.to} has no known format\n"
                        f"       use --to {', '.join(formats.WRITERS)}")
    return kind


def check_targets(targets: list[Path], kind: str, force: bool, folder_files: tuple[str, ...]) -> None:
    """Raise UserError if a target exists and must not be replaced. folder_files: file names of an hf target."""
    for target in filter(Path.exists, targets):
        others = [file for file in target.iterdir() if file.name not in folder_files] if target.is_dir() else []
        if others or target.is_dir() and kind != "hf":
            raise UserError(f"{target} is a folder, which --force does not delete\n       choose another target")
        if not target.is_dir() and kind == "hf":
            raise UserError(f"{target} is a file, which --force does not delete\n       choose another target")
        if not force:
            raise UserError(f"{target} exists already\n       choose another target, or pass --force")


def describe(ckpt: Checkpoint) -> str:
    args = checkpoint.load_model_args(ckpt)
    return (f"{ckpt.get('architecture', 'llama')}, dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
            f"{args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, context {args.max_seq_len}")


# ---- comparison ---------------------------------------------------------------------------------

@torch.inference_mode()
def reference_logits(ckpt: Checkpoint) -> Tensor:
    """Return the model's logits, (1, T, vocab_size), for fixed token ids, computed in float32."""
    model = checkpoint.build_model(ckpt, copy_weights=False).eval()        # without dropout
    for part in model.modules():
        upcast_during_forward(part)
    ids = torch.arange(min(model.args.max_seq_len, 64)) * 7919 % model.args.vocab_size
    return model(ids[None])


def upcast_during_forward(part: nn.Module) -> None:
    """Convert a module's weights to float32 only while it runs, so that a large model fits into memory."""
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
    """Raise UserError if the written tokenizer encodes ROUND_TRIP_TEXT differently."""
    if not source.get("tokenizer"):
        return
    ids = [checkpoint.build_tokenizer(ckpt).encode(ROUND_TRIP_TEXT, bos=True, eos=True) for ckpt in (source, written)]
    if ids[0] != ids[1]:
        raise UserError("the written tokenizer encodes text differently; the target was not written\n"
                        "       please report this bug")


def compare_logits(expected: Tensor, logits: Tensor, kind: str) -> None:
    """Print the largest logit difference. Raises UserError if it exceeds the tolerance of the format."""
    difference = (expected - logits).abs().max().item()
    largest = expected.abs().max().item()
    print(f"largest logit difference: {difference:.2g} (largest logit: {largest:.3g})")
    if not difference <= TOLERANCE.get(kind, EXACT_TOLERANCE) * max(largest, 1):        # also for NaN
        raise UserError(f"the difference exceeds the tolerance of {kind}; the target was not written\n"
                        "       please report this bug")


def install_target(unfinished: Path, target: Path) -> None:
    """Move a finished file or folder to its target. An existing folder moves out of the way first."""
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
