"""Step 4 of 4: generate text.

    python sample.py                                                  # one story
    python sample.py --prompt "One day, Lily met a Shoggoth"          # continue a prompt
    python sample.py --prompt FILE:prompt.txt --num_samples 3 --temperature 0.7 --seed 7
    python sample.py --interactive                                    # type prompts, or chat
    python sample.py --input_file prompts.txt --output_file output/stories.jsonl     # one story per line of a file
    python sample.py --show_probs                                     # the probability of each token, in colors
    python sample.py --show_probs output/probs.html                   # the same as a web page
    python sample.py --score story.txt                                # loss and perplexity of an existing text
    python sample.py --compile                                        # faster on a CPU; or --quantize int8
    python sample.py --checkpoint gpt2 --prompt "The meaning of"      # download and run GPT-2
    torchrun --nproc_per_node=2 sample.py --checkpoint big.gguf       # a model too large for one GPU

Needs only the checkpoint of step 3, which contains the tokenizer. Stories go to stdout, separated by lines of `---`;
everything else goes to stderr. On a CPU, the same seed gives the same stories.
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
from tinyllm.device_errors import explain_device_errors
from tinyllm.files import file_lock, json_line
from tinyllm.generator import Completion, sampling_kwargs
from tinyllm.generator import TextGenerator as BaseTextGenerator
from tinyllm.sampling import SamplingParams, validate_sampling

# ---- settings -----------------------------------------------------------------------------------
checkpoint = "output/ckpt.pt"   # best checkpoint (output/last.pt: latest) or any model that convert.py reads, such as
                                # a .gguf file or a Hugging Face folder; gpt2, gpt2-medium, -large, -xl are downloaded
tokenizer = ""                  # tokenizer file, if the checkpoint contains none
# task
prompt = ""                     # text to continue; FILE:path reads it from a file
num_samples = 1                 # number of stories, generated as one batch
interactive = False             # type a prompt and the model continues it; chat models answer
chat = "auto"                   # chat template: llama3, chatml, auto (from the checkpoint) or none (plain continuation)
system = ""                     # system prompt for --interactive with a chat model
input_file = ""                 # text file with one prompt per line; generates one story for each
output_file = ""                # write the stories of input_file as JSON lines; an interrupted run resumes
score = ""                      # text file: print its loss, perplexity and bits per byte, and generate nothing
# sampling
max_new_tokens = 256            # maximum length of a story in tokens
temperature = 0.8               # 0: always the most probable token; 1: the model's probabilities; higher: more random
top_k = 300                     # sample from the k most probable tokens; 0: from all
top_p = 1.0                     # sample from the most probable tokens whose probabilities add up to top_p
min_p = 0.0                     # sample from tokens with at least min_p times the top token's probability
repetition_penalty = 1.0        # 1: off; try 1.1 to 1.3 if the model repeats itself
stop = ""                       # end a story before this text; separate several texts with |
seed = 1337                     # change it to get other stories; a GPU draws other random numbers than a CPU
# output
stream = True                   # print the first story as it is generated
echo = True                     # print the prompt before the story
logprobs = False                # list each token with its log-probability in nats
show_probs: bool | str = False  # logprobs with colors and likely alternatives; a name such as output/probs.html writes
                                # them to a web page instead
# machine
quantize = ""                   # int8: 8-bit weights, on a CPU only; the same seed then gives other stories in
                                # another batch
compile = False                 # CPU: a single story 1.2-2x faster, several 1.2x; needs a C++ compiler, and compiles
                                # each case once (15 s); if busy, set OMP_NUM_THREADS=1. NVIDIA GPU: uses a CUDA graph
batch_size = 32                 # prompts of input_file per batch; halve it when memory runs out
device = "auto"                 # auto (a GPU if PyTorch finds one), cpu, cuda, cuda:1, mps
dtype = "auto"                  # precision: auto (chosen for the device), float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------


class TextGenerator(BaseTextGenerator):
    """The generator of tinyllm/generator.py with the settings above as defaults."""

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

RECORD_START = b'{"prompt": "'       # start of each line of output_file
# setting: the setting it requires
ONLY_WITH = {"system": "interactive", "output_file": "input_file"}
GENERATION_ONLY = ("prompt", "num_samples", "logprobs", "show_probs", "stream")
# mode: settings that have no effect in it
IGNORED_WITH = {
    "score": (*GENERATION_ONLY, "interactive", "input_file", "echo", "max_new_tokens", "temperature", "top_k", "top_p",
              "min_p", "stop", "repetition_penalty", "compile"),
    "interactive": (*GENERATION_ONLY, "input_file", "echo"),
    "input_file": GENERATION_ONLY,
}


def main() -> None:
    ranks = distributed.from_env()
    cfg, _ = cli.parse_settings(globals(), out=sys.stderr if ranks.is_main else io.StringIO())
    with explain_device_errors(oom_advice(cfg)):
        if ranks.world_size > 1:
            run_tensor_parallel(cfg, ranks)
        else:
            generator, text = prepare(cfg)
            run_mode(generator, text, cfg)


def oom_advice(cfg: SimpleNamespace) -> str:
    """Return the settings to try when memory runs out."""
    name = "batch_size" if cfg.input_file else "num_samples"
    if getattr(cfg, name) > 1 and not cfg.score and not cfg.interactive:
        return f"generate fewer texts at a time: --{name} {getattr(cfg, name) // 2}"
    if cfg.score:
        return "use a smaller model, or --device cpu if this is a GPU"
    return "use a smaller model, fewer tokens (--max_new_tokens), or --device cpu if this is a GPU"


def run_tensor_parallel(cfg: SimpleNamespace, ranks: distributed.DistributedContext) -> None:
    """Shard the model over the processes. The main process runs the mode; the others only compute."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # torchrun forwards Ctrl-C, which ends all processes
    cfg.device = ranks.device(cfg.device)
    with distributed.distributed_context():
        tp_group = optional.load("tensor_parallel").TensorParallelGroup(ranks)
        with ranks.fail_together(tp_group.control_group):
            generator, text = prepare(cfg, tp_group)
        generator.engine.run(partial(run_mode, generator, text, cfg))


