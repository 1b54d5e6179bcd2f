"""The forms in which models were taught to talk: messages in, ids out.

    chat = FORMATS["llama3"](tokenizer)
    ids = chat.encode_dialog_prompt([{"role": "user", "content": "Why is the sky blue?"}])

A message is a dict with role (system, user or assistant) and content. What looks like a special token in a content is
text. An answer ends at `end_id`.
"""
from tinyllm.cli import UserError
from tokenizer import BaseTokenizer

Message = dict[str, str]


class ChatFormat:
    """Llama 3's form, as in meta-llama/llama3."""
    STARTS_WITH_BOS = True
    MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def __init__(self, tokenizer: BaseTokenizer):
        """Raises UserError when the vocabulary has not the special tokens of the form."""
        self.tokenizer = tokenizer
        self.marks = [tokenizer.special_token_id(mark) for mark in self.MARKS]
        self.end_id = self.marks[-1]

    def encode_header(self, message: Message) -> list[int]:
        """What says whose turn it is."""
        begin, end, _ = self.marks
        return [begin, *self.tokenizer.encode(message["role"]), end, *self.tokenizer.encode("\n\n")]

    def encode_message(self, message: Message) -> list[int]:
        return [*self.encode_header(message), *self.tokenizer.encode(message["content"].strip()), self.end_id]

    def encode_dialog_prompt(self, dialog: list[Message]) -> list[int]:
        """A dialog so far, and the header of the answer that is to come."""
        ids = [i for message in dialog for i in self.encode_message(message)]
        return [self.tokenizer.bos_id] * self.STARTS_WITH_BOS + ids + self.encode_header({"role": "assistant"})


class ChatML(ChatFormat):
    """The form of SmolLM2, Qwen and others: <|im_start|>role, a line's end, the content, <|im_end|>."""
    STARTS_WITH_BOS = False
    MARKS = ("<|im_start|>", "<|im_end|>")

    def encode_header(self, message: Message) -> list[int]:
        return [self.marks[0], *self.tokenizer.encode(message["role"] + "\n")]

    def encode_message(self, message: Message) -> list[int]:
        content = self.tokenizer.encode(message["role"] + "\n" + message["content"])
        return [self.marks[0], *content, self.end_id, *self.tokenizer.encode("\n")]


FORMATS = {"llama3": ChatFormat, "chatml": ChatML}
# the same for the tokenizers of Hugging Face and llama.cpp, in the language Jinja
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
              "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


def detect_format(name: str, tokenizer: BaseTokenizer) -> ChatFormat | None:
    """The form of that name; None if there is none, or its marks are plain text to the vocabulary."""
    try:
        return FORMATS[name](tokenizer) if name in FORMATS else None
    except UserError:
        return None
