"""Cleaning of dialogues: capital letters, refusals, broken shapes. Pure functions on text.

The dataset card of HuggingFaceH4/ultrachat_200k says that about 5% of the dialogues were truecased
and those with such phrases as "I don't have opinions" removed. Neither program nor list is public,
so the rules here are ours. They are made for English; switch them off for other languages.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence

from zephyr_jax.data.raw.schema import Turn

_CLAIMS = ("emotions", "opinions", "feelings", "personal experiences", "personal opinions")
_CLAIMS += ("personal preferences", "beliefs")
_DENIALS = (f"I {do_not} have {noun}" for do_not in ("do not", "don't") for noun in _CLAIMS)
REFUSAL_PHRASES = (*_DENIALS, "As an AI language model", "As an AI")


@dataclasses.dataclass(frozen=True)
class CleaningRules:
    """Which rules apply to dialogues, and the phrases that mark a refusal."""

    truecase: bool = True
    drop_refusals: bool = True
    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES
    # Keep dialogues with turns of tools, for chat templates that have such turns.
    keep_tool_turns: bool = False


# An opened fence that is never closed runs to the end of the text, as in Markdown.
_FENCE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
_INLINE = re.compile(
    r"`[^`\n]+`"
    # Closing punctuation is not part of a URL, so that the sentence after it is still seen.
    r"|(?<!\w)(?:(?:https?|ftp)://|www\.)\S*[^\s.,;:!?)\]'\"]"
    r"|(?<![^\s<(])[^\s@<(]+@[\w.-]+\w"
)
_LINE = re.compile(r"[^\n]+")
# Code and tables without a fence. A line wrongly taken for code only keeps its own case.
_CODE_LINE = re.compile(
    r"^(?:\ {4}|\t)|[;{}]\ *$|[-+*/<>=!]=|=>|->|\+\+|</|\ =\ "
    r"|(?<!\w)[A-Za-z_]\w*+\((?!(?:s|es|ies|ren|ed|ly)\))"
    r"|^(?:import\ [\w.]+|from\ [\w.]+\ import|for\ \w+\ in|return)\b"
    r"|^(?:if|elif|else|while|with|try|except)\b.*:\ *$"
    r"|^\w++,\ *\d",
    re.MULTILINE,
)
# An ellipsis ends no sentence: "well... maybe". The word is only looked at, so that its own full
# stop can begin the next match.
_START = re.compile(r"[\n.!?](?:(?<=\n)|(?<=[.!?])(?<!\.\.)\ +)(?=(?P<token>(?![A-Z])[^\W\d_]\S*))")
# A long line that ends in mid-sentence was wrapped: the next one only goes on.
_WRAPPED = re.compile(r"[^\n]{39}(?<=[a-z,])\n\Z")
_PLAIN_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*(?![\w('\u2019-])")
_NOT_PROSE = re.compile(r"[_@/\\=<>{}()\[\]#$]|\.\w")
_ABBREVIATION = re.compile(
    r"(?<![^\s(])(?:[^\W\d_iI]|(?:[^\W\d_]\.)+[^\W\d_]|etc|ex|vs|cf|al|approx|ca|fig|dr|mr|mrs|ms|st)"
    r"\.\Z",
    re.IGNORECASE,
)
_PRONOUN = re.compile(
    # The letter stands first, for speed: what is before it is only looked at where there is one.
    r"i(?<![^\s\"'\u201c\u2018(]i)"
    r"(?=['\u2019](?:m|ll|ve|d|s)\b|[\s,!?;:]|\.(?:\s|\Z)|\Z)(?!,?\s?ii)"
)
# Where i is an index somewhere in the text, it is not the pronoun anywhere.
_INDEX = re.compile(r"\[i\b|\bi(?:\ ?[-=<>+*/^≤≥]|-?th\b|\ (?:and|or)\ j\b|,\ ?j\b)|\bfor\ i\b")


def truecase(text: str) -> str:
    r"""The text with capitals at sentence starts and for the pronoun I.

    A sentence starts at the beginning of the text, after a newline (unless a long line was
    wrapped there in mid-sentence), and after one of `.!?` and a space (an ellipsis, an initial and
    abbreviations such as "e.g." end none). Nothing changes in code, URLs and e-mail addresses, nor
    in words with capitals of their own. A lone letter is a word only if it is "a" or, in a text
    that does not use i as an index, "i".

    >>> truecase("Hello. how are you? fine, and i'm glad.")
    "Hello. How are you? Fine, and I'm glad."
    >>> truecase("iPhone users: see https://a.org/x. it helps, e.g. here.\nthen `x. y` runs")
    'iPhone users: see https://a.org/x. It helps, e.g. here.\nThen `x. y` runs'
    """
    marked = "\n" + text  # so that the text begins like any other line
    places = [
        start.start("token") - 1
        for start in _START.finditer(marked)
        if marked[start.start("token")].islower()
        and _is_word(start["token"])
        and not _ABBREVIATION.search(marked, max(0, start.start() - 8), start.start() + 1)
        and not _WRAPPED.search(marked, max(0, start.start() - 40), start.end())
    ]
    pronouns = [pronoun.start() for pronoun in _PRONOUN.finditer(text)]
    if pronouns and not _INDEX.search(text):
        # An i that numbers the items of a list, as in "i. First", is not the pronoun.
        places += [at for at in pronouns if text[at + 1 : at + 2] != "." or marked[at] != "\n"]
    if not places:
        return text
    spans = [code.span() for pattern in (_FENCE, _INLINE) for code in pattern.finditer(text)]
    spans += [line.span() for line in _LINE.finditer(text) if _CODE_LINE.search(line[0])]
    protected = bytearray(len(text))  # 1 inside code, URLs and addresses
    for start, end in spans:
        protected[start:end] = b"\1" * (end - start)
    characters = list(text)
    for at in places:
        if not protected[at]:
            characters[at] = text[at].upper()
    return "".join(characters)


def _is_word(token: str) -> bool:
    """Whether a run of non-blanks is an ordinary lower-case word, punctuation behind it allowed."""
    return (
        token == token.lower()
        and (token == "a" or token[1:2].isalpha() or token[1:2] in ("'", "\u2019"))
        and len(token[0].upper()) == 1
        and _PLAIN_WORD.match(token) is not None
        and _NOT_PROSE.search(token) is None
    )


def refusal(text: str, phrases: Sequence[str] = REFUSAL_PHRASES) -> str | None:
    """The first phrase of the list that occurs in the text as whole words, or None.

    Upper and lower case, the shape of the apostrophe and the space between words do not matter.
    """
    plain = _plain(text)
    for phrase in phrases:
        wanted = _plain(phrase)
        if wanted in plain and re.search(rf"\b{re.escape(wanted)}\b", plain):
            return phrase
    return None


@functools.lru_cache(maxsize=64)  # the phrases stay, as each text is compared to them
def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").lower().split())


def clean_dialogue(
    turns: list[Turn], rules: CleaningRules
) -> tuple[list[Turn] | None, Counter[str]]:
    """The cleaned turns, or None for a dialogue that is dropped, and the rules that applied.

    Turns start with the user. Calls of tools and their results may be blank and stay as they are.
    """
    if not turns:
        return None, Counter(empty_dialogue=1)
    if turns[-1]["role"] == "user":
        return None, Counter(odd_dialogue=1)
    written = [turn for turn in turns if turn["role"] != "tool" and "tool_calls" not in turn]
    if not all(turn["content"].strip() for turn in written):
        return None, Counter(empty_turn=1)
    answers = (turn["content"] for turn in turns if turn["role"] == "assistant")
    if rules.drop_refusals and any(refusal(text, rules.refusal_phrases) for text in answers):
        return None, Counter(refusal=1)
    if not rules.truecase:
        return turns, Counter()
    cleaned = [
        {**turn, "content": truecase(turn["content"])} if turn in written else turn
        for turn in turns
    ]
    return cleaned, Counter(truecase=1) if cleaned != turns else Counter()
