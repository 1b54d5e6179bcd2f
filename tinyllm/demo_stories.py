"""Generate the built-in text: short synthetic stories from a grammar, so that all four steps run offline.

Each story draws a plot, then its people, things and phrases. The stories are good for trying things out; a model that
can write about anything needs real text. The same seed gives the same stories on every platform.

In demo_grammar.txt, `== name` begins a plot: first its slots, then its paragraphs. ` | ` separates the values of a
slot, and `a / b = x / y | ...` fills two slots together. In a paragraph, `[a|b]` picks an option, `{slot}` inserts a
value, and `{Slot}` capitalizes it. `{he} {him} {his}` refer to the hero, `{fhe}` to the friend, `{hhe}` to the helper.
"""
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllm.files import atomic_replace

GRAMMAR = Path(__file__).with_name("demo_grammar.txt")
FOLDER = Path("data/demo")
N_FILES = 10
BOYS = "Tom Ben Max Sam Leo Jack Finn Oscar Noah Theo Hugo Eli Peter Felix".split()
GIRLS = "Lily Mia Anna Sue Zoe Emma Ruby Nora Ella Ivy Rosa Clara Amy Lucy".split()
ANIMALS = {  # a male and a female name
    "fox": ("Rusty", "Vera"), "bear": ("Bruno", "Honey"), "rabbit": ("Clover", "Poppy"), "mouse": ("Pip", "Tilly"),
    "duck": ("Quincy", "Daisy"), "cat": ("Milo", "Luna"), "dog": ("Biscuit", "Bella"), "frog": ("Hopper", "Lotta"),
    "squirrel": ("Hazel", "Nutty"), "hedgehog": ("Spike", "Bramble"), "turtle": ("Sheldon", "Tessa"),
    "lamb": ("Woolly", "Fleur"), "owl": ("Oliver", "Olga"), "pony": ("Comet", "Dolly"),
}
PRONOUNS = (("he", "she"), ("him", "her"), ("his", "her"), ("himself", "herself"))


def write_stories() -> Path:
    """Write the stories to data/demo unless it exists. Returns the folder."""
    if FOLDER.is_dir():
        return FOLDER
    print(f"writing synthetic stories to {FOLDER} (generated from a grammar, good for trying things out)")
    stories = [{"story": story} for story in generate_stories()]
    tmp_dir = FOLDER.with_name("demo.tmp")
    tmp_dir.mkdir(parents=True, exist_ok=True)
    for i in range(N_FILES):
        text = json.dumps(stories[i::N_FILES], indent=0)
        (tmp_dir / f"stories{i:02d}.json").write_text(text, encoding="utf-8")
    (tmp_dir / "README.md").write_text("Synthetic stories, by demo_stories.py.\n", encoding="utf-8")
    atomic_replace(tmp_dir, FOLDER)
    return FOLDER


def generate_stories(count: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Yield `count` distinct stories, their paragraphs separated by an empty line."""
    (common, _), *plots = parse_grammar(GRAMMAR.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        slots, text = _pick(rng, plots)
        story = _fill(text, {**common, **slots}, rng)
        if story not in seen:
            seen.add(story)
            yield story


def parse_grammar(grammar: str) -> list[tuple[dict[str, list[str]], str]]:
    """Split the grammar into sections of (slots with their values, text)."""
    sections = []
    for section in re.split("^== ", grammar, flags=re.MULTILINE)[1:]:
        head, *paragraphs = section.strip().split("\n\n")
        lines = re.sub(r"\n +", " ", head).split("\n")[1:]
        slots = {names: values.split(" | ") for names, values in (line.split(" = ") for line in lines)}
        sections.append((slots, "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)))
    return sections


def _fill(text: str, choices: dict[str, list[str]], rng: random.Random) -> str:
    slots = _draw_people(rng)
    for names, values in choices.items():
        slots.update(zip(names.split(" / "), _pick(rng, values).split(" / ")))
    slots |= _pronouns("h", is_female=slots["hhe"] == "she")

    def slot_value(match: re.Match) -> str:
        value = slots[match[1].lower()]
        return value if match[1].islower() else value[:1].upper() + value[1:]
    while "[" in text or "{" in text:                   # innermost brackets first
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: _pick(rng, match[1].split("|")), text)
        text = re.sub(r"\{(\w+)\}", slot_value, text)
    text = re.sub(r" +(?=\s|$)|(?<=\n) +", "", text)     # an empty choice leaves spaces behind
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _draw_people(rng: random.Random) -> dict[str, str]:
    """Draw a hero and a friend with different names."""
    slots: dict[str, str] = {}
    for prefix, label in (("", "name"), ("f", "friend")):
        name, kind, is_female = _draw_person(rng)
        while name == slots.get("name"):
            name, kind, is_female = _draw_person(rng)
        slots |= {label: name, prefix + "kind": kind, **_pronouns(prefix, is_female)}
    return slots


def _draw_person(rng: random.Random) -> tuple[str, str, bool]:
    is_female = rng.random() < 0.5
    if rng.random() < 0.3:
        kind = _pick(rng, list(ANIMALS))
        return ANIMALS[kind][is_female], kind, is_female
    kind, names = ("girl", GIRLS) if is_female else ("boy", BOYS)
    return _pick(rng, names), kind, is_female


def _pronouns(prefix: str, is_female: bool) -> dict[str, str]:
    return {prefix + male: female if is_female else male for male, female in PRONOUNS}


def _pick(rng: random.Random, options: list[Any]) -> Any:
    """Return a random option. Python promises to keep the stream of random(), but not of choice()."""
    return options[int(rng.random() * len(options))]
