"""Step 4 of 4: let the model write.

    python sample.py                                                  # a story from nothing
    python sample.py --prompt "One day, Lily met a Shoggoth"          # one that begins like this
    python sample.py --prompt FILE:beginning.txt --num_samples 3 --temperature 0.7 --seed 7
    python sample.py --interactive                                    # you and the model take turns
    python sample.py --input_file prompts.txt --output_file stories.jsonl       # a story for each line of a file
    python sample.py --show_probs                                     # how sure the model was of each token
    python sample.py --show_probs probs.html                          # the same as a page for the browser
    python sample.py --score story.txt                                # how well it expects a text that is there
    python sample.py --quantize int8 --compile                        # faster on a CPU, and nearly the same
    python sample.py --checkpoint gpt2 --prompt "The meaning of"      # GPT-2, which is downloaded
    torchrun --nproc_per_node=2 sample.py --checkpoint big.gguf       # a model that is too large for one GPU

Needs the checkpoint of step 3 and nothing else: the vocabulary is inside. Stories go to stdout, a line
`---` between them; everything else goes to stderr. The same seed gives the same stories.
"""
import io
import json
import math
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from extras.chat import FORMATS, ChatFormat, Message, detect_format
from extras.token_probs import Token, check_html_path, describe_model, print_score, print_token_table, write_html_page
from tinyllm import checkpoint as checkpoints
from tinyllm import cli, distributed
from tinyllm import device as devices
from tinyllm.cli import UserError, escape_for_terminal, suggest_path
from tinyllm.engine import Step, build_engine
from tinyllm.files import file_lock, json_line
from tinyllm.sampling import SamplingParams
from tokenizer import StreamDecoder

if TYPE_CHECKING:
    from extras.tensor_parallel import TensorParallelGroup

# ---- settings -----------------------------------------------------------------------------------
checkpoint = "output/ckpt.pt"   # the model; output/last.pt is the newest, ckpt.pt the best. Also a .gguf file, a folder
                                # of Hugging Face, and whatever else convert.py reads; gpt2, gpt2-medium, gpt2-large and
                                # gpt2-xl are downloaded
tokenizer = ""                  # file of the vocabulary, where the checkpoint has none
# what to do
prompt = ""                     # how the stories begin; FILE:path reads a file
num_samples = 1                 # stories, written at the same time
interactive = False             # type beginnings, and the model goes on; or talk, with one that was taught to
chat = "auto"                   # llama3 or chatml: the form of messages it was taught; auto: what the checkpoint says;
                                # none: it goes on with what you type
system = ""                     # in a chat: what the model is told beforehand
input_file = ""                 # a prompt in each line; a story is written for each
output_file = ""                # with input_file: JSON lines; a run that was interrupted goes on in it
score = ""                      # a text file: print how well the model expects it, and write nothing
# how to choose tokens
max_new_tokens = 256            # a story may end sooner
temperature = 0.8               # 0: always the likeliest token; 1: as the model sees it; more: wilder
top_k = 300                     # draw from the k likeliest tokens; 0: from all
top_p = 1.0                     # draw from the likeliest tokens that together have this probability
min_p = 0.0                     # draw from the tokens that have this share of the likeliest one's probability
repetition_penalty = 1.0        # 1.1 to 1.3 when the model repeats itself
stop = ""                       # a text that ends a story and is not shown; several with | between
seed = 1337                     # another one gives other stories
# what to show
stream = True                   # show the first story as it grows
echo = True                     # show the prompt too
logprobs = False                # list all tokens with their log-probability (nats), also those of `stop`
show_probs: bool | str = False  # the same in colours by probability, and with what else was likely: in the terminal, or
                                # with a name as probs.html in a page for the browser, beside the plain stories here
# machine
quantize = ""                   # int8: weights of 8 bits, on a CPU; a seed then gives other texts in a batch than alone
compile = False                 # on a CPU, a text 1.2 to 2 times as fast, several 1.2 times; takes a C++ compiler 15 s
                                # once. Beside other work, set OMP_NUM_THREADS=1. On NVIDIA's GPUs: a CUDA graph
batch_size = 32                 # prompts of input_file that are continued at the same time
device = "auto"                 # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                  # auto, float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------


@dataclass
class Completion:
    """A text that the model wrote: `text` is what comes after the prompt.

    Attributes:
        logprobs: of each token, in nats, as the model sees it without any filter.
        stop_reason: eos, stop (a text that ends it) or length.
    """
    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str = "length"


