"""The built-in stories: reproducible, distinct and consistent."""
import hashlib
import re
from collections import Counter

import pytest

from tinyllm import demo_stories
from tinyllm.demo_stories import ANIMALS, BOYS, GIRLS

FEMALE = {*GIRLS, *(she for _, she in ANIMALS.values())}
MALE = {*BOYS, *(he for he, _ in ANIMALS.values())}


@pytest.fixture(scope="module")
def stories():
    return list(demo_stories.generate_stories())


def test_there_are_twenty_thousand_distinct_ones(stories):
    assert len(set(stories)) == len(stories) == 20_000
    assert 10e6 < sum(map(len, stories)) < 16e6


def test_the_vocabulary_is_about_a_thousand_words(stories):
    words = Counter(word for story in stories for word in re.findall(r"[a-z']+", story.lower()))
    assert 900 < len(words) < 1200 and min(words.values()) > 10


def test_same_seed_same_stories_on_every_platform(stories):
    first = "\n".join(stories[:1000]).encode()
    assert hashlib.sha256(first).hexdigest() == "bd73a68d05b1f9fcb377f7c6a037b3e6c37713e82a4152932d46f8507e05f769"
    assert list(demo_stories.generate_stories(5, seed=1)) != stories[:5]


def test_nothing_of_the_grammar_is_left(stories):
    assert not [story for story in stories if re.search(r"[\[\]{}|]|  | \n|\n\n\n| [.,!?]|\.\.|^\s|\s$", story)]
    assert not [story for story in stories if re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", story)]
    assert all(re.search(r'[.!?]"?$', paragraph) for story in stories for paragraph in story.split("\n\n"))


def test_names_stay_the_same(stories):
    for story in stories:
        named = Counter(re.findall(r"\b(?:" + "|".join(MALE | FEMALE) + r")\b", story))
        assert 1 <= len(named) <= 2, story
        assert max(named.values()) >= 3, story


def test_pronouns_follow_their_names(stories):
    """In a story of one sex only, the words of the other sex do not occur."""
    checked = 0
    for story in stories:
        words = set(re.findall(r"\w+", story))
        people = words & (MALE | FEMALE)
        helpers = words & {"mom", "grandma", "aunt", "sister", "dad", "grandpa", "uncle", "brother", "man", "teacher"}
        if people and not helpers and (people <= MALE or people <= FEMALE):
            other = {"she", "She", "her", "Her"} if people <= MALE else {"he", "He", "him", "his", "His"}
            assert not words & other, story
            checked += 1
    assert checked > 500


def test_every_slot_of_the_grammar_is_used_and_filled():
    (common, _), *plots = demo_stories.parse_grammar(demo_stories.GRAMMAR.read_text(encoding="utf-8"))
    assert len(plots) == 14
    for slots, text in plots:
        everything = text + " ".join(value for values in [*slots.values(), *common.values()] for value in values)
        for names in slots:
            for name in names.split(" / "):
                assert re.search(f"{{{name}}}", everything, re.IGNORECASE), name
            assert all(len(value.split(" / ")) == len(names.split(" / ")) for value in slots[names]), names
