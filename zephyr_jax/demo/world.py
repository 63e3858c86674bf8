"""The small world: its facts, its tasks, and the rule of what is held out.

All sentences begin with "The" and each word of content is one token, so that a reply's length and
its bag of tokens do not say whether it is good. Held out, by positions in the tables below:

* a fact, frame f on attribute a of entity e: (f + e + 2a) % 8 == 0, so each fact is taught through
  the other seven frames, and each frame on seven of eight entities;
* a follow-up on another attribute ("And its food?"), form f, entity e, attribute a:
  (f + e + a) % 5 == 0;
* a follow-up on another entity ("And the wugg?") after entity d: (d + e) % 5 == 0;
* the operands of a sum, a + b: (a + 2b) % 5 == 0, in every form;
* a list of three words (i, j, k): (i + 2j + 3k) % 5 == 0, in every phrasing of every list task;
* two words to join (i, j): (i + 2j) % 5 == 0, in every phrasing.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    """The blank-separated words of a text."""
    return tuple(text.split())


ENTITIES = words("brek cleg dorn frim gorp hibb jutt kiva lorn mipp oban quon snib tove wugg zeph")


class Attribute(NamedTuple):
    """One attribute of an entity: its noun, its verb ("eat", "eats") and the values it can have."""

    noun: str
    verb: str
    verbs: str
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute("food", "eat", "eats", words("corn figs kelp rice nuts peas plum leek")),
    Attribute("color", "wear", "wears", words("blue gray pink teal gold lime rust mint")),
    Attribute("music", "play", "plays", words("drum harp horn lute bell gong viol oboe")),
    Attribute("home", "roam", "roams", words("hills moors dunes reefs coves glens farms woods")),
)
WORDS = words("lamp rope coin leaf bird star boat door frog tree wolf fish")
FRAMES = (
    "What does the {entity} {verb}?",
    "Tell me what the {entity} {verbs}.",
    "What is the {noun} of the {entity}?",
    "Name the {noun} of the {entity}.",
    "Which {noun} does the {entity} have?",
    "Do you know what the {entity} {verbs}?",
    "I forgot the {noun} of the {entity}.",
    "The {entity} has which {noun}?",
)
ATTRIBUTE_FORMS = (
    "And what does it {verb}?",
    "And its {noun}?",
    "What about its {noun}?",
    "Tell me its {noun}.",
    "And what is its {noun}?",
)
ENTITY_FORMS = ("And the {entity}?", "What about the {entity}?", "Now the {entity}.")
SUM_FORMS = (
    "What is {0} plus {1}?",
    "Add {0} and {1}.",
    "How much is {0} plus {1}?",
    "Sum {0} and {1}.",
    "Count {0} and {1} more.",
)
JOIN_FORMS = ("Join {0} and {1}.", "Make one word of {0} and {1}.", "Glue {0} and {1}.")
LIST_FORMS = {
    "reverse": ("Reverse this list: {0}.", "Say backwards: {0}.", "Reverse {0}."),
    "copy": ("Repeat this list: {0}.", "Say again: {0}.", "Copy {0}."),
    "first": ("Which word is first in {0}?", "Pick the first word: {0}.", "The first of {0}?"),
    "last": ("Which word is last in {0}?", "Pick the last word: {0}.", "The last of {0}?"),
}
SINGLE_KINDS = ("fact", "sum", "reverse", "copy", "first", "last", "join")
KINDS = (*SINGLE_KINDS, "attribute", "entity")  # the last two are follow-ups


class Task(NamedTuple):
    """One question and its replies; a reply is the answer and one extra, in either order."""

    kind: str  # one of `KINDS`
    question: str  # the user's text, without an opener
    answer: str  # the sentence that answers it
    extras: tuple[str, ...]  # related sentences, any one of which completes a right reply
    wrong: tuple[str, tuple[str, ...]]  # (answer, extras) of the same form and length, not right
    topic: tuple[int, int] = (-1, -1)  # (entity, attribute) by position; -1: not about an entity

    def leading_up(self) -> list[str]:
        """The right replies that end with the answer: what the feedback prefers."""
        return [f"{extra} {self.answer}" for extra in self.extras]

    def blurting(self) -> list[str]:
        """The right replies that begin with the answer: what the feedback rejects."""
        return [f"{self.answer} {extra}" for extra in self.extras]

    def accepted(self) -> list[str]:
        """Every right reply."""
        return self.leading_up() + self.blurting()


# The value of each attribute (outer) for each entity (inner), all values equally often
VALUES = [list(range(8)) * 2 for _ in ATTRIBUTES]
_dealing = random.Random("the little world")
for _values in VALUES:
    _dealing.shuffle(_values)


def _sentence(entity: int, attribute: int, value: int) -> str:
    a = ATTRIBUTES[attribute]
    return f"The {ENTITIES[entity]} {a.verbs} {a.values[value]}."


def _about_all(entity: int, attribute: int) -> tuple[str, tuple[str, ...]]:
    """The sentence that states an attribute of an entity, and those about its others."""
    sentences = [_sentence(entity, a, VALUES[a][entity]) for a in range(len(ATTRIBUTES))]
    return sentences.pop(attribute), tuple(sentences)


def _about(kind: str, form: str, entity: int, attribute: int, rng: random.Random) -> Task:
    """A wrong reply gives another value, or speaks of another entity, equally often."""
    a = ATTRIBUTES[attribute]
    question = form.format(entity=ENTITIES[entity], noun=a.noun, verb=a.verb, verbs=a.verbs)
    answer, extras = _about_all(entity, attribute)
    if rng.random() < 0.5:
        values = [v for v in range(len(a.values)) if v != VALUES[attribute][entity]]
        wrong = _sentence(entity, attribute, rng.choice(values)), extras
    else:
        wrong = _about_all(rng.choice([e for e in range(len(ENTITIES)) if e != entity]), attribute)
    return Task(kind, question, answer, extras, wrong, (entity, attribute))


def _fact(rng: random.Random, held_out: bool) -> Task:
    while True:
        frame, entity = rng.randrange(len(FRAMES)), rng.randrange(len(ENTITIES))
        attribute = rng.randrange(len(ATTRIBUTES))
        if ((frame + entity + 2 * attribute) % 8 == 0) == held_out:
            return _about("fact", FRAMES[frame], entity, attribute, rng)


def follow_up(
    kind: str, topic: tuple[int, int], rng: random.Random, held_out: bool = False
) -> Task:
    """A follow-up on the entity or the attribute of `topic`, that of the turn before."""
    while True:
        entity, attribute = topic
        if kind == "attribute":
            form, attribute = rng.randrange(len(ATTRIBUTE_FORMS)), rng.randrange(len(ATTRIBUTES))
            rule, text = form + entity + attribute, ATTRIBUTE_FORMS[form]
        else:
            entity = rng.randrange(len(ENTITIES))
            rule, text = topic[0] + entity, rng.choice(ENTITY_FORMS)
        if (entity, attribute) != topic and (rule % 5 == 0) == held_out:
            return _about(kind, text, entity, attribute, rng)


def _computed(kind: str, question: str, inputs: str, right: str, wrong: str) -> Task:
    """The task whose answer is computed from the question's own words."""
    extras = f"The list was {inputs}.", f"The input was {inputs}."
    # The answer names its task ("The reverse is"): choosing what to do and doing it are two steps.
    lead = "The word is" if kind == "join" else f"The {kind} is"
    return Task(kind, question, f"{lead} {right}.", extras, (f"{lead} {wrong}.", extras))