class TextGenerator:
    """A trained model with its vocabulary: text in, text out.

        generator = TextGenerator("output/ckpt.pt")
        stories = generator.sample("Once upon a time", num_samples=3)
        for piece in generator.stream("Once upon a time"):
            print(piece, end="", flush=True)
        answers = generator.completions(["The cat", "A dog"], temperature=0, stop=["."])
    """

    def __init__(self, checkpoint: str | Path = checkpoint, tokenizer_model_path: str | Path | None = None,
                 seed: int = seed, device: str = device, dtype: str = dtype, quantize: str = quantize,
                 compile: bool = compile, chat: str = chat, team: "TensorParallelGroup | None" = None):
        """Load a checkpoint, or with a team this process's part. Raises UserError when something cannot be used."""
        self.backend = devices.choose_backend(device, dtype, training=False)
        if quantize not in ("", "int8") or quantize and self.backend.device.type != "cpu":
            raise UserError(f"--quantize {quantize} is not for {self.backend.device}; there is int8, for a CPU")
        if compile and self.backend.device.type not in ("cpu", "cuda"):
            raise UserError(f"--compile is not for {self.backend.device}; leave it out")
        if compile and team:
            raise UserError("--compile is for one process, without torchrun; leave it out")
        state = checkpoints.read_model(checkpoint, tokenizer_model_path or "")
        self.tokenizer = checkpoints.build_tokenizer(state)
        model = checkpoints.build_model(state, copy_weights=False, name=checkpoint)
        if self.tokenizer.n_words > model.args.vocab_size:
            raise UserError(f"the vocabulary has {self.tokenizer.n_words} entries, the model "
                            f"{model.args.vocab_size}; they do not belong together")
        self.chat = self._chat_format(chat, state.get("chat", ""))
        self.seed, self.parameters, self.window_warning_shown = seed, model.count_parameters(), False
        self.engine = team.engine(model, self.backend, quantize) if team else build_engine(
            model, self.backend.dtype, quantize, compile, self.backend.device)

    def _chat_format(self, asked: str, known: str) -> ChatFormat | None:
        if asked in FORMATS:
            return FORMATS[asked](self.tokenizer)
        if asked not in ("auto", "none"):
            raise UserError(f"--chat {asked} is unknown; use auto, none, {', '.join(FORMATS)}")
        return detect_format(known, self.tokenizer) if asked == "auto" else None

    def sample(self, start: str = prompt, num_samples: int = num_samples, *rest, **options) -> list[str]:
        """Write num_samples texts and return them, `start` included. Takes the further arguments of `grow`."""
        if num_samples < 1:
            raise UserError(f"num_samples must be at least 1, not {num_samples}")
        return [start + one.text for one in self.completions([start] * num_samples, *rest, **options)]

    def stream(self, start: str = prompt, *rest, **options) -> Iterator[str]:
        """Yield a text as it grows, in whole characters; first, `start`. Takes the further arguments of `grow`."""
        return chain([start], (piece for _, piece in self.generate([Completion(start)], *rest, **options)))

    def answer(self, dialog: list[Message], *rest, **options) -> Iterator[str]:
        """Yield the answer to a dialog as it grows. Takes the further arguments of `grow`.

        dialog: dicts with role (system, user, assistant) and content.
        Raises UserError when the model was not taught to talk.
        """
        if not self.chat:
            raise UserError("this model was not taught to talk; if it was, say in which form: --chat chatml")
        head = self.chat.encode_dialog_prompt(dialog)
        oldest = 1 if dialog and dialog[0]["role"] == "system" else 0
        while len(head) > 3 * self.engine.args.max_seq_len // 4 and len(dialog) > oldest + 2:
            dialog = dialog[:oldest] + dialog[oldest + 2:]              # the oldest question and its answer
            head = self.chat.encode_dialog_prompt(dialog)
        heads, ends = [head], [self.chat.end_id]
        return (piece for _, piece in self.generate([Completion("")], *rest, **options, heads=heads, ends=ends))

    def completions(self, prompts: list[str], *rest, **options) -> list[Completion]:
        """Continue each of the prompts, all at the same time. Takes the further arguments of `grow`."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts, not one text")
        done = [Completion(prompt) for prompt in prompts]
        for _ in self.generate(done, *rest, **options):
            pass
        return done

    def generate(self, done: list[Completion], max_new_tokens: int = max_new_tokens, temperature: float = temperature,
             top_k: int = top_k, top_p: float = top_p, min_p: float = min_p,
             repetition_penalty: float = repetition_penalty, stop: str | list[str] | tuple[str, ...] = (),
             seed: int | None = None, rows: list[int] | None = None, heads: list[list[int]] | None = None,
             ends: Collection[int] = ()) -> Iterator[tuple[int, str]]:
        """Extend completions that hold only their prompt so far; yield (number, new text) on the way.

        Args: as in the settings block; seed None is the one of the generator, rows choose the random numbers, heads
            are ids to begin with instead of the prompts', and ends are ids that end a text as eos does.
        Raises: UserError for a setting that cannot be used.
        """
        how = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, self.seed if seed is None else seed)
        validate_sampling(max_new_tokens, how)
        if rows is not None and len(rows) != len(done):
            raise ValueError(f"{len(rows)} rows for {len(done)} texts")
        if not done:
            return iter(())
        stops = [stop] if isinstance(stop, str) else stop or ()
        heads = heads or [self.tokenizer.encode_prompt(one.prompt) for one in done]
        steps = self.engine.generate(heads, max_new_tokens, how, {self.tokenizer.eos_id, *ends}, rows)
        readers = [StreamDecoder(self.tokenizer, head, [text for text in stops if text]) for head in heads]
        return self._warn_about_window(self._generate(done, steps, readers, max_new_tokens), readers)

    def _warn_about_window(self, pieces: Iterator[tuple[int, str]], readers: list[StreamDecoder]) -> Iterator[tuple[int, str]]:
        """Say once, after what was written, that it was longer than the window."""
        yield from pieces
        longest, window = max(len(reader.ids) for reader in readers) - 1, self.engine.args.max_seq_len
        if longest > window and not self.window_warning_shown:             # the last token is not read any more
            print(f"\nnote: the model sees {window} tokens; a longer text goes on from its first one and newer half; "
                  "the rest is forgotten", file=sys.stderr)
            self.window_warning_shown = True

    def _generate(self, done: list[Completion], steps: Iterator[Step], readers: list[StreamDecoder],
              max_new_tokens: int) -> Iterator[tuple[int, str]]:
        writing = set(range(len(done)))
        for step in steps:
            chosen = torch.tensor([token or 0 for token in step.tokens], device=step.logits.device)[:, None]
            likely = step.logits.log_softmax(-1).gather(1, chosen).flatten().tolist()
            for row in sorted(writing):
                one, reader, token = done[row], readers[row], step.tokens[row]
                if token is None:
                    piece, one.stop_reason = reader.flush(), "eos"
                else:
                    piece = reader.add(token)
                    one.tokens.append(token)
                    one.logprobs.append(likely[row])
                if reader.stopped:
                    one.stop_reason = "stop"
                if one.stop_reason != "length":
                    writing.remove(row)
                one.text += piece
                if piece:
                    yield row, piece
            if not writing:
                return
        for row in sorted(writing):                         # they have ended together, or there is no more room
            if len(done[row].tokens) < max_new_tokens:
                done[row].stop_reason = "eos"
            if piece := readers[row].flush():
                done[row].text += piece
                yield row, piece

    def read(self, ids: list[int], alternatives: int = 3) -> list[Token]:
        """How the model expects each of the ids after those before it; the first one, bos, is only read.

        What is longer than the model's window is read in pieces of that length, each without what is before it.
        """
        found = []
        for logprobs in self.engine.read(ids):                                      # (n, vocab_size)
            chosen = ids[len(found) + 1:len(found) + 1 + len(logprobs)]
            of_chosen = logprobs.gather(1, torch.tensor(chosen, device=logprobs.device)[:, None]).flatten().tolist()
            best, best_ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))
            for token, logprob, chances, others in zip(chosen, of_chosen, best.exp().tolist(), best_ids.tolist()):
                likeliest = [(self.tokenizer.id_to_piece(other), chance) for other, chance in zip(others, chances)]
                found.append(Token(self.tokenizer.id_to_piece(token), logprob, likeliest))
        return found


def validate_sampling(max_new_tokens: int, how: SamplingParams) -> None:
    """Raise UserError with every setting that cannot be used."""
    problems = [text for right, text in [
        (max_new_tokens >= 0, f"max_new_tokens must not be negative, not {max_new_tokens}"),
        (0 <= how.temperature < math.inf, f"temperature must be 0 or more, not {how.temperature}"),
        (how.top_k >= 0, f"top_k must be 0 (all) or more, not {how.top_k}"),
        (0 < how.top_p <= 1, f"top_p must be above 0 and at most 1, not {how.top_p}"),
        (0 <= how.min_p <= 1, f"min_p must be from 0 to 1, not {how.min_p}"),
        (0 < how.repetition_penalty < math.inf, f"repetition_penalty must be above 0, not {how.repetition_penalty}")]
        if not right]
    if problems:
        raise UserError("; ".join(problems))


# ---- the command line ---------------------------------------------------------------------------

class Inputs(NamedTuple):
    """What there is to do: a beginning, a text to score, prompts of a file."""
    start: str
    text: str
    prompts: list[str]


def main() -> None:
    dist = distributed.from_env()
    cfg, _ = cli.parse_settings(globals(), out=sys.stderr if dist.rank == 0 else io.StringIO())
    with devices.explain_oom("write fewer texts at a time (--num_samples, --batch_size), or shorter ones; what is "
                                  "too much for a GPU may fit --device cpu"):
        if dist.size == 1:
            run_mode(*load_generator(cfg), cfg)
        else:
            run_tensor_parallel(cfg, dist)


def load_generator(cfg: SimpleNamespace, team: "TensorParallelGroup | None" = None) -> tuple[TextGenerator, Inputs | None]:
    """Load the model, and what it shall do; of a team, only the first process has something to do."""
    given = read_inputs(cfg) if not team or team.is_main else None
    check_settings(cfg)
    return TextGenerator(cfg.checkpoint, cfg.tokenizer or None, cfg.seed, cfg.device, cfg.dtype, cfg.quantize,
                         cfg.compile, cfg.chat, team), given


def read_inputs(cfg: SimpleNamespace) -> Inputs:
    start = read_text_file(cfg.prompt.removeprefix("FILE:")) if cfg.prompt.startswith("FILE:") else cfg.prompt
    text = read_text_file(cfg.score).strip() if cfg.score else ""       # as the texts of a training are
    *prompts, last = read_text_file(cfg.input_file).split("\n") if cfg.input_file else [""]
    return Inputs(start, text, prompts + [last] if last else prompts)


def run_mode(generator: TextGenerator, given: Inputs, cfg: SimpleNamespace) -> None:
    print(describe_model(generator, cfg), file=sys.stderr)
    if generator.chat and cfg.chat == "auto" and not cfg.interactive and not cfg.score:
        print("note: this model was taught to talk, and may have nothing to add to a text; ask it with --interactive",
              file=sys.stderr)
    if cfg.score:
        print_score(generator, given.text)
    elif cfg.interactive:
        from extras import dialogue
        dialogue.chat_loop(generator, cfg, sampling_kwargs)
    elif cfg.input_file:
        with file_lock(Path(cfg.output_file)) if cfg.output_file else nullcontext():
            run_input_file(generator, given.prompts, cfg)
    else:
        print_stories(generator, given.start, cfg)


def run_tensor_parallel(cfg: SimpleNamespace, dist: distributed.DistributedContext) -> None:
    """The same in several processes, each with a part of the model: the first one leads, the others compute along."""
    from extras.tensor_parallel import TensorParallelGroup
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C, which torchrun passes on, ends all
    cfg.device = dist.device(cfg.device)
    with distributed.distributed_context():
        team = TensorParallelGroup(dist)
        generator, given = dist.all_or_none(lambda: load_generator(cfg, team), team.control_group)
        generator.engine.run(lambda: run_mode(generator, given, cfg))


# settings that change nothing in a mode
GENERATION_ONLY = ("prompt", "num_samples", "logprobs", "show_probs", "stream")
IGNORED_WITH = {"score": (*GENERATION_ONLY, "echo", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop",
                  "repetition_penalty", "compile"),
        "interactive": (*GENERATION_ONLY, "echo"), "input_file": GENERATION_ONLY}


def check_settings(cfg: SimpleNamespace) -> None:
    """Raise UserError for values that cannot be, and for settings that nothing would come of."""
    validate_sampling(cfg.max_new_tokens, SamplingParams(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty))
    for name in ("num_samples", "batch_size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(cfg, name)}")
    modes = [name for name in ("score", "interactive", "input_file") if getattr(cfg, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} do not go together")
    for name in IGNORED_WITH[modes[0]] if modes else ():
        if getattr(cfg, name) != globals()[name]:
            raise UserError(f"--{name} has no effect with --{modes[0]}; leave it out")
    if cfg.system and not cfg.interactive:
        raise UserError("--system is for a chat: --interactive")
    if cfg.output_file and not cfg.input_file:
        raise UserError("--output_file needs the prompts of --input_file; one story can go there by > file")
    check_html_path(cfg.show_probs)


def sampling_kwargs(cfg: SimpleNamespace) -> dict[str, Any]:
    """The arguments of TextGenerator.generate."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {**{name: getattr(cfg, name) for name in names}, "stop": cfg.stop.split("|")}


