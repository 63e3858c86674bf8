"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): answers, judging, scores in FastChat's files."""

from __future__ import annotations

import argparse
import collections
import functools
import math
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from zephyr_jax.data.raw.schema import Row
from zephyr_jax.evaluation import answers
from zephyr_jax.evaluation.answers import FACTS, Answering
from zephyr_jax.evaluation.endpoints import Messages
from zephyr_jax.evaluation.evaluate import intervals, mean_of, metric_table
from zephyr_jax.evaluation.table import draw_radar

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
_WITH_REFERENCE = ("math", "reasoning", "coding")
_QUESTION = {"question_id": int, "category": str, "turns": list}
_QUESTION |= {"required_temperature?": int | float}
_ANSWER = {"question_id": int, "choices": list, "model_id?": str}
_PROMPT = {"name": str, "system_prompt": str, "prompt_template": str}
_SINGLE = {"question_id": int, "turn": int, "model": str, "score": object}
_PAIR = {"question_id": int, "turn": int, "model_1": str, "model_2": str}
_PAIR |= {"g1_winner": str, "g2_winner": str}
_WINNERS = {"A": ("model_1", "model_2"), "B": ("model_2", "model_1"), "C": ("tie", "tie")}


class Questions(NamedTuple):
    """Questions, and what judging them needs; a part that is not there is empty."""

    rows: list[Row]
    references: dict[int, list[str]]  # by question_id, an answer per turn
    prompts: dict[str, Row]  # by name

    @property
    def categories(self) -> dict[int, str]:
        """The category of each question."""
        return {row["question_id"]: row["category"] for row in self.rows}


def read_questions(path: Path, limit: int | None = None) -> Questions:
    """The questions of a file, or of FastChat's folder, with its prompts and reference answers."""
    folder = path if path.is_dir() else path.parent
    file = path / "question.jsonl" if path.is_dir() else path
    rows = answers.read_rows(file, _QUESTION, ("question_id",))[:limit]
    for row in rows:
        if not row["turns"] or not all(isinstance(x, str) and x.strip() for x in row["turns"]):
            raise ValueError(f"{file}: question {row['question_id']} has a turn without text")
    places = [x / "judge_prompts.jsonl" for x in (folder, folder.parent)]
    found = next((answers.read_rows(x, _PROMPT, ("name",)) for x in places if x.is_file()), [])
    references = {}
    one, several = (folder.glob(f"reference_answer{x}.jsonl") for x in ("*", "/*"))
    for place in sorted(one) or sorted(several):
        references |= read_answers(place)[0]
    return Questions(rows, references, {row["name"]: row for row in found})


def read_answers(path: Path) -> tuple[dict[int, list[str]], Row]:
    """The answers of one model to each question, a text per turn, and the file's first line."""
    rows = answers.read_rows(path, _ANSWER, ("question_id",))
    for row in rows:
        choice = row["choices"][0] if row["choices"] else None
        turns = choice.get("turns") if isinstance(choice, dict) else None
        if not isinstance(turns, list) or not all(isinstance(x, str) for x in turns):
            raise ValueError(f"{path}: question {row['question_id']} has no choice with turns")
    if len(models := {str(row.get("model_id", "")) for row in rows}) > 1:
        raise ValueError(f"{path} has answers of {' and '.join(sorted(models))}; split the file")
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}, rows[0]


def run(args: argparse.Namespace) -> tuple[str, Any]:
    """Writes answers or judgments, or gives scores as a table and plain dicts, by the flags."""
    answers.check_flags(args, "judgments", "questions")
    questions, facts, failed = Questions([], {}, {}), {}, {}
    if args.questions:
        questions = read_questions(Path(args.questions), args.limit)
    if args.model:
        answers.write_answers(args, functools.partial(_answer, questions.rows, args.temperature))
        if not args.judge:
            return "", None
    if args.judge:
        failed = _judge_answers(questions, args)
    if args.answers:
        facts = read_answers(args.answers)[1]
    result = scores(read_judgments(args.judgments), questions.categories, facts)
    parts = []
    for model in result["models"]:
        counts = f"{model['judgments']} judgments by {result['judge']}"
        counts += f", {model['unreadable']} unreadable"
        parts.append(f"{model['model']}: {counts}\n{metric_table(model['numbers'])}\n")
    if args.output and draw_radar(result, args.output.with_suffix(".png")):
        logging.info("%s", args.output.with_suffix(".png"))
    return "\n".join(parts), {**result, "failed_requests": failed}


