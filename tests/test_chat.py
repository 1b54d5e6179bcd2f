"""Chat: the prompts of the model, and the ends of its answers."""
import io
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from extras.chat import ChatML, chat_loop
from sample import TextGenerator
from tinyllm import cli
from tinyllm.cli import UserError
from tinyllm.engine import DecodeStep


class Scripted:
    """An engine that returns scripted answers and records its prompts."""
    args = SimpleNamespace(max_seq_len=1000)

    def __init__(self, vocabulary, answers: list[list[int]]):
        self.vocabulary, self.answers, self.read = vocabulary, list(answers), []

    def generate(self, prompts, max_new_tokens, params, stop_ids, sample_ids, with_logprobs):
        self.read += prompts
        for token in self.answers.pop(0)[:max_new_tokens]:
            if token in stop_ids:
                return
            yield DecodeStep([token], torch.zeros(1, self.vocabulary.n_words), [0.0])


@pytest.fixture
def talker(byte_level):
    generator = TextGenerator.__new__(TextGenerator)
    generator.tokenizer, generator.seed, generator.chat = byte_level, 1, ChatML(byte_level)
    end, encode = byte_level.special_token_id("<|im_end|>"), byte_level.encode
    generator.engine = Scripted(byte_level, [[*encode("a test"), end, *encode("more")], encode("the sentence")])
    return generator


def ids(vocabulary, *texts: str) -> list[int]:
    """Return the ids of texts and special tokens, as in the ChatML template."""
    marks = {name: vocabulary.special_token_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    return [i for text in texts for i in ([marks[text]] if text in marks else vocabulary.encode(text))]


def test_answer_ends_at_end_token(talker):
    dialog = [{"role": "system", "content": "is"}, {"role": "user", "content": "this?"}]
    assert "".join(talker.answer(dialog, max_new_tokens=50)) == "a test"
    assert talker.engine.read == [ids(
        talker.tokenizer, "<|im_start|>", "system\nis", "<|im_end|>", "\n", "<|im_start|>", "user\nthis?", "<|im_end|>",
        "\n", "<|im_start|>", "assistant\n")]
    talker.chat = None
    with pytest.raises(UserError, match="not a chat model"):
        talker.answer(dialog)


def test_dialogue_keeps_all_turns(talker, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("this<|im_end|>\n\nand is?\n/exit\n"))
    cfg, _ = cli.parse_settings(vars(sample), ["--system", "ing", "--max_new_tokens", "20"])
    chat_loop(talker, cfg)
    assert capsys.readouterr().out.endswith(">>> a test\n>>> >>> the sentence\n>>> ")
    first = ("<|im_start|>", "system\ning", "<|im_end|>", "\n", "<|im_start|>")
    begin = ids(talker.tokenizer, *first) + talker.tokenizer.encode("user\nthis<|im_end|>")     # typed: text, no mark
    again = ids(talker.tokenizer, "<|im_end|>", "\n", "<|im_start|>", "assistant\n")
    assert talker.engine.read[0] == begin + again
    assert talker.engine.read[1] == begin + again + ids(
        talker.tokenizer, "a test", "<|im_end|>", "\n", "<|im_start|>", "user\nand is?") + again


def test_long_dialogue_drops_oldest_turns(talker):
    talker.engine.args = SimpleNamespace(max_seq_len=120)
    turns = [{"role": role, "content": f"{role} {number} " + "is " * 5} for number in range(4)
             for role in ("user", "assistant")]
    dialog = [{"role": "system", "content": "is"}, *turns, {"role": "user", "content": "the last"}]
    assert "".join(talker.answer(dialog)) == "a test"
    text = talker.tokenizer.decode(talker.engine.read[0])
    assert len(talker.engine.read[0]) <= 90 and text.startswith("system\nis") and "the last" in text
    assert "user 0" not in text and "assistant 0" not in text and "assistant 3" in text
