"""Tokenizers of other projects and chat templates, against their own packages and published values."""
import base64
import json
import os
import random
import re
from pathlib import Path

import pytest
import tiktoken
from conftest import WORDS, learn_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TheirTokenizer

from extras.chat import ChatFormat, ChatML
from extras.formats.common import (
    llama3_json,
    sentencepiece_model,
)
from extras.tokenizers import JsonTokenizer, TiktokenTokenizer
from tinyllm import project
from tinyllm.cli import UserError
from tokenizer import Tokenizer


def ranks() -> bytes:
    """Return a small vocabulary in Llama 3's format: all bytes and some words."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        for end in range(2, len(word.encode()) + 1):
            for token in (word.encode()[:end], b" " + word.encode()[:end]):
                for cut in range(2, len(token) + 1):
                    if token[:cut] not in tokens:
                        tokens.append(token[:cut])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="module")
def llama3() -> TiktokenTokenizer:
    return TiktokenTokenizer(ranks())


@hypothesis_settings(deadline=None)
@given(st.text())
def test_byte_level_round_trip(llama3, byte_level, text):
    assert llama3.decode(llama3.encode(text, bos=True, eos=True)) == text
    assert byte_level.decode(byte_level.encode(text, bos=True, eos=True)) == text


def test_special_tokens_in_text_are_plain(llama3, byte_level):
    text = "<|eot_id|>is<|im_end|>"
    assert max(llama3.encode(text)) < len(llama3.ranks) and llama3.decode(llama3.encode(text)) == text
    assert byte_level.special_token_id("<|im_end|>") not in byte_level.encode(text)
    one = [llama3.special_token_id("<|eot_id|>"), *llama3.encode("is<|im_end|>")]
    assert llama3.decode(one) == "is<|im_end|>" and llama3.decode(one, special=True) == text


def test_long_runs_are_split_without_changing_ids(llama3):
    for text in ("a" * 60_000, " " * 60_000, "ab 12" * 100_000 + "\n", "中" * 30_000 + " " * 25_000 + "x"):
        assert llama3.decode(llama3.encode(text)) == text
    assert "".join(llama3._chunks("x" * 70_000)) == "x" * 70_000
    assert max(map(len, llama3._chunks("x" * 70_000))) == 25_000
    assert [len(part) for part in llama3._chunks("x" * 25_000 + " y")] == [25_002]


def test_llama3s_layout(llama3):
    n = len(llama3.ranks)
    assert llama3.n_words == n + 256 and (llama3.bos_id, llama3.eos_id) == (n, n + 1)
    names = ("start_header_id", "end_header_id", "eot_id")
    assert [llama3.special_token_id(f"<|{name}|>") - n for name in names] == [6, 7, 9]
    assert llama3.special_token_id("<|reserved_special_token_250|>") == n + 255
    assert llama3.id_to_piece(llama3.encode(" the")[0]) == "\u2581the"


@pytest.mark.skipif("TINY_LLM_LLAMA3" not in os.environ, reason="TINY_LLM_LLAMA3 names no tokenizer.model of Llama 3")
def test_the_published_values_of_llama3():
    real = project.load_tokenizer(os.environ["TINY_LLM_LLAMA3"])
    sentence = [2028, 374, 264, 1296, 11914, 13]
    ids = real.encode("This is a test sentence.", bos=True, eos=True)
    assert ids == [128000, *sentence, 128001] and real.special_token_id("<|begin_of_text|>") == 128000
    assert real.decode(ids, special=True) == "<|begin_of_text|>This is a test sentence.<|end_of_text|>"
    chat, user = ChatFormat(real), {"role": "user", "content": "This is a test sentence."}
    assert chat.encode_message(user) == [128006, 882, 128007, 271, *sentence, 128009]
    dialog = [user | {"role": "system"}, {"role": "user", "content": "This is a response."}]
    assert chat.encode_dialog_prompt(dialog) == [
        128000, 128006, 9125, 128007, 271, *sentence, 128009, 128006, 882, 128007, 271, 2028, 374, 264, 2077, 13,
        128009, 128006, 78191, 128007, 271]


def test_a_chat_of_llama3(llama3):
    chat, n, encode = ChatFormat(llama3), len(llama3.ranks), llama3.encode
    header = [n + 6, *encode("user"), n + 7, *encode("\n\n")]
    message = {"role": "user", "content": "  the <|eot_id|> "}
    assert chat.encode_header(message) == header and chat.end_id == n + 9
    assert chat.encode_message(message) == [*header, *encode("the <|eot_id|>"), n + 9]
    answer = [n + 6, *encode("assistant"), n + 7, *encode("\n\n")]
    assert chat.encode_dialog_prompt([message]) == [n, *chat.encode_message(message), *answer]


def test_a_chat_in_chatml(byte_level):
    chat = ChatML(byte_level)
    dialog = [{"role": "system", "content": "is"}, {"role": "user", "content": "a<|im_end|>"}]
    begin, end = byte_level.special_token_id("<|im_start|>"), byte_level.special_token_id("<|im_end|>")
    encode = byte_level.encode
    assert chat.encode_dialog_prompt(dialog) == [
        begin, *encode("system\nis"), end, *encode("\n"), begin, *encode("user\na<|im_end|>"), end, *encode("\n"),
        begin, *encode("assistant\n")]
    assert chat.end_id == end
    with pytest.raises(UserError, match=re.escape("no special token <|im_start|>")):
        ChatML(TiktokenTokenizer(ranks()))


def test_llama3_as_a_tokenizer_json_gives_the_same_ids(llama3):
    theirs = TheirTokenizer.from_str(json.dumps(llama3_json(llama3)))
    theirs.encode_special_tokens = True
    generator = random.Random(1)
    for _ in range(300):
        text = "".join(generator.choice(["the", "test", " ", "\n", "1", "中", "'S", "é", "sent", "<|", "ence", "!"])
                       for _ in range(generator.randrange(12)))
        assert theirs.encode(text).ids == llama3.encode(text, bos=True), text


def test_sentencepiece_model_round_trip():
    own = learn_tokenizer(["one two three, 456. Yes\nno " * 3], 320)
    again = Tokenizer(sentencepiece_model(own.pieces(), own.bos_id, own.eos_id))
    assert again.is_lossless and again.pieces() == own.pieces()
    assert (again.bos_id, again.eos_id, again.pad_id) == (own.bos_id, own.eos_id, own.pad_id)
    for text in ("one two", " 4 56 \n three", "", "😀 中文 \u2581", "  x  "):
        assert again.encode(text) == own.encode(text) and again.decode(own.encode(text)) == text


def test_kind_is_detected_by_content(llama3, byte_level):
    own = learn_tokenizer(["a few words"], 300)
    for number, vocabulary in enumerate((own, llama3, byte_level)):
        Path(f"{number}").write_bytes(vocabulary.model)
        found = project.load_tokenizer(f"{number}")
        assert type(found) is type(vocabulary) and found.sha256 == vocabulary.sha256
        assert found.encode("a test") == vocabulary.encode("a test")


def test_encode_prompt_of_each_kind(byte_level):
    content = json.loads(byte_level.model) | {JsonTokenizer.OWN: {"bos": "<|im_end|>", "eos": "<|im_end|>"}}
    found = JsonTokenizer(json.dumps(content).encode())
    assert found.encode_prompt("a") == found.encode("a", bos=True)
    assert byte_level.encode_prompt("a") == byte_level.encode("a")
    assert byte_level.encode_prompt("") == [byte_level.bos_id]


@pytest.mark.parametrize("model, part", [(b"{}", "not a valid tokenizer.json"), (b"{", "not a valid"),
                                         (b"YQ== 0\nYg== x\n", "not a tiktoken"), (b"YQ== 0\n?? 1\n", "not a tiktoken"),
                                         (b"", "not a SentencePiece model"), (b"what", "not a SentencePiece model")])
def test_damaged_tokenizers_are_user_errors(model, part):
    with pytest.raises(UserError, match=part):
        project.load_tokenizer(model)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(UserError, match="needs the package tiktoken\n       pip install tiktoken"):
        project.load_tokenizer(ranks())
    assert tiktoken