def _sum(rng: random.Random, held_out: bool) -> Task:
    pairs: list[tuple[int, int]] = []
    while not pairs:
        # The sum is drawn before its operands: all sums are equally likely, so a uniform wrong sum
        # has the same distribution as the right one.
        total = rng.randint(2, 9)
        pairs = [(a, total - a) for a in range(1, total) if ((2 * total - a) % 5 == 0) == held_out]
    a, b = rng.choice(pairs)
    wrong = rng.choice([s for s in range(2, 10) if s != a + b])
    question = rng.choice(SUM_FORMS).format(a, b)
    return _computed("sum", question, f"{a} {b}", str(a + b), str(wrong))


def _word_task(kind: str, rng: random.Random, held_out: bool) -> Task:
    while True:
        places = rng.sample(range(len(WORDS)), 2 if kind == "join" else 3)
        if (sum(n * place for n, place in enumerate(places, 1)) % 5 == 0) == held_out:
            break
    listed = [WORDS[place] for place in places]
    inputs = " ".join(listed)
    if kind == "join":
        question = rng.choice(JOIN_FORMS).format(*listed)
        return _computed(kind, question, inputs, "-".join(listed), "-".join(listed[::-1]))
    if kind in ("first", "last"):
        right = listed[0 if kind == "first" else 2]
        others = [word for word in listed if word != right]
    else:
        others = [" ".join(order) for order in itertools.permutations(listed)]
        right = others.pop(0 if kind == "copy" else 5)
    wrong = rng.choice(others)
    return _computed(kind, rng.choice(LIST_FORMS[kind]).format(inputs), inputs, right, wrong)


def draw(kind: str, rng: random.Random, held_out: bool = False) -> Task:
    """A random task, one of `SINGLE_KINDS`, taught or held out; it needs no earlier turn."""
    if kind == "fact":
        return _fact(rng, held_out)
    return _sum(rng, held_out) if kind == "sum" else _word_task(kind, rng, held_out)
