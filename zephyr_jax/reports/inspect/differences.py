"""Before and after, word by word, and where a record's texts come from in its raw row."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from zephyr_jax.reports.inspect.spans import Span, merged

_WORDS = re.compile(r"\S+\s*|\s+")
_ALIKE = 0.6  # share of words in common from which a text counts as another one changed


class Leaf(NamedTuple):
    """A value in a raw row, as text, and where it is: `data[0]`, `messages[1].content`."""

    path: str
    text: str
    is_text: bool


def diff_spans(before: str, after: str) -> list[Span]:
    """Both texts in one, word by word: styles `removed` and `added`, none for what stayed.

    Without the added spans the text is `before`, without the removed ones `after`.

    >>> [*map(tuple, diff_spans("i am. here", "I am. here"))]
    [('i ', 'removed'), ('I ', 'added'), ('am. here', '')]
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    spans: list[Span] = []
    for tag, a, b, c, d in _steps(old, new):
        if tag == "equal":
            spans.append(Span("".join(old[a:b])))
        else:
            spans += [Span("".join(old[a:b]), "removed"), Span("".join(new[c:d]), "added")]
    return merged(spans)


def _steps(old: list[str], new: list[str]) -> list[tuple[str, int, int, int, int]]:
    if len(old) == len(new):
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if all(old[i].casefold() == new[i].casefold() for i in changed):  # capitals were mended
            return _changed_in_place(len(old), changed)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=len(old) + len(new) > 2000)
    return [(str(tag), a, b, c, d) for tag, a, b, c, d in matcher.get_opcodes()]


def _changed_in_place(length: int, changed: list[int]) -> list[tuple[str, int, int, int, int]]:
    """The steps where the words at some places were replaced by one each."""
    steps, at = [], 0
    for i in changed:
        steps += [("equal", at, i, at, i), ("replace", i, i + 1, i, i + 1)]
        at = i + 1
    return [*steps, ("equal", at, length, at, length)]


def leaves(row: Any, path: str = "") -> list[Leaf]:
    """All values of a row that hold no others, in their order.

    >>> [leaf.path for leaf in leaves({"id": 3, "data": ["Hi", "Hello"], "more": {"x": None}})]
    ['id', 'data[0]', 'data[1]', 'more.x']
    """
    if isinstance(row, dict) and row:
        return [
            leaf
            for key, value in row.items()
            for leaf in leaves(value, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(row, list | tuple) and row:
        return [leaf for i, value in enumerate(row) for leaf in leaves(value, f"{path}[{i}]")]
    if isinstance(row, str):
        return [Leaf(path, row, True)]
    return [Leaf(path, json.dumps(row, ensure_ascii=False, default=str), False)]


def origins(texts: Sequence[str], found: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """For each text of a record, the leaves that it was made of; none if nothing is like it.

    First the leaf that is the text; else those that it is put together from; else the one most like
    it; else one that holds it, as a transcript does. A leaf that two texts repeat (a prompt in
    front of both answers of a pair) serves both.
    """
    out: list[tuple[int, ...]] = []
    taken: set[int] = set()
    said = [i for i, leaf in enumerate(found) if leaf.is_text and leaf.text.strip()]
    for text in texts:
        same = [i for i in said if found[i].text == text]
        if same:
            match = tuple([i for i in same if i not in taken][:1] or same[:1])
        else:
            match = _parts(text, found, said) or _nearest(text, found, said, taken)
        taken.update(match)
        out.append(match or tuple([i for i in said if text in found[i].text][:1]))
    return out


def _parts(text: str, found: Sequence[Leaf], said: list[int]) -> tuple[int, ...]:
    """Two leaves or more that make up most of a text, such as an instruction and its input."""
    inside = [i for i in said if len(found[i].text) > 1 and found[i].text in text]
    covered = sum(len(found[i].text) for i in inside)
    return tuple(inside) if len(inside) > 1 and covered >= _ALIKE * len(text) else ()


def _nearest(text: str, found: Sequence[Leaf], said: list[int], taken: set[int]) -> tuple[int, ...]:
    """The leaf that is most like a text, of those that no other text is."""
    likeness = {i: _likeness(found[i].text, text) for i in said if i not in taken}
    best = max(likeness, key=lambda i: likeness[i], default=None)
    return () if best is None or likeness[best] < _ALIKE else (best,)


def _likeness(one: str, other: str) -> float:
    """The share of words in common, whatever their case; cheap bounds first."""
    matcher = difflib.SequenceMatcher(None, one.casefold().split(), other.casefold().split())
    if matcher.real_quick_ratio() < _ALIKE or matcher.quick_ratio() < _ALIKE:
        return 0.0
    return matcher.ratio()
