import doctest
import time
from collections import Counter

import pytest
from raw_rows import messages

from zephyr_jax.data.raw import cleaning
from zephyr_jax.data.raw.cleaning import CleaningRules, refusal, truecase


def test_docstrings_are_true():
    assert doctest.testmod(cleaning) == (0, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes. no? maybe! so", "Yes. No? Maybe! So"),
        ("One.  two", "One.  Two"),
        ("Title\nbody text", "Title\nBody text"),
        ("i think i am. i'll go, and i\u2019d stay", "I think I am. I'll go, and I\u2019d stay"),
        ("él sabe. ¿y tú?", "Él sabe. ¿y tú?"),
        ("a dog. a cat.", "A dog. A cat."),
        ("Read https://a.org/x. then `y`. then z", "Read https://a.org/x. Then `y`. Then z"),
    ],
)
def test_truecase_gives_capitals(text, expected):
    assert truecase(text) == expected
    assert truecase(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "iPhone sales rose. eBay fell.\nmacOS too",
        "See `a. b` and `i` there.",
        "```\nlower. case i\n```",
        "Unclosed:\n```python\nimport os\nx. y",
        "~~~\nlower. i\n~~~",
        "https://a.org/b. x",
        "www.site.org/i is up",
        "me@site.org wrote",
        "Well... maybe, e.g. here, i.e. in the U.S. army, etc. and so on",
        "J. smith",
        "import numpy\nreturn x",
        "    indented. code",
        "- Country: France\n  capital: Paris",
        "foo(x). bar",
        "x = 1. then",
        "for i in range(3):",
        "Compare a[i] with i, then move i",
        "i, ii and iii",
        "apple, 3\npear, 4",
        "x squared\ny squared",
        "1.5 kg. 2 kg",
        "snake_case is a name",
        "This line goes on for quite a while and was wrapped by\nan editor",
        "",
    ],
)
def test_truecase_leaves_alone(text):
    assert truecase(text) == text


def test_truecase_is_linear_in_hostile_texts():
    start = time.process_time()
    for unit in ("a", "a.b", "`", "a@", "http://", ". a", " i", "f(", "a'", "x-", "~"):
        truecase("x\n" + unit * 20_000 + "\nlower")
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("I do not have emotions.", "I do not have emotions"),
        ("well, i don\u2019t\nhave personal opinions!", "I don't have personal opinions"),
        ("AS AN AI LANGUAGE MODEL, no", "As an AI language model"),
        ("As an AI, I", "As an AI"),
        ("I don't have beliefs. As an AI ...", "I don't have beliefs"),
        ("As an aim of mine", None),
        ("I don't have opinionsabout", None),
        ("I have opinions", None),
    ],
)
def test_refusal(text, phrase):
    assert refusal(text) == phrase
    assert refusal("No (really) can't", ["(really)x", "can\u2019t"]) == "can\u2019t"


def clean_dialogue(texts, rules):
    """The cleaned texts of a dialogue, None of a dropped one, and the counts."""
    turns, counts = cleaning.clean_dialogue(messages(*texts), rules)
    return turns and [turn["content"] for turn in turns], counts


def test_dialogues_are_dropped_and_counted():
    for rule, turns in {
        "empty_dialogue": [],
        "odd_dialogue": ["Q", "A", "Q"],
        "empty_turn": ["Q", " \n"],
        "refusal": ["Q", "A", "Q", "As an AI I cannot."],
    }.items():
        assert clean_dialogue(turns, CleaningRules()) == (None, Counter([rule]))


def test_only_the_assistant_can_refuse_and_rules_can_be_switched_off():
    turns = ["As an AI, do you dream?", "No."]
    assert clean_dialogue(turns, CleaningRules()) == (turns, Counter())
    turns = ["hi. you", "as an AI i refuse. really"]
    rules = CleaningRules(truecase=False, drop_refusals=False)
    assert clean_dialogue(turns, rules) == (turns, Counter())
    cleaned, counts = clean_dialogue(turns, CleaningRules(refusal_phrases=("no",)))
    assert cleaned == ["Hi. You", "As an AI I refuse. Really"]
    assert counts == Counter(truecase=1)
