"""Models in the files of other projects: each becomes a state as in checkpoint.py, and a state becomes each of them.

    state = formats.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    formats.WRITERS["hf"](state, Path("output/smol"))

A reader gives, beside `model` and `model_args`, whose names are those of model.py, the vocabulary and the `chat`
format that the model was trained for. Tensors stay in their file, mapped into memory, wherever they need no change.
"""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint
import tokenizer as tokenizers
from formats import gguf_file, huggingface, llama2c, meta
from settings import UserError
from tokenizer import Tokenizer, Vocabulary

State = dict[str, Any]

WRITERS: dict[str, Callable[[State, Path], None]] = {
    "pt": lambda state, path: checkpoint.save(path, state),
    "hf": huggingface.write,
    "llama2c": partial(llama2c.write, version=0),
    "llama2c-v1": partial(llama2c.write, version=1),
    "llama2c-int8": partial(llama2c.write, version=2),
    "gguf": partial(gguf_file.write, kind="F32"),
    "gguf-f16": partial(gguf_file.write, kind="F16"),
    "gguf-q8_0": partial(gguf_file.write, kind="Q8_0"),
}


def read(source: str | Path, tokenizer: str | Path = "") -> State:
    """Read a model of any format; which one it is, the content says.

    Args:
        source: a file or folder.
        tokenizer: the file of its vocabulary, where the source has none.
    Raises:
        UserError: when the source is missing, damaged, or of a kind that cannot be represented; it says what.
    """
    path = Path(source)
    if path.is_dir():
        state = _folder_reader(path)(path)
    elif not path.is_file():
        raise UserError(f"no checkpoint at {path.resolve()}\n       python train.py makes one")
    else:
        with open(path, "rb") as file:
            begin = file.read(4)
        readers = {b"GGUF": gguf_file.read, llama2c.MAGIC: llama2c.read}
        if begin not in readers and llama2c.is_legacy(path):
            readers[begin] = llama2c.read
        state = readers.get(begin, checkpoint.load)(path)
    return with_vocabulary(state, read_vocabulary(tokenizer), source) if tokenizer else state


def targets(path: Path, kind: str) -> list[Path]:
    """What the writer of a format leaves: its path, and what it puts beside it."""
    return [path, llama2c.vocabulary_path(path)] if kind.startswith("llama2c") else [path]


def read_vocabulary(path: str | Path) -> Vocabulary:
    """A vocabulary from its file, of any kind. Raises UserError when it is none."""
    model = llama2c.read_vocabulary(Path(path))
    return Tokenizer(model) if model else tokenizers.load(path)


def with_vocabulary(state: State, vocabulary: Vocabulary, source: str | Path) -> State:
    """The state with a vocabulary given from outside. Raises UserError when it is not the one of the state."""
    if state.get("tokenizer_sha256", vocabulary.sha256) != vocabulary.sha256:
        raise UserError(f"this is not the vocabulary that {source} was trained with\n"
                        "       leave --tokenizer out: the right one is inside")
    if vocabulary.n_words != state["model_args"]["vocab_size"]:
        raise UserError(f"the vocabulary has {vocabulary.n_words} entries, the model "
                        f"{state['model_args']['vocab_size']}; they do not belong together")
    return {**state, "tokenizer": vocabulary.model, "tokenizer_sha256": vocabulary.sha256}


def _folder_reader(path: Path) -> Callable[[Path], State]:
    for name, reader in (("config.json", huggingface.read), ("params.json", meta.read)):
        if (path / name).is_file():
            return reader
    raise UserError(f"{path} has neither a config.json (Hugging Face) nor a params.json (Meta), so it is no model")
