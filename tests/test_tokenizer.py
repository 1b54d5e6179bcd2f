"""The tokenizer is lossless, has Llama 2's layout and does not change foreign models."""
import io
from pathlib import Path

import pytest
import sentencepiece
from conftest import learn_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import tokenizer
from tinyllm import demo_stories, project
from tinyllm.cli import UserError
from tokenizer import SPACE_MARK, Tokenizer

STORIES = list(demo_stories.generate_stories(300))
HARD = ["", " ", "  ", "a", " a", "a ", "  lead", "end  ", "a  b", "\n", "\na", "a\n", " \n\n  x\t\ty\n ", "\r\n",
        "你好，世界", "😀👍🏽", "e\u0301 é", "ﬁ½", "\u00a0\u3000\u200b", "\ufeff", "\x00", "\x1f",
        "a\x1fb", "\ufffd", SPACE_MARK,
        f"a{SPACE_MARK}b", f"{SPACE_MARK} {SPACE_MARK}{SPACE_MARK}a", f"\n{SPACE_MARK}\n", "<s></s><unk><0x0A>",
        "1234567890"]


@pytest.fixture(scope="module")
def vocabulary():
    return learn_tokenizer(STORIES, 600)


@pytest.fixture(scope="module")
def foreign():
    """A model with SentencePiece's defaults, which is like Llama 2's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(STORIES), model_writer=model, model_type="bpe",
                                             vocab_size=500, byte_fallback=True, minloglevel=2)
    return Tokenizer(model.getvalue())


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_round_trip(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode(vocabulary.encode(text, bos=True, eos=True)) == text


@hypothesis_settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(f" {SPACE_MARK}\n\tthe<>"))))
def test_any_text_round_trips(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_ids_have_the_layout_of_llama_2(vocabulary):
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, -1)
    assert [vocabulary.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [vocabulary.id_to_piece(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_bos_and_eos_only_on_request(vocabulary):
    plain = vocabulary.encode("Once upon a time")
    assert vocabulary.encode("Once upon a time", bos=True) == [1, *plain]
    assert vocabulary.encode("Once upon a time", eos=True) == [*plain, 2]
    assert vocabulary.encode("<s>") != [1] and not {1, 2} & set(vocabulary.encode("<s> </s>"))


def test_newline_and_digits_are_single_tokens(vocabulary):
    pieces = [vocabulary.id_to_piece(i) for i in range(259, vocabulary.n_words)]
    assert "\n" in pieces and not [p for p in pieces if len(p) > 1 and ("\n" in p or any(c.isdigit() for c in p))]
    assert [vocabulary.id_to_piece(i) for i in vocabulary.encode("a\n\nb")][-3:-1] == ["\n", "\n"]


def test_no_piece_crosses_a_word_border(vocabulary):
    pieces = [vocabulary.id_to_piece(i).lstrip(SPACE_MARK) for i in range(259, vocabulary.n_words)]
    assert not [piece for piece in pieces if SPACE_MARK in piece]


def test_newline_is_always_in_the_vocabulary():
    vocabulary = learn_tokenizer(["one two three"] * 3, 400)
    assert vocabulary.is_lossless and vocabulary.decode(vocabulary.encode("a\nb")) == "a\nb"


def test_a_batch_equals_one_by_one(vocabulary):
    texts = STORIES[:20] + HARD
    assert vocabulary.encode_batch(texts, bos=True, eos=True) == [vocabulary.encode(t, True, True) for t in texts]


def test_a_small_text_shrinks_the_vocabulary():
    small = learn_tokenizer(["the cat and the dog"], 4096)
    assert 259 < small.n_words < 300


def test_long_documents_are_not_skipped():
    """SentencePiece's default skips texts longer than 4192 bytes."""
    vocabulary = learn_tokenizer(["a b c", "zebra " * 3000], 300)
    assert "zebra" in {vocabulary.id_to_piece(i).lstrip(SPACE_MARK) for i in range(vocabulary.n_words)}


def test_rare_characters_become_bytes():
    text = "".join(chr(0x4E00 + i) for i in range(2000)) + "天地" * 50
    vocabulary = learn_tokenizer([text], 600)
    assert vocabulary.n_words == 600 and vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary.encode("天地")) <= 3


