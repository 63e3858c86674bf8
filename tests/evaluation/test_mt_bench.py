"""MT-Bench: answers, judging and scores in FastChat's formats, against a judge on loopback."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from feedback_rounds import rows_of
from judge_server import judge_server, save_small_model
from raw_rows import write

from zephyr_jax.__main__ import main
from zephyr_jax.evaluation import answers, mt_bench
from zephyr_jax.evaluation.endpoints import EndpointConfig

RECORDED = Path(__file__).parents[3] / "shared" / "data"  # not part of this repository
CATEGORIES = {1: "writing", 2: "math", 3: "stem", 4: "own"}
PROMPTS = {
    "single-v1": "{question}|{answer}",
    "single-math-v1": "{question}|{ref_answer_1}|{answer}",
    "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    "single-math-v1-multi-turn": "{question_2}|{ref_answer_2}|{answer_2}",
    "pair-v2": "{question}|{answer_a}|{answer_b}",
    "pair-math-v1": "{question}|{ref_answer_1}|{answer_a}|{answer_b}",
    "pair-v2-multi-turn": "{question_2}|{answer_a_2}|{answer_b_2}",
    "pair-math-v1-multi-turn": "{question_2}|{ref_answer_2}|{answer_a_2}|{answer_b_2}",
}


def answer_file(path, name, words):
    """Two turns for every question; of question 2 `words`."""
    turns = {q: [f"{name} {q} one", f"{name} {q} two"] for q in CATEGORIES} | {2: words}
    choices = {q: [{"index": 0, "turns": texts}] for q, texts in turns.items()}
    write(path, [{"question_id": q, "model_id": name, "choices": x} for q, x in choices.items()])


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "EndpointConfig", functools.partial(EndpointConfig, retries=0))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    questions = [
        {"question_id": q, "category": category, "turns": [f"first {q}?", f"second {q}?"]}
        for q, category in CATEGORIES.items()
    ]
    write(tmp_path / "question.jsonl", questions)
    common = {"system_prompt": "system"}
    prompts = [common | {"name": k, "prompt_template": text} for k, text in PROMPTS.items()]
    write(tmp_path / "judge_prompts.jsonl", prompts)
    answer_file(tmp_path / "ours.jsonl", "us", ["good", "good too"])
    answer_file(tmp_path / "theirs.jsonl", "them", ["bad", "bad too"])
    reference = {"question_id": 2, "choices": [{"index": 0, "turns": ["42", "43"]}]}
    write(tmp_path / "reference_answer" / "gpt-4.jsonl", [reference])
    return tmp_path


def run(files, *words):
    output = files / "out.json"
    main(["evaluate", "mt-bench", f"--output={output}", *words])
    return json.loads(output.read_text()) if output.exists() else {}


def judging(files, url):
    flags = f"--questions={files} --judge=m --base_url={url} --judgments={files}/j.jsonl"
    return [*flags.split(), f"--answers={files}/ours.jsonl"]


def test_single_answers_are_graded_with_references_where_needed(files):
    replies = {
        "first 1?|us 1 one": "fine [[7]]",
        "first 1?|us 1 one|second 1?|us 1 two": "Rating: [[8.5]]",
        "first 2?|42|good": "a [6]",
        "second 2?|43|good too": "no rating",
    }
    reply = lambda x, _: replies.get(x["messages"][1]["content"], "[[1]]")  # noqa: E731
    with judge_server(reply) as (url, asked):
        result = run(files, *judging(files, url))
        assert len(asked) == 8
        write(files / "j.jsonl", rows_of(files / "j.jsonl")[3:])
        (files / "j.jsonl.cache").unlink()
        assert run(files, *judging(files, url))["models"] == result["models"]
        assert len(asked) == 11  # nothing is asked twice
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(files / "j.jsonl")}
    assert rows[1, 2]["judge"] == ["m", "single-v1-multi-turn"]
    assert rows[2, 1]["judge"] == ["m", "single-math-v1"]
    assert [rows[x]["score"] for x in ((1, 1), (1, 2), (2, 1), (2, 2))] == [7, 8.5, 6, -1]
    (model,) = result["models"]
    numbers = model["numbers"]
    assert (model["model"], model["judgments"], model["unreadable"]) == ("us", 7, 1)
    assert numbers["score"]["value"] == pytest.approx(np.mean([7, 8.5, 6, 1, 1, 1, 1]))
    assert numbers["turn_1"]["value"] == pytest.approx(np.mean([7, 6, 1, 1]))
    assert numbers["math"]["value"] == 6
    assert numbers["writing"]["value"] == 7.75


def test_pairs_are_judged_in_both_orders(files):
    def prefer(request, _):
        text = request["messages"][1]["content"]
        if "good" in text:
            return "[[A]]" if text.index("good") < text.index("bad") else "[[B]]"
        first = text.split("|")[1]
        if first.endswith(" 3 one"):
            return "[[A]]"  # whatever is shown first
        return "[[C]]" if " 1 " in first else "[[A]] or [[B]]"

    with judge_server(prefer) as (url, asked):
        result = run(files, *judging(files, url), f"--baseline={files}/theirs.jsonl")
    assert len(asked) == 16
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(files / "j.jsonl")}
    winners = {key: (row["g1_winner"], row["g2_winner"]) for key, row in rows.items()}
    assert winners[2, 1] == winners[2, 2] == ("model_1", "model_1")
    assert winners[3, 1] == ("model_1", "model_2")
    assert winners[1, 1] == ("tie", "tie")
    assert winners[4, 1] == ("error", "error")
    us, them = result["models"]
    assert (us["model"], us["unreadable"]) == ("us", 3)
    assert us["numbers"]["score"]["value"] == pytest.approx(np.mean([1, 1, 0.5, 0.5, 0.5]))
    assert them["numbers"]["math"]["value"] == 0


def test_scores_that_are_none_are_counted_and_left_out(files, capsys):
    rows = [
        {"question_id": q, "turn": 1, "model": m, "judge": ["g", "p"], "score": score}
        for m, scores in (("a", (1, -1, 4)), ("b", (None, 11, 7.5)))
        for q, score in enumerate(scores, 1)
    ]
    write(files / "j.jsonl", rows)
    b, a = run(files, f"--judgments={files}/j.jsonl")["models"]
    assert (a["numbers"]["score"]["value"], a["unreadable"]) == (2.5, 1)
    assert (b["numbers"]["score"]["value"], b["unreadable"]) == (7.5, 2)
    assert "3 verdicts of 6 judgments cannot be read" in capsys.readouterr().err
    write(files / "j.jsonl", [{**rows[0], "question_id": i} for i in range(10)])
    run(files, f"--judgments={files}/j.jsonl")
    assert "all 10 verdicts are 1: this judge tells nothing apart" in capsys.readouterr().err


def test_public_scores_give_the_averages_of_pandas():
    path = RECORDED / "mtbench_single_scores.jsonl"
    if not path.is_file():
        pytest.skip("the public judgments are not here")
    pandas = pytest.importorskip("pandas")
    questions = mt_bench.read_questions(RECORDED / "mt_bench")
    assert len(questions.references) == 30
    result = mt_bench.scores(mt_bench.read_judgments(path), questions.categories, {})
    table = pandas.read_json(path, lines=True)
    table["category"] = table["question_id"].map(questions.categories)
    assert len(result["models"]) == table["model"].nunique() == 14
    for model in result["models"]:
        own, numbers = table[table["model"] == model["model"]], model["numbers"]
        wanted = {"score": own["score"].mean()} | dict(own.groupby("category")["score"].mean())
        wanted |= {f"turn_{t}": x for t, x in own.groupby("turn")["score"].mean().items()}
        assert {k: x["value"] for k, x in numbers.items()} == pytest.approx(wanted, rel=1e-12)


def test_a_models_answers_have_two_turns_at_each_categorys_temperature(files, world, monkeypatch):
    save_small_model(world, files / "m")
    seen = []

    def replies(self, chats, temperature):
        seen.append((temperature, [[turn["content"] for turn in chat] for chat in chats]))
        return [f"to {chat[-1]['content']}" for chat in chats]

    monkeypatch.setattr(answers.Answering, "replies", replies)
    words = f"--model={files}/m --questions={files} --answers={files}/o.jsonl --name=n"
    run(files, *words.split())
    rows = rows_of(files / "o.jsonl")
    assert [row["question_id"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["to first 1?", "to second 1?"]}]
    assert rows[0]["model_id"] == "n"
    assert rows[0]["settings"]["temperature"] == "by category"
    assert {value: len(chats) for value, chats in seen} == {0.0: 1, 0.1: 1, 0.7: 2}
    assert (0.1, [["first 3?", "to first 3?", "second 3?"]]) in seen
    seen.clear()
    run(files, *words.split(), "--temperature=0.5", "--limit=2")
    assert {value for value, _ in seen} == {0.5}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("judge_prompts.jsonl", "question 1 (writing) is judged by the prompt single-v1"),
        ("reference_answer/gpt-4.jsonl", "by the prompt single-math-v1 and a reference answer"),
    ],
)
def test_what_is_absent_is_named_before_the_judge_is_asked(files, refused, gone, message):
    (files / gone).unlink()
    assert message in refused("evaluate", "mt-bench", *judging(files, "http://127.0.0.1:9"))


def test_a_judge_that_answers_nothing_and_a_question_without_text_are_one_line(files, refused):
    with judge_server(lambda *_: 500) as (url, _):
        line = refused("evaluate", "mt-bench", *judging(files, url), "--limit=1")
    assert "judge m answered none of 2 requests: {'HTTP 500': 2}" in line
    write(files / "question.jsonl", [{"question_id": 7, "category": "own", "turns": ["1?", " "]}])
    words = f"evaluate mt-bench --model=nowhere --questions={files} --answers={files}/o.jsonl"
    assert "question.jsonl: question 7 has a turn without text" in refused(*words.split())


def test_answers_that_do_not_fit_the_judgments_are_refused(files, refused):
    with judge_server(lambda *_: "[[9]]") as (url, asked):
        words = "evaluate", "mt-bench", *judging(files, url)
        run(files, *words[2:])
        answer_file(files / "ours.jsonl", "us", ["new", "good too"])
        assert "j.jsonl holds judgments of other answers (question 2, turn 1)" in refused(*words)
        (files / "j.jsonl").unlink()
        answer_file(files / "theirs.jsonl", "us", ["bad", "bad too"])
        line = refused(*words, f"--baseline={files}/theirs.jsonl")
        assert "theirs.jsonl are both by us; give each a model_id of its own" in line
        answer_file(files / "ours.jsonl", "us", [None, "x"])
        assert "question 2 has no choice with turns" in refused(*words)
        other = {"question_id": 9, "model_id": "b", "choices": [{"turns": ["x"]}]}
        write(files / "ours.jsonl", [*rows_of(files / "theirs.jsonl"), other])
        assert "has answers of b and us; split the file" in refused(*words)
        assert len(asked) == 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "turn": 1, "model": "a", "score": 5}] * 2, "j.jsonl:2 repeats"),
        ([{"question_id": 1, "turn": 1, "model": "a", "score": -1}], "none of 1 judgments can"),
    ],
)
def test_bad_judgments_are_one_line(files, refused, rows, message):
    write(files / "j.jsonl", rows)
    words = (f"--judgments={files}/j.jsonl", f"--output={files}/out.json")
    assert message in refused("evaluate", "mt-bench", *words)
    assert not (files / "out.json").exists()
