"""AlpacaEval: outputs, judging through an endpoint, and win rates of recorded annotations."""

import functools
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from judge_server import Cut, completion, judge_server, save_small_model
from raw_rows import write

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.evaluation import answers
from zephyr_jax.evaluation.alpaca_eval import ANNOTATION, length_controlled, win_rate
from zephyr_jax.evaluation.answers import read_rows
from zephyr_jax.evaluation.endpoints import EndpointConfig

# Recorded annotations of the public leaderboard are not part of this repository.
RECORDED = Path(__file__).parents[3] / "shared" / "data"
FALCON = "alpaca_eval/falcon-40b-instruct"
LEADERBOARD = {  # win rate and standard error as printed there
    f"{FALCON}.alpaca_eval_gpt4.json": (45.71428571428572, 1.7524717060805597),
    "alpacaeval1_zephyr7b_beta_gpt4.jsonl": (90.5977584059776, 1.0287080531312012),
    f"{FALCON}.weighted_alpaca_eval_gpt4_turbo.json": (3.3429188224720505, 0.5541127159067186),
}


def annotation(i, preference, **more):
    row = {"instruction": f"do {i}", "output_1": "theirs", "output_2": "ours" * i}
    names = {"generator_1": "base", "generator_2": "us", "annotator": "judge"}
    return {**row, **names, "preference": preference, **more}


@pytest.fixture
def refused(refused):
    return functools.partial(refused, "evaluate", "alpaca-eval")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Outputs of two models; ours are better where the instruction's number is even."""
    monkeypatch.setattr(answers, "EndpointConfig", functools.partial(EndpointConfig, retries=0))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    for name, texts in (("ours", ("good", "bad")), ("theirs", ("bad", "good"))):
        outputs = [{"instruction": f"do {i}", "output": texts[i % 2]} for i in range(40)]
        rows = [row | {"generator": name} for row in outputs]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def judging(files, url):
    words = f"--judge=m --base_url={url} --answers={files}/ours.json --baseline={files}/theirs.json"
    return [*words.split(), f"--annotations={files}/a.json", f"--output={files}/out.json"]


def judged(files, url):
    main(["evaluate", "alpaca-eval", *judging(files, url)])
    return json.loads((files / "out.json").read_text())


def fair(request, _):
    """Prefers the good answer, wherever it is shown."""
    text = request["messages"][0]["content"]
    return "A" if text.index("good") < text.index("bad") else "B"


def test_the_win_rate_is_the_mean_with_draws_as_half():
    preferences = [1, 2, 2, 0, 1.5, None, 1.25, float("nan")]
    result = win_rate([annotation(i, x) for i, x in enumerate(preferences)])
    wins = [0, 100, 100, 50, 50, 25]
    assert result["win_rate"] == pytest.approx(statistics.mean(wins), rel=1e-15)
    assert result["standard_error"] == pytest.approx(statistics.stdev(wins) / math.sqrt(6))
    counts = [result[f"n_{x}"] for x in ("total", "wins", "wins_base", "draws")]
    assert counts == [6, 2, 2, 2]
    assert result["n_without_preference"] == 2
    interval = result["numbers"]["win_rate"]
    assert interval["low"] < interval["value"] == result["win_rate"] < interval["high"]


@pytest.mark.parametrize("name", LEADERBOARD)
def test_recorded_annotations_give_the_leaderboards_numbers(name):
    if not (RECORDED / name).is_file():
        pytest.skip("the leaderboard's recorded annotations are not here")
    result = win_rate(read_rows(RECORDED / name, ANNOTATION, ("instruction",)))
    rate, error = LEADERBOARD[name]
    # The leaderboard's file went through a parser that is off by a unit in the last place.
    assert abs(result["win_rate"] - rate) <= math.ulp(rate)
    assert abs(result["standard_error"] - error) <= math.ulp(error)