def print_stories(generator: TextGenerator, start: str, cfg: SimpleNamespace) -> None:
    """Print the first story as it grows, and the others, which end at about the same time, after it."""
    done = [Completion(start) for _ in range(cfg.num_samples)]
    listed = cfg.logprobs or cfg.show_probs is True
    streams, head = cfg.stream and not listed, start if cfg.echo else ""
    pieces = generator.generate(done, **sampling_kwargs(cfg))       # may compile, which comes before the story
    if streams:
        print(escape_for_terminal(head), end="", flush=True)
    for row, piece in pieces:
        if streams and row == 0:
            print(escape_for_terminal(piece), end="", flush=True)
    for row, one in enumerate(done):
        if row:
            print("---")
        if listed:
            print_token_table(generator, one, cfg)
        else:
            print("" if streams and row == 0 else escape_for_terminal(head + one.text), flush=True)
    if isinstance(cfg.show_probs, str):
        write_html_page(generator, done, cfg, sampling_kwargs(cfg))


def run_input_file(generator: TextGenerator, prompts: list[str], cfg: SimpleNamespace) -> None:
    """Print the continuation of each prompt, or append it to an output file, unless it is in there already."""
    path, size = Path(cfg.output_file) if cfg.output_file else None, 4 * cfg.batch_size
    done = count_finished(path, prompts) if path else 0
    if done:
        print(f"{done} of {len(prompts)} are in {path} already, with the settings of that time; another --output_file "
              "has all written anew", file=sys.stderr)
    if done == len(prompts):
        return
    for first in range(done - done % size, len(prompts), size):     # the same batches again
        chunk = complete_batch(generator, prompts, range(len(prompts))[first:first + size], cfg)
        if path:
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json_line(asdict(one)) for one in chunk[max(done - first, 0):])
            print(f"{first + len(chunk)} of {len(prompts)}", file=sys.stderr)
        else:
            print(*(escape_for_terminal((one.prompt if cfg.echo else "") + one.text) for one in chunk), sep="\n---\n",
                  end="\n---\n" if first + len(chunk) < len(prompts) else "\n", flush=True)


