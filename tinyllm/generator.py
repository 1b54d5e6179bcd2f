"""Text generation: prompts in, text out.

    from sample import TextGenerator        # the class below with sample.py's settings as defaults
    generator = TextGenerator("output/ckpt.pt")
    stories = generator.sample("Once upon a time", num_samples=3)
    for piece in generator.stream("Once upon a time"):
        print(piece, end="", flush=True)
    completions = generator.completions(["The cat", "A dog"], temperature=0, stop=["."])
"""
import sys
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tinyllm import checkpoint as checkpoints
from tinyllm import optional
from tinyllm.cli import UserError
from tinyllm.device import choose_backend, to_device
from tinyllm.engine import DecodeStep, build_engine
from tinyllm.project import tokenizer_errors
from tinyllm.sampling import SamplingParams, validate_sampling
from tokenizer import BaseTokenizer

Message = dict[str, str]            # keys: role (system, user or assistant) and content


class Token(NamedTuple):
    """A token, its log-probability in nats, and the most probable tokens at its position with their probabilities."""
    piece: str
    logprob: float
    top_tokens: list[tuple[str, float]]


class StreamDecoder:
    """A decoder of one sequence's tokens into complete characters, up to the first stop string."""

    def __init__(self, tokenizer: BaseTokenizer, prompt_ids: list[int], stop_strings: list[str]):
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.ids = list(prompt_ids)
        self.n_decoded = len(self.ids)      # ids[:n_decoded] are already decoded
        self.context_start = 0              # ids[context_start:n_decoded] are decoded again before new ones
        self.pending = ""                   # text that may be the start of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is safe to show: complete characters that cannot be the start of a stop string."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):         # an incomplete character
            return ""
        self.context_start = self.n_decoded - 1
        self.n_decoded = len(self.ids)
        self.pending += text
        stop_starts = [self.pending.find(stop) for stop in self.stop_strings if stop in self.pending]
        if stop_starts:
            self.stopped = True
            return self.pending[:min(stop_starts)]
        n_safe = len(self.pending) - self._partial_stop_length()
        safe_text, self.pending = self.pending[:n_safe], self.pending[n_safe:]
        return safe_text

    def flush(self) -> str:
        """Return the remaining text after the last token."""
        return self.pending + self._new_text()

    def _new_text(self) -> str:
        # decoding drops the first token's leading space, so an old token precedes the new ones
        known = self.tokenizer.decode(self.ids[self.context_start:self.n_decoded])
        return self.tokenizer.decode(self.ids[self.context_start:])[len(known):]

    def _partial_stop_length(self) -> int:
        """Return the length of the longest suffix of `pending` that is a prefix of a stop string."""
        longest = 0
        for stop in self.stop_strings:
            for length in range(1, len(stop)):
                if self.pending.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest


@dataclass
class Completion:
    """A prompt and the text generated after it."""
    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)     # nats, before temperature and filters
    stop_reason: str = "length"         # eos, stop (a stop string) or length

    def append(self, token: int | None, logprob: float, decoder: StreamDecoder) -> str:
        """Add a token, or None at the end of the sequence. Return the text that it completes."""
        if token is None:
            return self.finish("eos", decoder)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        piece = decoder.add(token)
        if decoder.stopped:
            self.stop_reason = "stop"
        self.text += piece
        return piece

    def finish(self, stop_reason: str, decoder: StreamDecoder) -> str:
        """Add the decoder's remaining text and return it."""
        self.stop_reason = stop_reason
        piece = decoder.flush()
        self.text += piece
        return piece