@pytest.mark.slow
def test_the_length_controlled_rate_is_the_official_packages():
    pytest.importorskip("alpaca_eval", reason="pip install alpaca-eval")
    path = RECORDED / list(LEADERBOARD)[2]
    if not path.is_file():
        pytest.skip("the leaderboard's recorded annotations are not here")
    result = length_controlled(read_rows(path, ANNOTATION))
    if not result:
        pytest.skip("the package reads a file from the hub, which cannot be reached")
    rate = result["length_controlled_winrate"]["value"]
    assert rate == pytest.approx(5.6075325447394455, abs=1e-9)


def test_the_official_packages_rate_is_one_of_the_numbers(tmp_path, monkeypatch):
    rates = {"length_controlled_winrate": 5.5, "lc_standard_error": 0.5}
    official = SimpleNamespace(get_length_controlled_winrate=lambda *_, **__: rates)
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", official)
    rows = [annotation(i, 1.25, generator_1="gpt4_1106_preview") for i in range(805)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    words = f"evaluate alpaca-eval --annotations={tmp_path}/a.json --output={tmp_path}/out.json"
    main(words.split())
    numbers = json.loads((tmp_path / "out.json").read_text())["numbers"]
    assert numbers["win_rate"]["value"] == 25
    rate = pytest.approx({"value": 5.5, "low": 4.52, "high": 6.48})
    assert numbers["length_controlled_winrate"] == rate


def test_a_fair_judge_is_asked_once_and_order_does_not_matter(files, capsys):
    with judge_server(fair) as (url, asked):
        result = judged(files, url)
        assert (result["win_rate"], result["n_total"], len(asked)) == (50, 40, 40)
        assert 0.2 < result["first_shown_wins"] < 0.8
        rows = json.loads((files / "a.json").read_text())
        assert [row["preference"] for row in rows] == [2, 1] * 20
        assert {row["is_switched_outputs"] for row in rows} == {True, False}
        (files / "a.json").write_text(json.dumps(rows[:30]))
        assert judged(files, url)["win_rate"] == 50
        assert len(json.loads((files / "a.json").read_text())) == len(asked) == 40
    assert "sk-secret-key" not in "".join(capsys.readouterr()) + (files / "a.json").read_text()
    assert asked[0]["key"] == "Bearer sk-secret-key"


def test_log_probs_weigh_the_preference(files):
    reply = completion("A", {"A": math.log(0.6), " B": math.log(0.2)})
    with judge_server(lambda *_: reply) as (url, _):
        result = judged(files, url)
    for row in json.loads((files / "a.json").read_text()):
        assert row["preference"] == pytest.approx(1.75 if row["is_switched_outputs"] else 1.25)
    assert result["first_shown_wins"] == 1  # and a warning says so


def test_replies_that_say_nothing_are_counted(files):
    odd = {"choices": None, "error": "x"}
    # No verdict, though some begin with A, or have it among the likeliest tokens.
    neither = {1: "Answer", 2: completion("Sorry", {"Sorry": -0.1, "A": -8.0}), 3: "Both"}
    faults = neither | {
        4: completion("A", {"A": None, "B": "x"}),
        5: odd,
        7: 500,
        8: 500,
        9: Cut(b'{"id"'),
        10: b'{"id"',
        12: 500,
    }
    with judge_server(lambda request, n: faults.get(n, "A")) as (url, _):
        result = judged(files, url)
    assert result["n_without_preference"] == 3
    assert result["failed_requests"]["HTTP 500"] == 3
    assert sum(result["failed_requests"].values()) == 6
    assert result["n_total"] == 31


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (401, "refuses the key of OPENAI_API_KEY"),
        ("what?", "none of 40 annotations has a preference"),
    ],
)
def test_an_endpoint_that_fails_is_one_line(files, refused, sent, message):
    with judge_server(lambda *_: sent) as (url, _):
        line = refused(*judging(files, url))
    assert message in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "x"}], "a.json:1 lacks output_1; rows here have"),
        ([annotation(1, 3)], "has preference 3; it must be 0 or 1 to 2"),
        ([annotation(1, 1), annotation(2, 1, generator_2="z")], "of several models"),
    ],
)
def test_bad_annotations_are_one_line(tmp_path, refused, rows, message):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert message in refused(f"--annotations={tmp_path}/a.json")


