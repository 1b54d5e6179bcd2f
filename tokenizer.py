"""Text to token ids and back, with SentencePiece.

    tokenizer = Tokenizer("data/tok4096.model")
    ids = tokenizer.encode("Once upon a time", bos=True, eos=False)
    assert tokenizer.decode(ids) == "Once upon a time"

A vocabulary trained by `train` is byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) with
Llama 2's layout: 0 unknown, 1 bos, 2 eos, 3 to 258 the single bytes, then the learned pieces. It
loses nothing: every string comes back exactly. Models trained elsewhere keep their own behaviour.
"""
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from settings import UserError

SPACE = "\u2581"        # SentencePiece writes a space as this character
WALL = "\x1f"           # ends a word while training, and is dropped from the text
RESERVED = 3 + 256      # unknown, bos, eos, and a piece for each byte


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        n_words: size of the vocabulary; ids run from 0 to n_words - 1.
        bos_id, eos_id, pad_id: special ids, -1 where the model has none.
        exact: whether it was trained by `train`, so that no text is lost.
        model: the bytes of the model file; sha256: their digest in hex.
    """

    def __init__(self, model: str | Path | bytes):
        """Load a `.model` file, or its bytes. Raises UserError when it is not one."""
        self.model = model if isinstance(model, bytes) else _read(Path(model))
        name = "the tokenizer" if isinstance(model, bytes) else str(model)
        try:
            self._sp = SentencePieceProcessor(model_proto=self.model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} is not a SentencePiece model ({len(self.model)} bytes)") from error
        if not self.model or self._sp.vocab_size() == 0:
            raise UserError(f"{name} is an empty SentencePiece model")
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self.n_words: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = self._sp.pad_id()
        self.exact = self._sp.encode("\n", out_type=str) == [SPACE, "\n"]   # only `train` makes a piece of it

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a string, between bos and eos if asked for."""
        return self.encode_batch([s], bos, eos)[0]

    def encode_batch(self, texts: list[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """Ids of each string; faster than one call each."""
        head, tail = [self.bos_id] * bos, [self.eos_id] * eos
        batch = self._sp.encode(texts)
        for i, text in enumerate(texts):
            if self.exact and SPACE in text:
                batch[i] = self._encode_with_space_mark(text)
        return [head + ids + tail for ids in batch]

    def _encode_with_space_mark(self, text: str) -> list[int]:
        """Encode a text that holds the very character that stands for a space: spell it in bytes.

        What follows it must not get the space that SentencePiece puts before a text. A newline is
        always a piece of its own, so "\\n" + rest encodes to [space, newline, *ids of the bare rest].
        """
        first, *rest = text.split(SPACE)
        ids = self._sp.encode(first) or self._sp.encode("\n")[:1]
        for part in rest:
            ids += [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            ids += self._sp.encode("\n" + part)[2:]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; special ids are left out, unfinished characters become U+FFFD."""
        return self._sp.decode(ids)

    def piece(self, token: int) -> str:
        """The text of one entry of the vocabulary, a space shown as U+2581."""
        return self._sp.id_to_piece(token)


def train(documents: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """Train byte-pair encoding on documents.

    A space begins a word, a newline and a digit stand alone, and no text is normalised. Where the
    text has more distinct characters than fit, the commonest get half of the room and the others
    are spelled in bytes.

    Args:
        documents: returns a fresh iterator over the text each time it is called.
        vocab_size: entries at most; a small text may not have as many.
    Raises:
        UserError: when there is no text, or vocab_size has no room for characters.
    """
    room = vocab_size - RESERVED
    if room < 4:
        raise UserError(f"--vocab_size {vocab_size} is too small: {RESERVED} entries are taken by the bytes and "
                        "special ids; try 512 or more")
    try:
        return _train(documents(), vocab_size)
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise UserError("there is no text to train a vocabulary on") from error
        if "smaller than required_chars" not in str(error):
            raise
    counts = Counter(character for text in documents() for character in text.replace(" ", SPACE))
    rare = [character for character, _ in counts.most_common()[room // 2:]]
    walls = dict.fromkeys(map(ord, rare), WALL)
    return _train((text.translate(walls) for text in documents()), vocab_size)


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    model, failures = io.BytesIO(), []

    def sentences() -> Iterator[str]:
        try:
            for text in texts:
                yield text.replace("\n", f"{WALL}\n{WALL}")
        except (Exception, KeyboardInterrupt) as error:     # SentencePiece would turn it into one of its own
            failures.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model,
            model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
            byte_fallback=True, split_digits=True, required_chars="\n", pretokenization_delimiter=WALL,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, max_sentence_length=1 << 30, minloglevel=2)
    except RuntimeError:
        if failures:
            raise failures[0] from None
        raise
    return Tokenizer(model.getvalue())


def find(data_dir: str | Path, vocab_size: int = 0, sha256: str = "") -> Path:
    """The vocabulary of a data folder: the one of that size, or the only one, or of several that with the digest.

    Raises:
        UserError: when there is none, or several and nothing tells which.
    """
    folder = Path(data_dir)
    found = sorted(folder.glob("tok*.model"))
    if vocab_size:
        found = [path for path in found if path.stem == f"tok{vocab_size}"]
    elif len(found) > 1 and sha256:
        found = [path for path in found if hashlib.sha256(path.read_bytes()).hexdigest() == sha256] or found
    if not found:
        size = f" of size {vocab_size}" if vocab_size else ""
        command = f"python train_vocab.py{f' --vocab_size {vocab_size}' if vocab_size else ''}"
        raise UserError(f"no vocabulary{size} in {folder.resolve()}\n       make one: {command}")
    if len(found) > 1:
        sizes = ", ".join(path.stem.removeprefix("tok") for path in found)
        raise UserError(f"{folder} holds several vocabularies ({sizes})\n       say which: "
                        f"--vocab_size {sizes.split(', ')[0]}")
    return found[0]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}")
    return path.read_bytes()
