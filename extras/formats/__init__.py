"""Models in the files of other projects: each becomes a state as in checkpoint.py, and a state becomes each of them.

    state = formats.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    formats.WRITERS["hf"](state, Path("output/smol"))

A reader gives, beside `model` and `model_args`, whose names are those of model.py, the vocabulary and the `chat`
format that the model was trained for. Tensors stay in their file, mapped into memory, wherever they need no change.
"""
import struct
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from extras.formats import gguf_file, gpt2_folder, huggingface, llama2c, meta
from tinyllm import checkpoint
from tinyllm.cli import UserError
from tinyllm.project import load_tokenizer
from tokenizer import BaseTokenizer

State = dict[str, Any]
FAILURES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
            struct.error)               # of a reader, whose file is damaged: it can be in any way

WRITERS: dict[str, Callable[[State, Path], None]] = {
    "pt": lambda state, path: checkpoint.save_checkpoint(path, state),
    "hf": huggingface.write,
    "llama2c": partial(llama2c.write, version=0),
    "llama2c-v1": partial(llama2c.write, version=1),
    "llama2c-int8": partial(llama2c.write, version=2),
    "gguf": partial(gguf_file.write, kind="F32"),
    "gguf-f16": partial(gguf_file.write, kind="F16"),
    "gguf-q8_0": partial(gguf_file.write, kind="Q8_0"),
}


def read_model(source: str | Path, tokenizer: str | Path = "") -> State:
    """Read a model of any format; which one it is, the content says.

    Args:
        source: a file or folder; or a model of gpt2_folder.RELEASED, which is downloaded to data/.
        tokenizer: the file of its vocabulary, where the source has none.
    Raises:
        UserError: when the source is missing, damaged, or of a kind that cannot be represented; it says what.
    """
    path = Path(source)
    if not path.exists() and str(source) in gpt2_folder.RELEASED:
        path = gpt2_folder.download(str(source), "data")
    if not path.exists() and (close := get_close_matches(str(source), gpt2_folder.RELEASED, 1)):
        raise UserError(f"no checkpoint at {path.resolve()}; did you mean {close[0]}, which is downloaded?")
    try:
        reader = _reader(path)
        if not reader and path.suffix == ".model":
            raise UserError(f"{path} is a vocabulary, which step 1 writes; a model is the ckpt.pt that step 3 writes")
        state = (reader or checkpoint.load_checkpoint)(path)
        checkpoint.build_args(state, path)
    except FAILURES as error:
        raise UserError(f"{path} is damaged, or not what it seems: {error!r}") from error
    return checkpoint.with_tokenizer(state, source, tokenizer) if tokenizer else state


def output_files(path: Path, kind: str) -> list[Path]:
    """What the writer of a format leaves: its path, and what it puts beside it."""
    return [path, llama2c.vocabulary_path(path)] if kind.startswith("llama2c") else [path]


def is_model(path: str | Path) -> bool:
    """Whether it is a model: by its content, or a name of RELEASED. Raises UserError for a folder that is none."""
    path = Path(path)
    return bool(path.exists() and _reader(path)) or str(path) in gpt2_folder.RELEASED


def read_tokenizer(path: str | Path) -> BaseTokenizer:
    """A vocabulary from its file, or from a model that has it inside. Raises UserError when there is none."""
    path = Path(path)
    if is_model(path):
        return checkpoint.build_tokenizer(read_model(path))
    model = llama2c.read_vocabulary(path)
    return load_tokenizer(model or path)


def _reader(path: Path) -> Callable[[Path], State] | None:
    """What reads a file or folder, by its content; None for a file that does not look like a model."""
    if path.is_dir():
        return _folder_reader(path)
    if not path.is_file():
        raise checkpoint.missing_checkpoint_error(path)
    with open(path, "rb") as file:
        begin = file.read(4)
    known = {b"GGUF": gguf_file.read, llama2c.MAGIC: llama2c.read, b"PK\3\4": partial(checkpoint.load_checkpoint, mmap=True)}
    return known.get(begin) or (llama2c.read if llama2c.is_legacy(path) else None)


def _folder_reader(path: Path) -> Callable[[Path], State]:
    if (path / "config.json").is_file():
        return gpt2_folder.read if huggingface.architecture_of(path) == "GPT2LMHeadModel" else huggingface.read
    if (path / "params.json").is_file():
        return meta.read
    if (path / "ckpt.pt").is_file():
        raise UserError(f"{path} is the folder of a training; its model is {path / 'ckpt.pt'}")
    if inside := sorted(str(file) for file in path.iterdir() if file.suffix in (*checkpoint.SUFFIXES, ".model")):
        raise UserError(f"{path} is a folder; in it there is {', '.join(inside[:5])}")
    raise UserError(f"{path} has neither a config.json (Hugging Face) nor a params.json (Meta), so it is no model")