def test_files_that_do_not_belong_together_are_refused(files, refused, monkeypatch):
    words = ["--judge=m", f"--answers={files}/ours.json", f"--annotations={files}/a.json"]
    assert "--judge needs --baseline" in refused(*words)
    words += [f"--baseline={files}/theirs.json", "--base_url=http://127.0.0.1:9"]
    (files / "a.json").write_text(json.dumps([annotation(1, 1)]))
    assert "holds annotations of other outputs" in refused(*words)
    (files / "theirs.json").write_text((files / "theirs.json").read_text().replace("do 7", "x"))
    assert "the baseline lacks 1 instructions: 'do 7'" in refused(*words)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "set OPENAI_API_KEY" in refused(*words[:-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model=m --questions=q --answers=a --annotations=x", "with --model needs --judge"),
        ("--annotations=x --base_url=http://127.0.0.1:9", "--base_url needs --judge"),
        ("--annotations=x --limit=1", "--limit needs --model or --judge"),
        ("--annotations=x --questions=x", "--questions needs --model"),
        ("--annotations=x --answers=nowhere", "--answers=nowhere does not exist"),
        ("--annotations=x.json --output=./x.json", "--annotations and --output are both x.json"),
        ("--model=m --questions=nowhere --answers=a", "--questions=nowhere does not exist"),
        ("--model=m --questions=ROOT/blank.json --answers=a", ":2 has an empty instruction"),
    ],
)
def test_what_does_not_fit_is_one_line_before_a_model_is_loaded(refused, tmp_path, words, message):
    (tmp_path / "blank.json").write_text('[{"instruction": "x"}, {"instruction": " "}]')
    assert message in refused(*words.replace("ROOT", str(tmp_path)).split())


def test_a_models_outputs_have_the_format(world, tmp_path, monkeypatch):
    model = save_small_model(world, tmp_path / "m")
    texts = ["short", "a " * 30, "x", "too long " * 200]
    questions = [{"instruction": text, "dataset": "own"} for text in texts]
    write(tmp_path / "q.jsonl", questions)
    words = f"--model={tmp_path}/m --questions={tmp_path}/q.jsonl --answers={tmp_path}/o.json"
    words += " --max_new_tokens=3 --rows=8 --temperature=0"
    main(["evaluate", "alpaca-eval", *words.split()])
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["instruction"] for row in rows] == texts
    assert {(row["generator"], row["dataset"]) for row in rows} == {("m", "own")}
    assert rows[3]["output"] == ""  # it has no positions for the prompt
    assert rows[0]["settings"]["max_new_tokens"] == 3
    own = [zj.generate(*model[:3], [text], max_new_tokens=3)[0] for text in texts[:3]]
    assert [row["output"] for row in rows[:3]] == own
    (tmp_path / "o.json").unlink()
    monkeypatch.setattr(answers, "generate_each", None)  # what was sampled is not sampled again
    main(["evaluate", "alpaca-eval", *words.split()])
    assert json.loads((tmp_path / "o.json").read_text()) == rows


@pytest.mark.parametrize("name", ["generator_1", "generator_2", "annotator"])
def test_columns_that_may_be_absent_have_a_type(tmp_path, name):
    path, row = tmp_path / "a.jsonl", dict.fromkeys(("instruction", "output_1", "output_2"), "x")
    path.write_text(json.dumps(row | {"preference": 2}))
    assert len(read_rows(path, ANNOTATION)) == 1
    for value in (None, 3, ["x"]):
        path.write_text(json.dumps(row | {"preference": 2, name: value}))
        with pytest.raises(ValueError, match=f"a.jsonl:1: {name} must be of type str: "):
            read_rows(path, ANNOTATION)
