"""Tokenizers other than SentencePiece: Hugging Face's tokenizer.json, and Llama 3's tokenizer.model.

`tinyllm.project.load_tokenizer` chooses the class by file content. Requires the packages tokenizers and tiktoken.
"""
import base64
import binascii
import json
import re
from collections.abc import Iterator

from tinyllm.optional import require_package
from tokenizer import SPACE_MARK, BaseTokenizer


class JsonTokenizer(BaseTokenizer):
    """A Hugging Face `tokenizer.json` (package tokenizers).

    The format does not name bos and eos; our files store them, with add_bos, under the extra key OWN.
    """
    OWN = "tiny-llm"

    def __init__(self, model: bytes):
        """Load a tokenizer.json. Raises UserError if the package is missing, ValueError if the bytes are invalid."""
        super().__init__(model)
        tokenizers = require_package("tokenizers", "a tokenizer.json")
        try:
            content = json.loads(model)
            meta = content.pop(self.OWN, {})
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:          # the package raises plain Exception
            raise ValueError(f"not a valid tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True        # encode "<s>" in a text as plain text
        self.n_words = self._tokenizer.get_vocab_size()
        self.bos_id = self.special_token_id(meta["bos"]) if meta.get("bos") else -1
        self.eos_id = self.special_token_id(meta["eos"]) if meta.get("eos") else -1
        self.add_bos = self.bos_id >= 0 and meta.get("add_bos", True)
        self._is_byte_level = b'"ByteLevel"' in model

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def id_to_piece(self, token: int) -> str:
        text = self.decode([token]).replace(" ", SPACE_MARK) if self._is_byte_level else ""
        return text or self._tokenizer.id_to_token(token) or ""

    def special_token_id(self, special: str) -> int:
        token = self._tokenizer.token_to_id(special)
        return super().special_token_id(special) if token is None else token


class TiktokenTokenizer(BaseTokenizer):
    """Llama 3's tokenizer (package tiktoken): a base64 token and its rank per line, plus 256 special tokens.

    Pattern and special tokens are from meta-llama/llama3.
    """
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
               "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
               *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]
    # split long texts and runs: the pattern's time and stack grow with the square of a run's length
    MAX_CHUNK_CHARS = 400_000
    LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")

    def __init__(self, model: bytes):
        """Load Llama 3's file. Raises UserError if the package is missing, ValueError if the bytes are invalid."""
        super().__init__(model)
        tiktoken = require_package("tiktoken", "Llama 3's tokenizer")
        self.ranks = _read_ranks(model)
        self.special = {name: len(self.ranks) + i for i, name in enumerate(self.SPECIAL)}
        self._encoding = tiktoken.Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=self.ranks,
                                           special_tokens=self.special)
        self.n_words = self._encoding.n_vocab
        self.bos_id = self.special_token_id("<|begin_of_text|>")
        self.eos_id = self.special_token_id("<|end_of_text|>")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._encode_text(text) for text in texts]

    def _encode_text(self, text: str) -> list[int]:
        ids = []
        for chunk in self._chunks(text):
            ids += self._encoding.encode_ordinary(chunk)
        return ids

    def _chunks(self, text: str) -> Iterator[str]:
        for start in range(0, len(text), self.MAX_CHUNK_CHARS):
            part = text[start:start + self.MAX_CHUNK_CHARS]
            begin = 0
            for run in self.LONG_RUN.finditer(part):
                yield part[begin:run.end()]
                begin = run.end()
            yield part[begin:]

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Return the text of the ids. special: include the names of special tokens."""
        kept = ids if special else [i for i in ids if i < len(self.ranks)]
        return self._encoding.decode_bytes(kept).decode("utf-8", errors="replace")

    def id_to_piece(self, token: int) -> str:
        return self.decode([token], special=True).replace(" ", SPACE_MARK)

    def special_token_id(self, special: str) -> int:
        return self.special[special] if special in self.special else super().special_token_id(special)


def _read_ranks(model: bytes) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in model.splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"not a tiktoken file: {error}") from error