def prepare(cfg: SimpleNamespace, tp_group: Any = None) -> tuple[TextGenerator, str]:
    """Check the settings, read the input in the main process, and load the model."""
    check_settings(cfg)
    text = read_input(cfg) if not tp_group or tp_group.is_main else ""
    return TextGenerator(cfg.checkpoint, cfg.tokenizer, cfg.seed, cfg.device, cfg.dtype, cfg.quantize, cfg.compile,
                         cfg.chat, tp_group), text


def check_settings(cfg: SimpleNamespace) -> None:
    """Raise UserError for values out of range and for settings without effect."""
    validate_sampling(cfg.max_new_tokens, SamplingParams(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p,
                                                         cfg.repetition_penalty))
    for name in ("num_samples", "batch_size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(cfg, name)}")
    for name, needed in ONLY_WITH.items():
        if getattr(cfg, name) and not getattr(cfg, needed):
            raise UserError(f"--{name} has no effect without --{needed}")
    for mode in IGNORED_WITH:
        for name in IGNORED_WITH[mode]:
            if getattr(cfg, mode) and getattr(cfg, name) != globals()[name]:
                raise UserError(f"--{name} has no effect with --{mode}")
    if isinstance(cfg.show_probs, str) and not cfg.show_probs.endswith((".html", ".htm")):
        raise UserError("--show_probs must be True, False or the name of a page, such as output/probs.html")


def read_input(cfg: SimpleNamespace) -> str:
    """Return the prompt, or the content of the file named by score, input_file or prompt."""
    path = cfg.score or cfg.input_file
    if not path and not cfg.prompt.startswith("FILE:"):
        return cfg.prompt
    path = path or cfg.prompt.removeprefix("FILE:")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"no file at {Path(path).resolve()}{suggest_path(path)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text\n       save it as UTF-8 in a text editor") from error
    if cfg.input_file and not text:
        raise UserError(f"{path} is empty; expected one prompt per line")
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
    """Print the first story as it is generated, then the others from the same batch."""
    completions = [Completion(prompt) for _ in range(cfg.num_samples)]
    pieces = generator.generate(completions, **sampling_kwargs(cfg))       # may first compile and print a note
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
    """Complete the prompts. Print the texts, or append the missing ones to output_file."""
    path = Path(cfg.output_file)
    n_finished = count_finished(path, prompts) if cfg.output_file else 0
    if n_finished:
        print(f"{n_finished} of {len(prompts)} are already in {path}, with the settings of that run", file=sys.stderr)
    if n_finished == len(prompts):
        return
    chunk_size = 4 * cfg.batch_size
    first_chunk = n_finished - n_finished % chunk_size       # an interrupted run resumes with the same batches
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
    """Complete the prompts with these indices in batches of similar length. Returns completions in order."""
    by_length = sorted(sample_ids, key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for begin in range(0, len(by_length), cfg.batch_size):
        batch = by_length[begin:begin + cfg.batch_size]
        batch_prompts = [prompts[i] for i in batch]
        completions |= zip(batch, generator.completions(batch_prompts, **sampling_kwargs(cfg), sample_ids=batch))
    return [completions[i] for i in sample_ids]


def count_finished(path: Path, prompts: list[str]) -> int:
    """Return the number of prompts that output_file contains. Remove an incomplete last line from it."""
    if not path.is_file():
        raise UserError(f"{path} is not a regular file\n       choose another --output_file")
    content = path.read_bytes()
    *lines, incomplete = content.split(b"\n")
    try:
        finished = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} was not written by this command\n       choose another --output_file") from error
    if finished != prompts[:len(finished)] or not RECORD_START.startswith(incomplete[:len(RECORD_START)]):
        raise UserError(f"{path} belongs to other prompts\n       choose another --output_file")
    if incomplete:
        os.truncate(path, len(content) - len(incomplete))
    return len(finished)


if __name__ == "__main__":
    cli.run_script(main)
