"""Step 4 of 4: let the model write.

    python sample.py                                                  # a story from nothing
    python sample.py --prompt "One day, Lily met a Shoggoth"          # one that begins like this
    python sample.py --prompt FILE:beginning.txt --num_samples 3 --temperature 0.7 --seed 7
    python sample.py --interactive                                    # type prompts, or chat
    python sample.py --input_file prompts.txt --output_file stories.jsonl       # a story for each line of a file
    python sample.py --show_probs                                     # how sure the model was of each token
    python sample.py --show_probs probs.html                          # the same as a page for the browser
    python sample.py --score story.txt                                # how well it expects a text that is there
    python sample.py --compile                                        # faster on a CPU; or --quantize int8
    python sample.py --checkpoint gpt2 --prompt "The meaning of"      # GPT-2, which is downloaded
    torchrun --nproc_per_node=2 sample.py --checkpoint big.gguf       # a model that is too large for one GPU

Needs the checkpoint of step 3 and nothing else: the vocabulary is inside. Stories go to stdout, a line
`---` between them; everything else goes to stderr. The same seed gives the same stories.
"""
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinyllm import cli, distributed, optional
from tinyllm.cli import UserError, escape_for_terminal, suggest_path
from tinyllm.device import explain_oom
from tinyllm.files import file_lock, json_line
from tinyllm.generator import Completion, sampling_kwargs
from tinyllm.generator import TextGenerator as BaseTextGenerator
from tinyllm.sampling import SamplingParams, validate_sampling

# ---- settings -----------------------------------------------------------------------------------
checkpoint = "output/ckpt.pt"   # the best model, or output/last.pt, the latest. Also whatever convert.py reads, such as
                                # a .gguf file or a Hugging Face folder; gpt2 and gpt2-medium to -xl are downloaded
tokenizer = ""                  # file of the vocabulary, where the checkpoint has none
# task
prompt = ""                     # how the stories begin; FILE:path reads a file
num_samples = 1                 # stories, written at the same time
interactive = False             # type a prompt and the model continues it; chat models answer
chat = "auto"                   # chat template: llama3, chatml, auto (from the checkpoint) or none (plain continuation)
system = ""                     # system prompt of a chat
input_file = ""                 # a prompt in each line; a story is written for each
output_file = ""                # JSON lines for the stories of input_file; an interrupted run resumes in it
score = ""                      # a text file: print how well the model expects it, and write nothing
# choice of tokens
max_new_tokens = 256            # a story may end sooner
temperature = 0.8               # 0: always the likeliest token; 1: as the model sees it; more: wilder
top_k = 300                     # draw from the k likeliest tokens; 0: from all
top_p = 1.0                     # draw from the likeliest tokens that together have this probability
min_p = 0.0                     # draw from the tokens with at least this share of the likeliest one's probability
repetition_penalty = 1.0        # 1.1 to 1.3 when the model repeats itself
stop = ""                       # a text that ends a story and is not shown; several with | between
seed = 1337                     # another one gives other stories
# display
stream = True                   # show the first story as it grows
echo = True                     # show the prompt too
logprobs = False                # list all tokens with their log-probability (nats), those of `stop` too
show_probs: bool | str = False  # the same in colors by probability, and with likely alternatives: in the terminal, or
                                # with a name as probs.html in a page for the browser, beside the plain stories here
# machine
quantize = ""                   # int8: weights of 8 bits, on a CPU; a seed then gives other texts in a batch than alone
compile = False                 # on a CPU, a text 1.2 to 2 times as fast, several 1.2 times; takes a C++ compiler 15 s
                                # once. Beside other work, set OMP_NUM_THREADS=1. On NVIDIA's GPUs: a CUDA graph
batch_size = 32                 # prompts of input_file that are continued at the same time
device = "auto"                 # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                  # auto, float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------