def _answer(questions: Sequence[Row], temperature: float | None, answering: Answering) -> list[Row]:
    """The model's answers; the temperature None means a question's own, its category's, or 0.7."""
    groups = collections.defaultdict(list)
    for row in questions:
        own = row.get("required_temperature", TEMPERATURES.get(row["category"], 0.7))
        groups[own if temperature is None else temperature].append(row)
    chats: dict[int, list[dict[str, str]]] = {row["question_id"]: [] for row in questions}
    for value, rows in sorted(groups.items()):
        for turn in range(max(len(row["turns"]) for row in rows)):
            asked = {x["question_id"]: x["turns"][turn] for x in rows if len(x["turns"]) > turn}
            for number, text in asked.items():
                chats[number].append({"role": "user", "content": text})
            replies = answering.replies([chats[number] for number in asked], value)
            for number, reply in zip(asked, replies, strict=True):
                chats[number].append({"role": "assistant", "content": reply})
    facts, now = answering.facts(), time.time()
    facts["settings"]["temperature"] = "by category" if temperature is None else temperature
    return [
        {"question_id": number, "answer_id": uuid.uuid4().hex, "model_id": answering.name}
        | {"choices": [{"index": 0, "turns": [turn["content"] for turn in chat[1::2]]}]}
        | {"tstamp": now, **facts}
        for number, chat in chats.items()
    ]


def _judge_answers(questions: Questions, args: argparse.Namespace) -> dict[str, int]:
    """Adds the judgments that a file lacks; returns how many requests failed, by reason."""
    names, sides = {}, []
    files = {"model": args.answers}
    if args.baseline:
        files = {"model_1": args.answers, "model_2": args.baseline}
    turns = {row["question_id"]: len(row["turns"]) for row in questions.rows}
    for name, file in files.items():
        texts, first = read_answers(file)
        names[name] = first.get("model_id") or Path(file).stem
        sides.append(texts)
        if lacking := [number for number, n in turns.items() if len(texts.get(number, ())) < n]:
            raise ValueError(f"{file} lacks an answer to a turn of question {lacking[0]}")
    if len({*names.values()}) < len(files):
        both = f"{args.answers} and {args.baseline} are both by {names['model_1']}"
        raise ValueError(f"{both}; give each a model_id of its own (--name, when they are written)")
    path, todo, requests = args.judgments, [], []
    rows = read_judgments(path) if path.exists() else []
    if rows and (_by(rows[0]) != args.judge or ("model" in names) != ("model" in rows[0])):
        raise ValueError(f"{path} holds another judge's or other judgments; name another file")
    key = ("question_id", "turn", *names)
    done = {tuple(map(row.get, key)): row for row in rows}
    asked = "user_prompt" if "model" in names else "g1_user_prompt"
    for question in questions.rows:
        number = question["question_id"]
        for turn in range(1, turns[number] + 1):
            orders = [[texts[number] for texts in order] for order in (sides, sides[::-1])]
            filled = [_prompt(questions, question, turn, order) for order in orders[: len(sides)]]
            row = {"question_id": number, **names, "judge": [args.judge, filled[0][0]]}
            row["turn"] = turn
            prompts = [chat[1]["content"] for _, chat in filled]
            known = done.get(tuple(map(row.get, key)))
            if known is None:
                todo.append((row, prompts))
                requests += [chat for _, chat in filled]
            elif known.get(asked, prompts[0]) != prompts[0]:
                what = f"holds judgments of other answers (question {number}, turn {turn})"
                raise ValueError(f"{path} {what}; name another file")
    replies, failed = answers.ask_judge(args, path, requests, max_tokens=2048)
    texts = iter(reply and reply.text for reply in replies)
    for row, prompts in todo:
        own: list[Any] = [next(texts) for _ in prompts]
        if None not in own:
            rows.append(_judgment(row, prompts, own))
    if rows:
        answers.write_rows(path, rows)
    return failed


def _by(row: Row) -> str:
    """The judge of a judgment, which FastChat names next to its prompt."""
    judge = row.get("judge") or "unknown"
    return str(judge[0] if isinstance(judge, list) else judge)


