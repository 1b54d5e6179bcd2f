"""Read other projects' models as a Checkpoint, and write a Checkpoint in their formats.

    ckpt = formats.read_model(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    formats.WRITERS["hf"](ckpt, Path("output/smol"))

A reader returns `model` and `model_args` with the names of model.py, the tokenizer, and the name of the chat template.
Tensors stay memory-mapped unless a reader must convert them.
"""
import struct
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from extras.formats import gguf_file, gpt2_folder, huggingface, llama2c, meta
from tinyllm import checkpoint
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.project import load_tokenizer
from tokenizer import BaseTokenizer

# exceptions that readers raise for a damaged file
FAILURES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
            struct.error)


def write_checkpoint(ckpt: Checkpoint, path: Path) -> None:
    checkpoint.save_checkpoint(path, ckpt)


WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "pt": write_checkpoint,
    "hf": huggingface.write,
    "llama2c": partial(llama2c.write, version=0),
    "llama2c-v1": partial(llama2c.write, version=1),
    "llama2c-int8": partial(llama2c.write, version=2),
    "gguf": partial(gguf_file.write, kind="F32"),
    "gguf-f16": partial(gguf_file.write, kind="F16"),
    "gguf-q8_0": partial(gguf_file.write, kind="Q8_0"),
}


def read_model(source: Path) -> Checkpoint:
    """Read another project's model: a file, a folder, or a name in gpt2_folder.RELEASED (downloaded to data/).

    Raises UserError if the source is missing, damaged or not supported.
    """
    path = find_source(source)
    if path.suffix == ".model":
        raise UserError(f"{path} is a tokenizer; expected a model, such as the ckpt.pt that train.py writes")
    try:
        reader = choose_reader(path) or checkpoint.load_checkpoint
        return reader(path)
    except FAILURES as error:
        raise UserError(f"{path} is damaged or not a model: {error!r}") from error


def find_source(path: Path) -> Path:
    """Return the path of a model. Downloads the models in gpt2_folder.RELEASED."""
    name = str(path)
    if path.exists():
        return path
    if name in gpt2_folder.RELEASED:
        return gpt2_folder.download(name, "data")
    similar = get_close_matches(name, gpt2_folder.RELEASED, 1)
    if similar:
        raise UserError(f"no checkpoint at {path.resolve()}; did you mean the released model {similar[0]}?")
    raise checkpoint.missing_checkpoint_error(path)


def output_files(path: Path, kind: str) -> list[Path]:
    """Return the files that the writer of a format creates: `path`, and a tokenizer for llama2.c."""
    return [path, llama2c.tokenizer_path(path)] if kind.startswith("llama2c") else [path]


def is_model(path: Path) -> bool:
    """True if `path` is a model file, a model folder or a name in RELEASED. Raises UserError for other folders."""
    return str(path) in gpt2_folder.RELEASED or path.exists() and choose_reader(path) is not None


def read_tokenizer(path: Path) -> BaseTokenizer:
    """Read a tokenizer file in any format. Raises UserError for other files."""
    return load_tokenizer(llama2c.read_tokenizer(path) or path)


def choose_reader(path: Path) -> Callable[[Path], Checkpoint] | None:
    """Return the reader for the content of a file or folder; None for a file in no known format."""
    if path.is_dir():
        return choose_folder_reader(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return gguf_file.read
    return llama2c.read if magic == llama2c.MAGIC or llama2c.is_legacy(path) else None


def choose_folder_reader(path: Path) -> Callable[[Path], Checkpoint]:
    if (path / "config.json").is_file():
        is_gpt2 = huggingface.architecture_of(path) == "GPT2LMHeadModel"
        return gpt2_folder.read if is_gpt2 else huggingface.read
    if (path / "params.json").is_file():
        return meta.read
    if (path / "ckpt.pt").is_file():
        raise UserError(f"{path} is an output folder of train.py; the model is {path / 'ckpt.pt'}")
    suffixes = (*checkpoint.SUFFIXES, ".model")
    models = sorted(str(file) for file in path.iterdir() if file.suffix in suffixes)
    if models:
        raise UserError(f"{path} is a folder; expected a file in it, such as {', '.join(models[:5])}")
    raise UserError(f"{path} is not a model folder; expected a config.json (Hugging Face) or a params.json (Meta)")
