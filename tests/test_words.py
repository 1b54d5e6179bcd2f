"""Word-by-word processing gives the same pieces and ids as whole texts."""
import io
import re
from collections import Counter

import plain
import pytest
import sentencepiece
from conftest import count_words, learn_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_tokenizer import HARD

from tinyllm import demo_stories, documents, words
from tinyllm.words import DocumentEncoder, WordCounts, WordTable
from tokenizer import Tokenizer

STORIES = list(demo_stories.generate_stories(300))
ODD = ["a  b   c d e \n\n x \x1f y z q\r\n", "  lead", "café 中文 字 中文 hello中文", "\n\nx\n  y \n",
       "tab\tand\t\ttab\n\tt", "0123 4567", "\x00 nul",
       "e\u0301 ﬁ½ \u00a0\u3000\u200b \ufeff", "😀👍🏽", "▁a ▁ b"] * 2
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\tthe<>e \u2581")))
LISTS = st.lists(st.one_of(TEXTS, st.sampled_from(STORIES[:9])), max_size=9)


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return learn_tokenizer(STORIES, 600)


def foreign(texts=tuple(text.replace("\n", " ") for text in STORIES), **options) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter(texts), "model_writer": model, "model_type": "bpe", "vocab_size": 500,
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "minloglevel": 2, **options})
    return Tokenizer(model.getvalue())


def plain_ids(vocabulary: Tokenizer, texts: list[str]) -> list[int]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    return [i for text in texts for i in [processor.bos_id(), *processor.encode(text), processor.eos_id()]]


# ---- the vocabulary -----------------------------------------------------------------------------

@pytest.mark.parametrize("size", [400, 600, 2000])
def test_pieces_equal_whole_text(size):
    texts = STORIES + ODD
    assert plain.pieces(learn_tokenizer(texts, size).model) == plain.pieces(plain.learn_tokenizer(texts, size))


@hypothesis_settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("ab  \n\té中7"), min_size=1), min_size=1, max_size=30))
def test_pieces_of_any_text_equal_whole_text(texts):
    texts = [text for text in texts if text.strip("\n\t")]
    if texts:
        assert plain.pieces(learn_tokenizer(texts, 320).model) == plain.pieces(plain.learn_tokenizer(texts, 320))


def test_ids_equal_plain_training(vocabulary):
    """The model file alone must produce these ids, in any program that reads it."""
    model = plain.learn_tokenizer(STORIES, 600)
    assert plain_ids(vocabulary, STORIES[:50] + HARD) == plain_ids(Tokenizer(model), STORIES[:50] + HARD)


# ---- counting -----------------------------------------------------------------------------------

def by_hand(texts: list[str]) -> Counter:
    found = Counter()
    for text in texts:
        found.update(word.encode() for word in re.findall(r" *[^ \n]+| +|\n", " " + text.replace("\u2581", " ")))
    return found


@hypothesis_settings(max_examples=300, deadline=None)
@given(texts=LISTS)
def test_words_are_counted(texts):
    assert count_words(texts) == by_hand(texts)


def test_words_are_counted_in_parts(monkeypatch):
    """Includes a table that restarts often and has no room for many words."""
    monkeypatch.setattr(words, "MAX_WORDS", 50)
    monkeypatch.setattr(documents, "BATCH_BYTES", 300)
    texts = STORIES + ["a word of more than fifteen bytes: " + "x" * n for n in range(40)]
    assert count_words(texts) == by_hand(texts)


def test_counts_add_up():
    one, two = WordCounts(), WordCounts()
    one.add([text.encode() for text in STORIES[:100]])
    two.add([text.encode() for text in STORIES[100:]])
    one.flush()
    two.flush()
    one.merge(two)
    assert one.counts == by_hand(STORIES) and one.n_pruned == 0


def test_rare_words_are_dropped_to_save_memory(monkeypatch):
    every = by_hand(STORIES)
    monkeypatch.setattr(words, "MAX_COUNT_BYTES", sum(150 + 8 * len(word) for word in every) - 1)
    found = WordCounts()
    found.add([text.encode() for text in STORIES])
    found.flush()
    assert len(found.counts) + found.n_pruned == len(every) and len(every) / 3 < len(found.counts) < 2 * len(every) / 3
    assert all(every[word] == count for word, count in found.counts.items())
    assert min(found.counts.values()) >= max(count for word, count in every.items() if word not in found.counts)