def complete_batch(generator: TextGenerator, prompts: list[str], numbers: range, cfg: SimpleNamespace) -> list[Completion]:
    """Continue the prompts of these numbers, those of similar length together; returns them in order."""
    order, done = sorted(numbers, key=lambda number: len(prompts[number])), {}
    for begin in range(0, len(order), cfg.batch_size):
        rows = order[begin:begin + cfg.batch_size]
        done |= zip(rows, generator.completions([prompts[row] for row in rows], **sampling_kwargs(cfg), rows=rows))
    return [done[number] for number in numbers]


def count_finished(path: Path, prompts: list[str]) -> int:
    """How many of the prompts an output file has; a line that was cut off is removed from it."""
    if not path.is_file():
        raise UserError(f"{path} is not a file that can be gone on with; name another --output_file")
    content = path.read_bytes()
    whole, rest = content[:content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1:]
    try:
        found = [json.loads(text)["prompt"] for text in whole.decode().split("\n")[:-1]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is there, and not from this command; name another --output_file") from error
    following = [json_line({"prompt": prompt})[:-2].encode() for prompt in prompts[len(found):][:1]]
    own = not rest or any(rest.startswith(begin) or begin.startswith(rest) for begin in following)
    if found != prompts[:len(found)] or not own:
        raise UserError(f"{path} is there, and from other prompts; name another --output_file")
    if rest:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return len(found)


def read_text_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        found = ", but a folder" if Path(name).is_dir() else suggest_path(name)
        raise UserError(f"no file at {Path(name).resolve()}{found}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text; save it as such with an editor") from error


if __name__ == "__main__":
    cli.run_script(main)