class TextGenerator(BaseTextGenerator):
    """The generator of tinyllm/generator.py; the settings above are its defaults."""

    def __init__(self, checkpoint: str | Path = checkpoint, tokenizer_model_path: str | Path | None = tokenizer,
                 seed: int = seed, device: str = device, dtype: str = dtype, quantize: str = quantize,
                 compile: bool = compile, chat: str = chat, tp_group: Any = None):
        super().__init__(checkpoint, tokenizer_model_path, seed, device, dtype, quantize, compile, chat, tp_group)

    def sample(self, start: str = prompt, num_samples: int = num_samples, *args, **options) -> list[str]:
        return super().sample(start, num_samples, *args, **options)

    def stream(self, start: str = prompt, *args, **options) -> Iterator[str]:
        return super().stream(start, *args, **options)

    def generate(self, completions: list[Completion], max_new_tokens: int = max_new_tokens,
                 temperature: float = temperature, top_k: int = top_k, top_p: float = top_p, min_p: float = min_p,
                 repetition_penalty: float = repetition_penalty, *args, **options) -> Iterator[tuple[int, str]]:
        return super().generate(completions, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
                                *args, **options)


# ---- command line -------------------------------------------------------------------------------

RECORD_START = b'{"prompt": "'       # of each line of output_file
# setting: another one, without which it has no effect
ONLY_WITH = {"system": "interactive", "output_file": "input_file"}
GENERATION_ONLY = ("prompt", "num_samples", "logprobs", "show_probs", "stream")
# mode: the settings that have no effect in it
IGNORED_WITH = {
    "score": (*GENERATION_ONLY, "interactive", "input_file", "echo", "max_new_tokens", "temperature", "top_k", "top_p",
              "min_p", "stop", "repetition_penalty", "compile"),
    "interactive": (*GENERATION_ONLY, "input_file", "echo"),
    "input_file": GENERATION_ONLY,
}


def main() -> None:
    dist = distributed.from_env()
    cfg, _ = cli.parse_settings(globals(), out=sys.stderr if dist.is_main else io.StringIO())
    with explain_oom("write fewer texts at a time (--num_samples, --batch_size), or shorter ones; "
                     "a computer may have more memory than its GPU: --device cpu"):
        if dist.world_size > 1:
            run_tensor_parallel(cfg, dist)
        else:
            generator, text = prepare(cfg)
            run_mode(generator, text, cfg)