class TextGenerator:
    """A model with its tokenizer. The subclass in sample.py has defaults for all settings."""

    def __init__(self, checkpoint: str | Path, tokenizer_model_path: str | Path | None, seed: int, device: str,
                 dtype: str, quantize: str, compile: bool, chat: str, tp_group: Any = None):
        """Load a checkpoint. tp_group: a TensorParallelGroup, to keep only this process's part."""
        self.backend = choose_backend(device, dtype, training=False)
        if compile and tp_group:
            raise UserError("--compile does not work with torchrun")
        ckpt = checkpoints.read_model(checkpoint, tokenizer_model_path or "")
        self.tokenizer = checkpoints.build_tokenizer(ckpt)
        model = checkpoints.build_model(ckpt, copy_weights=False, source=checkpoint)
        if self.tokenizer.vocab_size > model.args.vocab_size:
            raise UserError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, but the model's vocab_size is "
                            f"{model.args.vocab_size}")
        self.chat = None                    # a ChatFormat of extras/chat.py
        if chat != "none" and (chat != "auto" or ckpt.get("chat")):
            self.chat = optional.load("chat").choose_format(chat, ckpt.get("chat", ""), self.tokenizer)
        self.seed = seed
        backend = f"{self.backend.device} with {quantize}" if quantize else str(self.backend)
        compiled = ", compiled" if compile else ""
        self.description = f"{checkpoint}: {model.count_parameters():,} parameters, on {backend}{compiled}"
        self.crop_note_shown = False
        if tp_group:
            self.engine = tp_group.engine(model, self.backend, quantize)
        else:
            self.engine = build_engine(model, self.backend.dtype, quantize, compile, self.backend.device)

    def sample(self, start: str, num_samples: int, *args, **options) -> list[str]:
        """Return num_samples texts that begin with `start`. Takes the other arguments of `generate`."""
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, not {num_samples}")
        completions = self.completions([start] * num_samples, *args, **options)
        return [start + completion.text for completion in completions]

    def stream(self, start: str, *args, **options) -> Iterator[str]:
        """Yield `start`, then the text as it is generated. Takes the other arguments of `generate`."""
        pieces = self.generate([Completion(start)], *args, **options)
        return chain([start], (piece for _, piece in pieces))

    def answer(self, dialog: list[Message], *args, **options) -> Iterator[str]:
        """Yield a chat model's answer to a dialog as it is generated. Takes the other arguments of `generate`."""
        if not self.chat:
            raise UserError("this is not a chat model\n       if it is one, name its chat template: --chat chatml")
        with tokenizer_errors():
            prompt_ids = self._encode_dialog(dialog)
        pieces = self.generate([Completion("")], *args, prompt_ids=[prompt_ids], stop_ids=[self.chat.end_id], **options)
        return (piece for _, piece in pieces)

    def _encode_dialog(self, dialog: list[Message]) -> list[int]:
        """Encode a dialog. Drop its oldest turns while it takes more than 3/4 of max_seq_len."""
        ids = self.chat.encode_dialog_prompt(dialog)
        oldest = 1 if dialog and dialog[0]["role"] == "system" else 0
        while len(ids) > 3 * self.engine.args.max_seq_len // 4 and len(dialog) > oldest + 2:
            dialog = dialog[:oldest] + dialog[oldest + 2:]              # a question and its answer
            ids = self.chat.encode_dialog_prompt(dialog)
        return ids

    def completions(self, prompts: list[str], *args, **options) -> list[Completion]:
        """Continue all prompts as one batch. Takes the other arguments of `generate`."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of texts, not one text")
        completions = [Completion(prompt) for prompt in prompts]
        deque(self.generate(completions, *args, **options), maxlen=0)       # exhausts the iterator
        return completions

    def generate(self, completions: list[Completion], max_new_tokens: int, temperature: float, top_k: int,
                 top_p: float, min_p: float, repetition_penalty: float, stop: str | Collection[str] = (),
                 seed: int | None = None, sample_ids: list[int] | None = None,
                 prompt_ids: list[list[int]] | None = None, stop_ids: Collection[int] = (),
                 rows: list[int] | None = None) -> Iterator[tuple[int, str]]:
        """Generate the text of completions that hold only their prompts. Yields (index, new text).

        Args:
            max_new_tokens, ..., repetition_penalty: see the settings block of sample.py.
            stop: strings that end a text.
            seed: None means the generator's seed.
            sample_ids: see Engine.generate. `rows` is the old name of this argument.
            prompt_ids: token ids to continue instead of the prompts.
            stop_ids: token ids that end a text, as eos does.
        """
        seed = self.seed if seed is None else seed
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        validate_sampling(max_new_tokens, params)
        sample_ids = sample_ids if rows is None else rows
        if sample_ids is not None and len(sample_ids) != len(completions):
            raise ValueError(f"{len(sample_ids)} sample_ids for {len(completions)} completions")
        if not completions:
            return iter(())
        stop_strings = [stop] if isinstance(stop, str) else stop or ()
        stop_strings = [text for text in stop_strings if text]
        with tokenizer_errors():
            prompt_ids = prompt_ids or [self.tokenizer.encode_prompt(completion.prompt) for completion in completions]
        decoders = [StreamDecoder(self.tokenizer, ids, stop_strings) for ids in prompt_ids]
        stop_ids = {self.tokenizer.eos_id, *stop_ids}
        steps = self.engine.generate(prompt_ids, max_new_tokens, params, stop_ids, sample_ids, with_logprobs=True)
        return self._extend(completions, steps, decoders, max_new_tokens)

    def grow(self, completions: list[Completion], *args, heads: list[list[int]] | None = None,
             ends: Collection[int] = (), **options) -> Iterator[tuple[int, str]]:
        """Call `generate` under its old name, with the old argument names."""
        return self.generate(completions, *args, prompt_ids=heads, stop_ids=ends, **options)

    def _extend(self, completions: list[Completion], steps: Iterator[DecodeStep], decoders: list[StreamDecoder],
                max_new_tokens: int) -> Iterator[tuple[int, str]]:
        unfinished = list(range(len(completions)))
        for step in steps:
            for i in unfinished:
                if piece := completions[i].append(step.tokens[i], step.logprobs[i], decoders[i]):
                    yield i, piece
            unfinished = [i for i in unfinished if completions[i].stop_reason == "length"]
            if not unfinished:
                break
        for i in unfinished:                # all reached max_new_tokens, or all ended in the same step
            ended = len(completions[i].tokens) < max_new_tokens
            if piece := completions[i].finish("eos" if ended else "length", decoders[i]):
                yield i, piece
        self._print_crop_note(decoders)

    def _print_crop_note(self, decoders: list[StreamDecoder]) -> None:
        """Print a note, once, if a sequence exceeded the model's context."""
        max_seq_len = self.engine.args.max_seq_len
        longest = max(len(decoder.ids) for decoder in decoders) - 1        # the last token is not an input
        if longest > max_seq_len and not self.crop_note_shown:
            print(f"\nnote: the context is {max_seq_len} tokens; once full, it keeps the first token and newer half",
                  file=sys.stderr)
            self.crop_note_shown = True

    def read(self, ids: list[int], alternatives: int = 3) -> list[Token]:
        """Return the log-probability of each token except the first, given the tokens before it.

        alternatives: number of most probable tokens to return. Long inputs are split into windows, see Engine.logprobs.
        """
        tokens: list[Token] = []
        for logprobs in self.engine.logprobs(ids):                                  # (n, vocab_size)
            targets = ids[len(tokens) + 1:len(tokens) + 1 + len(logprobs)]
            target_ids = to_device(torch.tensor(targets)[:, None], logprobs.device)             # (n, 1)
            target_logprobs = logprobs.gather(1, target_ids).flatten().tolist()
            top_logprobs, top_ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))        # (n, alternatives)
            top_probabilities = top_logprobs.exp().tolist()
            top_ids = top_ids.tolist()
            for row, token in enumerate(targets):
                pieces = [self.tokenizer.id_to_piece(top_id) for top_id in top_ids[row]]
                top_tokens = list(zip(pieces, top_probabilities[row]))
                tokens.append(Token(self.tokenizer.id_to_piece(token), target_logprobs[row], top_tokens))
        return tokens


def sampling_kwargs(cfg: SimpleNamespace) -> dict[str, Any]:
    """Return the settings of sample.py that TextGenerator.generate takes."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(cfg, name) for name in names} | {"stop": cfg.stop.split("|")}