# ---- the numbers of words -----------------------------------------------------------------------

def test_word_numbers_are_unique():
    """The words differ in length, in the last byte or in trailing zeros."""
    alike = ["a", "a\0", "a\0\0", "abcdefg", "abcdefgh", "abcdefghi", "abcdefghijklmn", "abcdefghijklmno", "abcdefg\0",
             "abcdefgh\0", "abcdefghijklmnop", "abcdefghijklmnoq", "", "\n", " ", "é", "ê"]
    table, texts = WordTable(), [text.encode() for text in alike]
    first, begins, new = table.assign_ids(texts)
    again, _, newer = table.assign_ids(texts)
    short = [i for i, text in enumerate(texts) if len(text) < 15]
    assert [new[n - 1] for n in first] == [word for text in texts for word in words_of(text)]
    assert all((first[begins[i]] == again[begins[i]]) for i in short)
    assert newer == [b" " + text for text in texts if len(text) >= 15]      # these are numbered each time


def words_of(text: bytes) -> list[bytes]:
    return [word.encode() for word in re.findall(r" *[^ \n]+| +|\n", " " + text.decode())]


def test_words_outside_the_table_are_counted_and_encoded(monkeypatch, vocabulary):
    monkeypatch.setattr(words, "_N_SLOTS", 64)
    assert count_words(STORIES) == by_hand(STORIES)
    ids = DocumentEncoder(vocabulary).encode([text.encode() for text in STORIES])
    assert ids.tolist() == plain_ids(vocabulary, STORIES)


# ---- encoding -----------------------------------------------------------------------------------

@hypothesis_settings(max_examples=300, deadline=None)
@given(texts=LISTS)
def test_ids_equal_whole_texts(vocabulary, texts):
    want = [i for ids in vocabulary.encode_batch(texts, bos=True, eos=True) for i in ids]
    encoder = DocumentEncoder(vocabulary)
    assert encoder.is_wordwise
    assert encoder.encode([text.encode() for text in texts]).tolist() == want
    if "\u2581" not in "".join(texts):
        assert want == plain_ids(vocabulary, texts)


@hypothesis_settings(max_examples=200, deadline=None)
@given(texts=LISTS)
def test_ids_of_foreign_vocabulary_equal_whole_texts(texts):
    assert DocumentEncoder(FOREIGN).encode([text.encode() for text in texts]).tolist() == plain_ids(FOREIGN, texts)


FOREIGN = foreign()             # as Llama 2's: a newline is spelled as a byte


def test_hard_texts_and_a_table_that_restarts(monkeypatch, vocabulary):
    assert words.is_wordwise(FOREIGN) and not FOREIGN.is_lossless
    monkeypatch.setattr(words, "MAX_WORDS", 20)
    for own in (vocabulary, FOREIGN):
        encoder = DocumentEncoder(own)
        for texts in [STORIES, HARD, [*STORIES[:3], *HARD], [], [""], *([text] for text in HARD)]:
            want = [i for ids in own.encode_batch(texts, bos=True, eos=True) for i in ids]
            assert encoder.encode([text.encode() for text in texts]).tolist() == want


@pytest.mark.parametrize("options", [
    {"model_type": "unigram"}, {"byte_fallback": False}, {"treat_whitespace_as_suffix": True},
    {"split_by_whitespace": False, "vocab_size": 900}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True},
    {"normalization_rule_name": "nmt_nfkc"}, {"user_defined_symbols": ["a b"]},
    {"texts": ["x\n\ny"] * 50, "hard_vocab_limit": False}])
def test_vocabulary_that_needs_whole_texts(options):
    vocabulary = foreign(**options)
    encoder = DocumentEncoder(vocabulary)
    assert not encoder.is_wordwise and not vocabulary.is_lossless
    texts = STORIES[:20] + HARD
    assert encoder.encode([text.encode() for text in texts]).tolist() == plain_ids(vocabulary, texts)