def run_tensor_parallel(cfg: SimpleNamespace, dist: distributed.DistributedContext) -> None:
    """Divide the model among the processes. The main process runs the mode, the others compute with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C, which torchrun passes on, ends all processes
    cfg.device = dist.device(cfg.device)
    with distributed.distributed_context():
        tp_group = optional.load("tensor_parallel").TensorParallelGroup(dist)
        with dist.fail_together(tp_group.control_group):
            generator, text = prepare(cfg, tp_group)
        generator.engine.run(partial(run_mode, generator, text, cfg))


def prepare(cfg: SimpleNamespace, tp_group: Any = None) -> tuple[TextGenerator, str]:
    """Check the settings, read the input in the main process, and load the model."""
    check_settings(cfg)
    text = read_input(cfg) if not tp_group or tp_group.is_main else ""
    return TextGenerator(cfg.checkpoint, cfg.tokenizer, cfg.seed, cfg.device, cfg.dtype, cfg.quantize, cfg.compile,
                         cfg.chat, tp_group), text


def check_settings(cfg: SimpleNamespace) -> None:
    """Raise UserError for values out of range, and for settings that would have no effect."""
    validate_sampling(cfg.max_new_tokens, SamplingParams(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p,
                                                         cfg.repetition_penalty))
    for name in ("num_samples", "batch_size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(cfg, name)}")
    for name, needed in ONLY_WITH.items():
        if getattr(cfg, name) and not getattr(cfg, needed):
            raise UserError(f"--{name} has no effect without --{needed}; leave it out")
    for mode in IGNORED_WITH:
        for name in IGNORED_WITH[mode]:
            if getattr(cfg, mode) and getattr(cfg, name) != globals()[name]:
                raise UserError(f"--{name} has no effect with --{mode}; leave it out")
    if isinstance(cfg.show_probs, str) and not cfg.show_probs.endswith((".html", ".htm")):
        raise UserError(f"--show_probs must be True, False or a page to write, such as {cfg.show_probs}.html")


def read_input(cfg: SimpleNamespace) -> str:
    """Return the prompt, or the text of the file that score, input_file or prompt names."""
    path = cfg.score or cfg.input_file or cfg.prompt.removeprefix("FILE:")
    if path == cfg.prompt:
        return cfg.prompt
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"no file at {Path(path).resolve()}{suggest_path(path)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as such with an editor") from error
    if cfg.input_file and not text:
        raise UserError(f"{path} is empty; write a prompt in each line")
    return text


def run_mode(generator: TextGenerator, text: str, cfg: SimpleNamespace) -> None:
    print(generator.description, file=sys.stderr)
    if cfg.score:
        optional.load("token_probs").print_score(generator, text)
    elif cfg.interactive:
        optional.load("chat").chat_loop(generator, cfg)
    elif cfg.input_file:
        with file_lock(Path(cfg.output_file)) if cfg.output_file else nullcontext():
            run_input_file(generator, text.removesuffix("\n").split("\n"), cfg)
    else:
        if generator.chat and cfg.chat == "auto":
            print("note: this is a chat model and may add little to a prompt; try --interactive", file=sys.stderr)
        print_stories(generator, text, cfg)


def print_stories(generator: TextGenerator, prompt: str, cfg: SimpleNamespace) -> None:
    """Print the first story as it grows, and then the others, which end at about the same time."""
    completions = [Completion(prompt) for _ in range(cfg.num_samples)]
    pieces = generator.generate(completions, **sampling_kwargs(cfg))       # may compile and print before the story
    shows_table = cfg.logprobs or cfg.show_probs is True
    streams = cfg.stream and not shows_table
    shown_prompt = prompt if cfg.echo else ""
    if streams:
        print(escape_for_terminal(shown_prompt), end="", flush=True)
    for i, piece in pieces:
        if streams and i == 0:
            print(escape_for_terminal(piece), end="", flush=True)
    for i, completion in enumerate(completions):
        if i > 0:
            print("---")
        if shows_table:
            optional.load("token_probs").print_token_table(generator, completion, cfg)
        elif streams and i == 0:
            print(flush=True)
        else:
            print(escape_for_terminal(shown_prompt + completion.text), flush=True)
    if isinstance(cfg.show_probs, str):
        optional.load("token_probs").write_html_page(generator, completions, cfg)


def run_input_file(generator: TextGenerator, prompts: list[str], cfg: SimpleNamespace) -> None:
    """Complete the prompts, and print the texts or append those that output_file lacks to it."""
    path = Path(cfg.output_file)
    n_finished = count_finished(path, prompts) if cfg.output_file else 0
    if n_finished:
        print(f"{n_finished} of {len(prompts)} are in {path} already, with the settings of that time", file=sys.stderr)
    if n_finished == len(prompts):
        return
    chunk_size = 4 * cfg.batch_size
    first_chunk = n_finished - n_finished % chunk_size       # an interrupted run continues with the same batches
    for begin in range(first_chunk, len(prompts), chunk_size):
        end = min(begin + chunk_size, len(prompts))
        completions = complete_chunk(generator, prompts, range(begin, end), cfg)
        if cfg.output_file:
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json_line(asdict(new)) for new in completions[max(n_finished - begin, 0):])
            print(f"{end} of {len(prompts)}", file=sys.stderr)
            continue
        for i, completion in enumerate(completions, begin):
            if i > 0:
                print("---")
            shown_prompt = completion.prompt if cfg.echo else ""
            print(escape_for_terminal(shown_prompt + completion.text), flush=True)


def complete_chunk(generator: TextGenerator, prompts: list[str], sample_ids: range, cfg: SimpleNamespace
                   ) -> list[Completion]:
    """Complete the prompts with these numbers, similar lengths together; return the completions in order."""
    by_length = sorted(sample_ids, key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for begin in range(0, len(by_length), cfg.batch_size):
        batch = by_length[begin:begin + cfg.batch_size]
        batch_prompts = [prompts[i] for i in batch]
        completions |= zip(batch, generator.completions(batch_prompts, **sampling_kwargs(cfg), sample_ids=batch))
    return [completions[i] for i in sample_ids]


def count_finished(path: Path, prompts: list[str]) -> int:
    """Return how many of the prompts have a record in an output file. Remove an incomplete last line from it."""
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; choose another --output_file")
    content = path.read_bytes()
    *lines, incomplete = content.split(b"\n")
    try:
        finished = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not from this command; choose another --output_file") from error
    if finished != prompts[:len(finished)] or not RECORD_START.startswith(incomplete[:len(RECORD_START)]):
        raise UserError(f"{path} is from other prompts; choose another --output_file")
    if incomplete:
        os.truncate(path, len(content) - len(incomplete))
    return len(finished)


if __name__ == "__main__":
    cli.run_script(main)
