r"""Pairs in the shapes that people have them -> pairs of a chosen and a rejected answer.

Three texts:

>>> rules = BinarizationRules()
>>> row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": 5}
>>> [pair], counts = convert(row, rules)
>>> pair["chosen"]
[{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}]
>>> pair["score_chosen"], counts
(0.0, Counter({'unscored_pair': 1}))

Lists of messages, whole or behind their prompt:

>>> asked, good, bad = pair["chosen"][0], pair["chosen"][1], pair["rejected"][1]
>>> whole = {"chosen": [asked, good], "rejected": [asked, bad]}
>>> behind = {"prompt": [asked], "chosen": [good], "rejected": [bad]}
>>> convert(whole, rules)[0] == convert(behind, rules)[0] == [pair]
True

Columns as Argilla names them:

>>> row = {"question": "Why?", "chosen_response": "So.", "rejected_response": "No."}
>>> convert(row, rules)[0] == [pair]
True

ShareGPT:

>>> row = {"conversations": [{"from": "human", "value": "Why?"}]}
>>> row["chosen"] = {"from": "gpt", "value": "So."}
>>> row["rejected"] = {"from": "gpt", "value": "No."}
>>> convert(row, rules)[0] == [pair]
True

Transcripts:

>>> talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
>>> [pair], _ = convert({"chosen": talk + " So.", "rejected": talk + " No."}, rules)
>>> pair["prompt"], [turn["content"] for turn in pair["rejected"]]
('Hi', ['Hi', 'Hello', 'Why?', 'No.'])
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from zephyr_jax.data.raw.binarize import BinarizationRules, check_pair, shown_pair
from zephyr_jax.data.raw.ratings import finite
from zephyr_jax.data.raw.schema import Row, Schema, window
from zephyr_jax.data.raw.turns import (
    Turn,
    as_turns,
    is_transcript,
    transcript_turns,
    turns_problem,
    unknown_roles,
)

NAME = "preferences"
SPLITS = ("train_prefs", "test_prefs")
SHAPES = (
    ("prompt", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("instruction", "chosen_response", "rejected_response"),
    ("question", "chosen_response", "rejected_response"),
)
_ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_PROMPTS = ("prompt", "question", "instruction")
_SCORES = ("score_chosen", "score_rejected")


def schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """The schema of the one configuration `own`; of the rules `ties` and `drop_sources` apply.

    >>> schemas()["own"].fits({"chosen": "a", "rejected": "b"})
    True
    """
    rules = rules or BinarizationRules()
    return {
        "own": Schema(
            shapes=SHAPES,
            forbidden=(),
            splits=SPLITS,
            problem=problem,
            convert=partial(convert, rules=rules),
            excerpt=_excerpt,
            rules={"ties": rules.ties, "drop_sources": list(rules.drop_sources)},
        )
    }


def convert(row: Row, rules: BinarizationRules) -> tuple[list[Row], Counter[str]]:
    """The pair in our columns, none if a rule dropped it, and the rules that had a say.

    Answers are texts, single turns, or lists of turns: the whole dialogue, or what follows the
    prompt. A prompt is a text or a list of turns (`conversations` always is one); `input` is added
    to an `instruction`, and a `system` column becomes the first turn where there is none. Texts
    without a prompt are transcripts as in hh-rlhf. Where all turns are there they decide, and a
    prompt in words is only the name. The row's own `prompt_id` stays; without one it is the digest
    of the prompt, or of all turns before the answer as JSON if these hold several questions.

    Scores are 0.0 unless both are given, and then equal ones are no tie. Counted and kept:
    `unscored_pair` (one score is missing or no number), `tie`, `source_missing`. Dropped:
    `unknown_role`, and by the rules of `check_pair`: `source_dropped`, `bad_roles`,
    `different_prompts`, `inverted_scores`, `empty_prompt`, `empty_response`, `identical_text`,
    `tie_dropped`.
    """
    context = _context(row)
    chosen, rejected = (_dialogue(context, row, key) for key in _answer_keys(row))
    if unknown_roles(chosen + rejected):
        return [], Counter(unknown_role=1)
    ready = {
        "prompt": _prompt_text(row),
        "prompt_id": row.get("prompt_id"),
        "chosen": chosen,
        "rejected": rejected,
        "source": row.get("source"),
        **{key: row.get(key) for key in _SCORES},
    }
    scores = [finite(row.get(key)) for key in _SCORES]
    pairs, counts = check_pair(ready, rules, scored=None not in scores)
    if pairs and None in scores and any(row.get(key) is not None for key in _SCORES):
        counts["unscored_pair"] += 1
    return pairs, counts


def _answer_keys(row: Row) -> tuple[str, str]:
    """The columns of the two answers; of none that parquet filled with None, if possible."""
    given = [keys for keys in _ANSWERS if all(row.get(key) is not None for key in keys)]
    there = [keys for keys in _ANSWERS if all(key in row for key in keys)]
    return (given or there or list(_ANSWERS))[0]


def _prompt_of(row: Row) -> tuple[str, Any]:
    """The column that holds the prompt, and what it holds; None if there is none."""
    return next(((key, row[key]) for key in _PROMPTS if row.get(key) is not None), ("prompt", None))


def _prompt_text(row: Row) -> str | None:
    """The prompt in words, None if it comes in turns or not at all."""
    key, prompt = _prompt_of(row)
    if not isinstance(prompt, str) or is_transcript(prompt):
        return None
    more = row.get("input") if key == "instruction" else None
    return "\n\n".join(text for text in (prompt, more) if text and text.strip())


def _context(row: Row) -> list[Turn]:
    """The turns before the answers, as far as they stand in columns of their own."""
    prompt = _prompt_of(row)[1]
    if row.get("conversations") is not None:
        turns = as_turns(row["conversations"])
    elif isinstance(prompt, list):
        turns = as_turns(prompt)
    elif isinstance(prompt, str) and is_transcript(prompt):
        turns = transcript_turns(prompt)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
    else:
        asked = _prompt_text(row)
        turns = [] if asked is None else [{"role": "user", "content": asked}]
    return _with_system(row, turns)


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    system = row.get("system")
    if not system or not system.strip() or not turns or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def _dialogue(context: list[Turn], row: Row, key: str) -> list[Turn]:
    """All turns up to the answer of a column."""
    answer = row[key]
    if isinstance(answer, str):
        if is_transcript(answer):
            return _with_system(row, transcript_turns(answer))
        return [*context, {"role": "assistant", "content": answer}]
    turns = as_turns(answer if isinstance(answer, list) else [answer])
    if turns and turns[0]["role"] in ("system", "user"):
        whole = _with_system(row, turns)
        # Turns that do not go on from a prompt in turns fall to the rule about roles.
        in_words = _prompt_text(row) is not None and row.get("conversations") is None
        if in_words or whole[: len(context)] == context:
            return whole
    return context + turns


def problem(row: Row) -> str | None:
    """What is wrong with the types of a row, as `reason:place`, or None.

    >>> problem({"prompt": "Why?", "chosen": [{"role": "assistant", "content": 1}], "rejected": ""})
    'wrong_type:chosen[0].content'
    >>> problem({"chosen": "So.", "rejected": "No."})
    'missing_key:prompt'
    >>> problem({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": "8"})
    'wrong_type:score_chosen'
    """
    for key in ("prompt_id", "source", "system", "input"):
        if not isinstance(row.get(key), str | None):
            return f"wrong_type:{key}"
    for key in _SCORES:
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), int | float | None):
            return f"wrong_type:{key}"
    key, prompt = _prompt_of(row)
    if not isinstance(prompt, str | None) and (wrong := turns_problem(key, prompt)):
        return wrong
    talk = row.get("conversations")
    if talk is not None and (wrong := turns_problem("conversations", talk)):
        return wrong
    for key in _answer_keys(row):
        answer = row.get(key)
        if isinstance(answer, str):
            if prompt is None and talk is None and not is_transcript(answer):
                return "missing_key:prompt"
        elif wrong := turns_problem(key, [answer] if isinstance(answer, dict) else answer):
            return wrong
    return None


def _excerpt(rule: str, before: Row, after: list[Row]) -> tuple[list[str], list[str] | None]:
    """Scores and the beginnings of the answers; turns of unknown roles."""
    context = _context(before)
    shown = []
    for key, score in zip(_answer_keys(before), _SCORES, strict=True):
        turns = _dialogue(context, before, key)
        if rule == "unknown_role":
            shown += unknown_roles(turns)[:2]
        else:
            last = turns[-1]["content"] if turns else ""
            shown.append(f"{before.get(score)}: {window(last)}")
    return shown, shown_pair(rule, after)
