"""Step 4 of 4: let the model write.

    python sample.py                                                  # a story from nothing
    python sample.py --prompt "One day, Lily met a Shoggoth"          # one that begins like this
    python sample.py --prompt FILE:beginning.txt --num_samples 3 --temperature 0.7 --seed 7

Needs the checkpoint of step 3 and nothing else: the vocabulary is inside. Stories go to stdout, a line
`---` between them; everything else goes to stderr. The same seed gives the same stories.
"""
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import checkpoint as checkpoints
import device as devices
import engine
import settings
from settings import UserError
from tokenizer import Tokenizer

# ---- settings -----------------------------------------------------------------------------------
checkpoint = "output/ckpt.pt"   # the model; output/last.pt is the newest, ckpt.pt the best
tokenizer = ""                  # a .model file; empty: the vocabulary inside the checkpoint
prompt = ""                     # how the stories begin; FILE:path reads a file
num_samples = 1                 # stories, written at the same time
max_new_tokens = 256            # a story may end sooner
temperature = 0.8               # 0: always the likeliest token; 1: as the model sees it; more: wilder
top_k = 300                     # draw from the k likeliest tokens; 0: from all
top_p = 1.0                     # draw from the likeliest tokens that together have this probability
seed = 1337                     # another one gives other stories
device = "auto"                 # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                  # auto, float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------


class TextGenerator:
    """A trained model with its vocabulary: text in, text out.

        generator = TextGenerator("output/ckpt.pt")
        stories = generator.sample("Once upon a time", num_samples=3)
    """

    def __init__(self, checkpoint: str | Path = checkpoint, tokenizer_model_path: str | Path | None = None,
                 seed: int = seed, device: str = device, dtype: str = dtype):
        """Load a checkpoint. Raises UserError when it, the vocabulary or the device cannot be used."""
        self.where = devices.choose(device, dtype, training=False)
        state = checkpoints.load(checkpoint)
        self.tokenizer = Tokenizer(tokenizer_model_path) if tokenizer_model_path else checkpoints.build_tokenizer(state)
        self.model = checkpoints.build_model(state).to(self.where.device, self.where.dtype).eval()
        self.seed = seed
        expected = state.get("tokenizer_sha256")
        if expected and expected != self.tokenizer.sha256:
            raise UserError(f"{tokenizer_model_path} is not the vocabulary that {checkpoint} was trained with\n"
                            "       leave --tokenizer out: the right one is inside the checkpoint")
        if self.tokenizer.n_words != self.model.args.vocab_size:
            raise UserError(f"the vocabulary has {self.tokenizer.n_words} entries, the model "
                            f"{self.model.args.vocab_size}; they do not belong together")

    def sample(self, start: str = prompt, num_samples: int = num_samples, *rest, **options) -> list[str]:
        """Write num_samples texts and return them, `start` included. Takes the arguments of `stream`."""
        texts = [""] * num_samples
        for row, piece in self.stream(start, num_samples, *rest, **options):
            texts[row] += piece
        return texts

    def stream(self, start: str = prompt, num_samples: int = num_samples, max_new_tokens: int = max_new_tokens,
               temperature: float = temperature, top_k: int = top_k, top_p: float = top_p,
               seed: int | None = None) -> Iterator[tuple[int, str]]:
        """Yield (number of the text, what is new in it) as the texts grow, in whole characters.

        Args: as in the settings block; seed None is the one of the generator.
        Raises: UserError for a setting that cannot be used.
        """
        check(num_samples, max_new_tokens, temperature, top_k, top_p)
        first = [self.tokenizer.bos_id] + self.tokenizer.encode(start)
        rows, shown = [list(first) for _ in range(num_samples)], [0] * num_samples

        def news(row: int, unfinished: str) -> Iterator[tuple[int, str]]:
            """What a text has more than was shown, without the beginning of a character if that is all there is."""
            text = self.tokenizer.decode(rows[row]).rstrip(unfinished)
            if len(text) > shown[row]:
                yield row, text[shown[row]:]
                shown[row] = len(text)

        steps = engine.generate(self.model, rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                eos_id=self.tokenizer.eos_id, seed=self.seed if seed is None else seed)
        for step in chain([[None] * num_samples], steps):
            for row, token in enumerate(step):
                rows[row] += [token] if token is not None else []
                yield from news(row, "\ufffd")
        for row in range(num_samples):
            yield from news(row, "")


def check(num_samples: int, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError with every setting that cannot be used."""
    problems = [text for wrong, text in [
        (num_samples < 1, f"num_samples must be at least 1, not {num_samples}"),
        (max_new_tokens < 0, f"max_new_tokens must not be negative, not {max_new_tokens}"),
        (not 0 <= temperature < float("inf"), f"temperature must be 0 or more, not {temperature}"),
        (top_k < 0, f"top_k must be 0 (all) or more, not {top_k}"),
        (not 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")] if wrong]
    if problems:
        raise UserError("; ".join(problems))


def main() -> None:
    cfg, _ = settings.read(globals(), out=sys.stderr)
    check(cfg.num_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p)
    start = read_prompt(cfg.prompt)
    generator = TextGenerator(cfg.checkpoint, cfg.tokenizer or None, cfg.seed, cfg.device, cfg.dtype)
    print(f"{cfg.checkpoint}: {generator.model.count_parameters():,} parameters, on {generator.where}", file=sys.stderr)
    pieces = generator.stream(start, cfg.num_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p)
    longest = max(len(generator.tokenizer.encode(text)) for text in write(pieces, cfg.num_samples))
    window = generator.model.args.max_seq_len
    if longest > window:
        print(f"note: the model sees {window} tokens; past them it went on from the beginning mark and the newer half",
              file=sys.stderr)


def read_prompt(text: str) -> str:
    if not text.startswith("FILE:"):
        return text
    path = Path(text.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no prompt file at {path.resolve()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error


def write(pieces: Iterator[tuple[int, str]], count: int) -> list[str]:
    """Print the first text as it comes, and the others, which end at about the same time, after it."""
    texts = [""] * count
    for row, piece in pieces:
        texts[row] += piece
        if row == 0:
            print(piece, end="", flush=True)
    print("", *texts[1:], sep="\n---\n", flush=True)
    return texts


if __name__ == "__main__":
    settings.run(main)
