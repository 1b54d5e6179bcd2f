"""Plain implementations of steps 1 and 2: the references for tests and bench.py.

    python tests/plain.py vocabulary stories 4096 plain.model       # all text as sentences to SentencePiece
    python tests/plain.py shards stories plain.model out 2          # json.load, a list of ids per document, 2 processes

Reads folders of .json files that are lists of objects with the key `story`.
"""
import io
import json
import sys
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

WALL = "\x1f"


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train SentencePiece on texts: newlines are single pieces, tabs have none."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\n", f"{WALL}\n{WALL}").replace("\t", WALL) for text in texts),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
        byte_fallback=True, split_digits=True, required_chars="\n", pretokenization_delimiter=WALL,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, max_sentence_length=1 << 30, minloglevel=2)
    return model.getvalue()


def pieces(model: bytes) -> list[str]:
    """Return all entries of a vocabulary in order."""
    processor = SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def stories(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [entry["story"].strip() for entry in json.load(file)]


def write_shard(path: Path, model: Path, target: Path) -> None:
    processor = SentencePieceProcessor(model_file=str(model))
    ids: list[int] = []
    for story in stories(path):
        ids.extend([processor.bos_id(), *processor.encode(story), processor.eos_id()])
    np.array(ids, np.uint16).tofile(target)


def main(step: str, folder: str, what: str, target: str, processes: str = "1") -> None:
    paths = sorted(Path(folder).glob("*.json"))
    if step == "vocabulary":
        Path(target).write_bytes(learn_tokenizer((story for path in paths for story in stories(path)), int(what)))
        return
    Path(target).mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(int(processes)) as pool:
        pool.starmap(write_shard, [(path, Path(what), Path(target, path.stem + ".bin")) for path in paths], chunksize=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