def test_training_is_deterministic(vocabulary):
    assert learn_tokenizer(STORIES, 600).sha256 == vocabulary.sha256


@pytest.mark.parametrize("size", [0, 100, 259, 262])
def test_too_small_vocab_size_is_refused(size):
    with pytest.raises(ValueError, match="too small"):
        learn_tokenizer(STORIES, size)


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no text"):
        learn_tokenizer([], 600)


def test_foreign_models_are_unchanged(foreign):
    assert not foreign.is_lossless
    plain = sentencepiece.SentencePieceProcessor(model_proto=foreign.model)
    for text in STORIES[:5] + HARD:
        ids = plain.encode(text)
        assert foreign.encode(text) == ids and foreign.decode(ids) == plain.decode(ids)


def test_a_model_loads_from_file_and_from_bytes(vocabulary, tmp_path):
    path = tmp_path / "tök.model"
    path.write_bytes(vocabulary.model)
    assert Tokenizer(path).sha256 == Tokenizer(vocabulary.model).sha256 == vocabulary.sha256


@pytest.mark.parametrize("content", [b"", b"no model", b"<html>" * 100])
def test_invalid_model_is_refused(content, tmp_path):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.model"):
        Tokenizer(path)
    with pytest.raises(UserError, match="bad.model"):
        project.load_tokenizer(path)


def test_cut_models_are_refused(vocabulary):
    for length in (1, 50, len(vocabulary.model) // 2, len(vocabulary.model) - 1):
        with pytest.raises(ValueError):
            Tokenizer(vocabulary.model[:length])


def test_missing_file_lists_existing_ones(vocabulary):
    with pytest.raises(FileNotFoundError):
        Tokenizer("tok512.model")
    Path("tok600.model").write_bytes(vocabulary.model)
    with pytest.raises(UserError, match="no tokenizer at tok512.model; did you mean tok600.model"):
        project.load_tokenizer("tok512.model")


def test_broken_unicode_is_an_error(vocabulary):
    with pytest.raises(ValueError, match="not UTF-8"):
        vocabulary.encode("a\udcff")


def test_vocab_size_is_an_alias_of_n_words(vocabulary):
    assert vocabulary.vocab_size == vocabulary.n_words == 600


def test_finding_the_vocabulary(vocabulary, tmp_path):
    with pytest.raises(UserError, match="train_vocab.py"):
        project.find_tokenizer(tmp_path)
    (tmp_path / "tok600.model").write_bytes(vocabulary.model)
    assert project.find_tokenizer(tmp_path) == tmp_path / "tok600.model"
    (tmp_path / "tok4096.model").write_bytes(vocabulary.model)
    with pytest.raises(UserError, match=r"several vocabularies \(600, 4096\)\n.*--vocab_size"):
        project.find_tokenizer(tmp_path)
    (tmp_path / "tok4096").mkdir()
    (tmp_path / "tok4096" / "manifest.json").touch()
    with pytest.raises(UserError, match=r"\(4096, 600\)\n.*--vocab_size"):
        project.find_tokenizer(tmp_path)
    with pytest.raises(UserError, match="of size 700 in .*, only 4096, 600\n *make one"):
        project.find_tokenizer(tmp_path, 700)
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="text.txt is a file; --data_dir names a folder"):
        project.find_tokenizer(tmp_path / "text.txt")
    assert project.find_tokenizer(tmp_path, 4096) == tmp_path / "tok4096.model"
    with pytest.raises(UserError, match="512"):
        project.find_tokenizer(tmp_path, 512)


@pytest.mark.parametrize("error", [UserError("stories.txt is not UTF-8"), KeyboardInterrupt()])
def test_errors_of_the_text_keep_their_type(error):
    """SentencePiece reads the text from C++ and would turn any exception into a RuntimeError."""
    class Broken(dict):
        def items(self):
            yield b" word", 3
            raise error
    with pytest.raises(type(error)) as found:
        tokenizer.train_tokenizer(Broken(), 512)
    assert found.value is error