def _prompt(
    questions: Questions, question: Row, turn: int, sides: list[list[str]]
) -> tuple[str, Messages]:
    """The name of the judge prompt for a question's turn, and the chat that it makes."""
    exact, pairwise = question["category"] in _WITH_REFERENCE, len(sides) == 2
    name = "pair" if pairwise else "single"
    name += "-math-v1" if exact else "-v2" if pairwise else "-v1"
    name += "-multi-turn" if turn == 2 else ""
    references = questions.references.get(question["question_id"], [])
    if name not in questions.prompts or (exact and len(references) < turn):
        raise ValueError(
            f"question {question['question_id']} ({question['category']}) is judged by the prompt "
            f"{name}{' and a reference answer' * exact}: put FastChat's judge_prompts.jsonl and "
            "reference_answer file next to the questions"
        )
    values = {"question": question["turns"][0]}
    values |= {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
    values |= {f"ref_answer_{i}": text for i, text in enumerate(references, 1)}
    for side, turns in zip(("_a", "_b") if pairwise else ("",), sides, strict=True):
        values[f"answer{side}"] = turns[0]
        values |= {f"answer{side}_{i}": text for i, text in enumerate(turns, 1)}
    prompt = questions.prompts[name]
    try:
        text = prompt["prompt_template"].format(**values)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(f"judge prompt {name} cannot be filled: {error!r}") from error
    system = {"role": "system", "content": prompt["system_prompt"]}
    return name, [system, {"role": "user", "content": text}]


def _judgment(row: Row, prompts: list[str], replies: list[str]) -> Row:
    """A line of FastChat's judgment file; the score of a reply that cannot be read is -1."""
    end = {"turn": row.pop("turn"), "tstamp": time.time()}
    if len(prompts) == 1:
        score = rating(replies[0])
        return {**row, "user_prompt": prompts[0], "judgment": replies[0], "score": score, **end}
    for game in (0, 1):
        verdicts = [letter for letter in _WINNERS if f"[[{letter}]]" in replies[game]]
        winner = _WINNERS[verdicts[0]][game] if len(verdicts) == 1 else "error"
        row |= {f"g{game + 1}_winner": winner, f"g{game + 1}_user_prompt": prompts[game]}
        row[f"g{game + 1}_judgment"] = replies[game]
    return {**row, **end}


def rating(text: str) -> float:
    """The score in a reply, `[[5]]` or else `[5]`; -1 if there is none."""
    number = r"(\d+\.?\d*)"
    found = re.search(rf"\[\[{number}\]\]", text) or re.search(rf"\[{number}\]", text)
    return float(found[1]) if found else -1


def read_judgments(path: Path) -> list[Row]:
    """The judgments of a file: all single or all pairwise, by one judge, and none twice."""
    first = answers.read_rows(path, {"question_id": int})[0]
    columns, names = _SINGLE, ["model"]
    if "g1_winner" in first:
        columns, names = _PAIR, ["model_1", "model_2"]
    rows = answers.read_rows(path, columns, ["question_id", "turn", *names])
    if len(judges := {_by(row) for row in rows}) > 1:
        raise ValueError(f"{path} has judgments by {' and '.join(sorted(judges))}; split the file")
    return rows


def scores(judgments: Sequence[Row], categories: dict[int, str], facts: Row) -> dict[str, Any]:
    """Each model's mean score, or with pairs its win rate, by turn and category, with intervals.

    A score of -1 or beyond 0 to 10, and a pair with an `error`, are left out and counted. A pair
    that the two orders decide differently is a tie, half a win for both. Questions are resampled.
    """
    by_model: dict[str, list[tuple[int, int, float]]] = collections.defaultdict(list)
    for row in judgments:
        for model, value in _values(row).items():
            by_model[model].append((row["question_id"], row["turn"], value))
    models = []
    for model, values in by_model.items():
        table = np.array(values, float)
        table = table[~np.isnan(table[:, 2])]
        if not len(table):
            continue
        names = np.array([categories.get(int(q), "") for q in table[:, 0]])
        parts = {"score": np.ones(len(table), bool)}
        parts |= {f"turn_{t}": table[:, 1] == t for t in (1, 2)}
        parts |= {name: names == name for name in dict.fromkeys(categories.values())}
        numbers = {
            name: intervals({"x": mean_of(table[mask, 2])}, table[mask, 0])["x"]
            for name, mask in parts.items()
            if mask.any()
        }
        own = FACTS if model == facts.get("model_id") else ()
        counts = {"judgments": len(table), "unreadable": len(values) - len(table)}
        known = {name: facts[name] for name in own if name in facts}
        models.append({"model": model, "numbers": numbers, **counts, **known})
    if not models:
        raise ValueError(f"none of {len(judgments)} judgments can be read")
    every = [value for values in by_model.values() for _, _, value in values]
    n, n_unreadable = len(every), int(np.isnan(every).sum())
    if n >= 10 and len(set(every)) == 1:
        logging.warning("all %d verdicts are %g: this judge tells nothing apart", n, every[0])
    if n_unreadable:
        logging.warning("%d verdicts of %d judgments cannot be read", n_unreadable, len(judgments))
    models.sort(key=lambda x: -x["numbers"]["score"]["value"])
    kind = "mt-bench-pairs" if "g1_winner" in judgments[0] else "mt-bench"
    return {"kind": kind, "judge": _by(judgments[0]), "models": models}


def _values(row: Row) -> dict[str, float]:
    """The score of each model of a judgment; NaN where it cannot be read."""
    if "g1_winner" not in row:
        score = row["score"]
        fits = isinstance(score, (int, float)) and not isinstance(score, bool) and 0 <= score <= 10
        return {row["model"]: float(score) if fits else math.nan}
    wins = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}
    first, second = (wins.get(row[name], math.nan) for name in ("g1_winner", "g2_winner"))
    value = math.nan if math.isnan(first + second) else first if first == second else 0.5
    return {row["model_1"]: value, row["model_2"]: 1 - value}
