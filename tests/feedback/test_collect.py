"""Rounds of feedback: rows, orders undone, stops and faults, judges here."""

import contextlib
import dataclasses
import json
import sqlite3
import time

import jax
import pytest
from feedback_rounds import MODELS, by_length, round_of, rows_of, scripted, words_of, write_prompts
from judge_server import judge_server, save_small_model
from raw_rows import messages, write
from test_evaluate import alone

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.config import build, read_file
from zephyr_jax.evaluation.endpoints import CapReached, Spending
from zephyr_jax.feedback import answers as answers_module
from zephyr_jax.feedback.answers import SYSTEM_PROMPTS, read_prompts
from zephyr_jax.feedback.collect import collect
from zephyr_jax.feedback.config import FeedbackConfig, PromptsConfig
from zephyr_jax.storage import lock, seal
from zephyr_jax.weights.checkpoint import save_model


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def collected(config, folder, **limits):
    """The rows of a round and its account."""
    rows = rows_of(collect(config, folder, Spending(**limits)))
    return rows, json.loads((folder / "account.json").read_text())


def test_a_round_is_a_set_in_ultrafeedbacks_schema(tmp_path):
    principles = {"honesty": 1.0, "truthfulness": 3.0}
    with judge_server(scripted()) as (url, _):
        inputs = url, write_prompts(tmp_path, 6)
        config = round_of(*inputs, principles=principles, judge={"repeats": 2})
        rows, account = collected(config, tmp_path / "round")
    assert [row["instruction"][:10] for row in rows] == [f"Question {i}" for i in range(6)]
    for row in rows:
        assert row["models"] == list(MODELS)
        for completion in row["completions"]:
            # The answers were shown in two random orders; each has the rating of its own text.
            rating = by_length(completion["response"])
            assert completion["overall_score"] == 2 * rating
            assert completion["fine-grained_score"] == rating
            assert {a["Rating"] for a in completion["annotations"].values()} == {str(rating)}
            assert completion["custom_system_prompt"] == SYSTEM_PROMPTS[completion["principle"]]
    orders = [each["order"] for each in rows_of(tmp_path / "round" / "judgements.jsonl")]
    assert len({tuple(order) for order in orders}) > 5
    assert all(a == b[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True))
    counts = {"read": 10, "empty": 1, "duplicate": 1, "unreadable": 2, "prompts": 6}
    assert account["prompts"] == counts
    assert account["this_call"]["requests"] == 6 * (4 + 5 * 2)
    assert account["agreement"]["overall"]["self_agreement"]["value"] == 1
    # The fields of openbmb/UltraFeedback
    assert " ".join(sorted(rows[0])) == (
        "collected_by completions correct_answers incorrect_answers instruction models source"
    )
    assert " ".join(sorted(rows[0]["completions"][0])) == (
        "annotations critique custom_system_prompt fine-grained_score model overall_score "
        "principle response"
    )


def test_preparing_takes_the_rows_and_tens_are_tens(tmp_path):
    with judge_server(scripted()) as (url, _):
        path = collect(round_of(url, write_prompts(tmp_path, 6)), tmp_path / "r", Spending())
    # A ten over low ratings, which in the published set is a one that was stored wrongly
    first, *others = rows_of(path)
    first["completions"][0] |= {"overall_score": 10.0, "fine-grained_score": 1.0}
    write(path, (first, *others))
    for pairing, least in (("random", 2), ("best_vs_worst", 2), ("all", 12)):
        data = tmp_path / pairing
        words = [f"--source={path}", f"--data_dir={data}", f"--pairing={pairing}", "--ties=drop"]
        main(["prepare_data", "ultrafeedback", *words])
        report = json.loads(next(data.rglob("report.json")).read_text())
        assert not [rule for rule in report["rules"] if rule.startswith("score_10_to")]
        assert sum(report["rows"]["kept"].values()) > least
    prompts, _ = read_prompts(PromptsConfig("ultrafeedback/raw", str(data)), 0)
    assert {prompt.text for prompt in prompts} <= {row["instruction"] for row in (first, *others)}


def test_a_round_that_is_stopped_again_and_again_asks_nothing_twice(tmp_path):
    prompts, stops, rows = write_prompts(tmp_path, 3), 0, None
    with judge_server(scripted()) as (url, _):
        whole = collect(round_of(url, prompts), tmp_path / "whole", Spending()).read_bytes()
    with judge_server(scripted()) as (url, asked):
        while rows is None:
            try:
                rows = collect(round_of(url, prompts), tmp_path / "p", Spending(max_requests=7))
            except CapReached:
                stops += 1
    assert stops == (27 - 1) // 7
    assert len(asked) == 3 * (4 + 5)
    assert rows.read_bytes() == whole


def test_a_round_belongs_to_one_process(tmp_path):
    config = round_of("http://unused", write(tmp_path / "prompts.jsonl", [{"prompt": "a"}]))
    with lock(tmp_path / "round"), pytest.raises(ValueError, match="is in use by process"):
        collect(config, tmp_path / "round", Spending())


def held_until_sealed(folder, names):
    """What `seal` does, of a folder that no other process may take meanwhile."""
    with pytest.raises(ValueError, match="is in use by process"), lock(folder):
        pass
    seal(folder, names)


def test_a_cost_cap_ends_with_status_75(tmp_path, capsys):
    folder, one = tmp_path / "o", {"endpoint": "server", "model": "a", "price": (1e6, 2e6)}
    with judge_server(scripted()) as (url, _):
        inputs = url, write_prompts(tmp_path, 5), folder
        changes = {"contestants": {"x": one}, "endpoint": {"concurrency": 1}}
        words = words_of(*inputs, **changes)
        main([*words, "--dry_run"])
        planned = json.loads(capsys.readouterr().out)
        assert planned["x"]["requests"] == 5
        assert planned["judge"]["requests"] == 25
        assert planned["x"]["cost"] >= 5 * 2 * 512
        assert not folder.exists()
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--max_cost=39"])
        assert "--max_cost needs the price of judge" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="75"):
            main([*words_of(*inputs, **changes, judge={"price": (0.0, 0.0)}), "--max_cost=39"])
    # A reply costs 10 x $1 + 5 x $2: after two the cap is reached.
    assert "--max_cost=39 is reached after 2 requests, $40.00" in capsys.readouterr().err


def at(numbers, fault):
    """A fault of these requests."""
    return lambda n, _: (fault() if callable(fault) else fault) if n in numbers else None


LISTED = {"choices": [{"message": {"content": [{"type": "text", "text": "x"}]}}]}
HALF = {"choices": [{"message": {"content": "half: \ud800"}}], "usage": {"prompt_tokens": "x"}}
RATED = [{"answer": i, "rating": "4", "rationale": "\ud83d"} for i in range(1, 5)]
FAULTS = {
    "429 with Retry-After": (at({2}, (429, {"Retry-After": "1"})), {}),
    "429 without": (at({2}, 429), {}),
    "a reply cut in the middle": (at({2, 3}, b'{"id": "x", "choices": [{"mess'), {}),
    "200 with an error": (at({2}, {"error": {"message": "overloaded"}}), {}),
    "no text": (at({2}, LISTED), {}),
    "half a character": (at({2}, HALF), {}),
    "never answering": (at({2, 3}, lambda: time.sleep(1.0)), {}),
    "refused": (at({2}, 400), {"refused": 1}),
    "half a character of a rating": (at({9, 10}, json.dumps({"ratings": RATED})), {}),
    "always failing": (at({2, 3, 4}, 500), {"missing": 1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_retried_or_counted_and_asked_again(tmp_path, name):
    fault, counts = FAULTS[name]
    with judge_server(scripted(fault)) as (url, _):
        endpoint = {"retries": 2, "timeout": 0.5, "concurrency": 1}
        judge = {"aspects": ()}
        config = round_of(url, write_prompts(tmp_path, 2), endpoint=endpoint, judge=judge)
        rows, account = collected(config, tmp_path / "round")
        for kind, n in counts.items():
            assert sum(c.get(kind, 0) for c in account["answers"].values()) == n
        assert sum(len(row["completions"]) for row in rows) == 8 - sum(counts.values())
        again, _ = collected(config, tmp_path / "round")
    assert sum(len(row["completions"]) for row in again) == 8 - counts.get("refused", 0)


def test_the_cache_is_not_believed_unchecked(tmp_path):
    def stored(statement):
        with contextlib.closing(sqlite3.connect(tmp_path / "r" / "cache.sqlite")) as file, file:
            return file.execute(statement).rowcount

    refuses = []
    with judge_server(scripted(lambda *_: 400 if refuses else None)) as (url, _):
        config = round_of(url, write_prompts(tmp_path, 2), endpoint={"retries": 0})
        rows, _ = collected(config, tmp_path / "r")
        changed = "substr(json, 1, 18) || 'X' || substr(json, 20)"
        assert stored(f"UPDATE reply SET json = {changed} WHERE rowid = 1") == 1
        again, account = collected(config, tmp_path / "r")
        assert (again, account["this_call"]["requests"]) == (rows, 1)
        assert stored("DELETE FROM reply WHERE rowid = 12") == 1
        refuses.append("this chat")  # of a model that has answered others, in an earlier call
        _, account = collected(config, tmp_path / "r")
        # Once by the schema, once in words.
        assert (account["this_call"]["requests"], account["this_call"]["failed"]) == (2, {})
    (tmp_path / "r" / "cache.sqlite").write_bytes(b"x" * 9000)
    with pytest.raises(
        ValueError, match=r"cache\.sqlite: file is not a database; if it is damaged"
    ):
        collect(config, tmp_path / "r", Spending())


FATAL = {
    "wrong key": (401, "refuses the key of K_TEST"),
    "no such model": (404, "has no model 'a'"),
    "down": (503, "failed 8 requests for"),
    "every request refused": (422, "failed 8 requests for a in a row: Error code: 422"),
    "no answers": ({"choices": []}, "in a row: no answer in the reply"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_no_retry_can_help_ends_in_one_line_without_the_key(tmp_path, name, monkeypatch):
    fault, words = FATAL[name]
    monkeypatch.setenv("K_TEST", "sk-very-secret")
    first = {"no answers": 0, "every request refused": 0}.get(name, 3)
    with judge_server(scripted(lambda n, _: fault if n > first else None)) as (url, _):
        endpoint = {"retries": 0, "key_variable": "K_TEST"}
        config = round_of(url, write_prompts(tmp_path, 20), endpoint=endpoint)
        with pytest.raises(ValueError, match=words) as error:
            collect(config, tmp_path / "round", Spending())
    assert "sk-very-secret" not in str(error.value)
    assert "\n" not in str(error.value)
    for path in (tmp_path / "round").rglob("*"):
        assert b"sk-very-secret" not in path.read_bytes(), path


def test_what_would_end_a_round_later_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("K_TEST", raising=False)
    prompts = write_prompts(tmp_path, 2)
    absent = str(tmp_path / "absent")
    with judge_server(scripted()) as (url, asked):
        for changes, words in (
            ({"endpoint": {"key_variable": "K_TEST"}}, "needs the environment variable K_TEST"),
            ({"judge": {"kind": "recorded", "ratings": absent}}, "No such file.*absent"),
            ({"judge": {"kind": "model", "model": absent}}, "is not a model"),
            ({"contestants": {"a": {"answers": absent}}}, "No such file.*absent"),
            ({"judge": {"kind": "function"}}, "judge.kind=function is for Python"),
        ):
            config = round_of(url, prompts, **changes)
            with pytest.raises((ValueError, FileNotFoundError), match=words):
                collect(config, tmp_path / "r", Spending())
    assert not asked
    config = round_of("http://127.0.0.1:9/v1", prompts, endpoint={"retries": 0})
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9.* cannot be reached"):
        collect(config, tmp_path / "r", Spending())


def test_ratings_that_cannot_be_read_are_asked_again_and_then_not_applicable(tmp_path):
    # The first judgement is garbled twice, the second always: asked three times.
    fault = at({9, 10, 12, 13, 14}, "I would rather not.")
    with judge_server(scripted(fault)) as (url, asked):
        config = round_of(url, write_prompts(tmp_path, 2), endpoint={"concurrency": 1})
        rows, account = collected(config, tmp_path / "round")
    assert account["judgements"]["rated"] == 9
    assert account["judgements"]["unreadable"] == 1
    assert account["judgements"]["asked_again"] == 4
    assert rows[0]["completions"][0]["annotations"]["honesty"]["Rating"] == "N/A"
    assert rows[1]["completions"][0]["annotations"]["honesty"]["Rating"] != "N/A"
    assert len(asked[9]["messages"]) == 4, "it sees what it wrote"


def test_a_server_without_schemas_is_asked_in_lines_and_without_what_it_refuses(tmp_path):
    refused = {"response_format", "seed"}
    fault = scripted(lambda _, request: 400 if refused & request.keys() else None)
    with judge_server(fault) as (url, asked):
        endpoint = {"concurrency": 1, "omit": ("seed",)}
        config = round_of(url, write_prompts(tmp_path, 2), endpoint=endpoint)
        rows, _ = collected(config, tmp_path / "round")
    assert rows[0]["completions"][0]["critique"] == "Because."
    assert sum("response_format" in request for request in asked) == 1
    assert "Rating: ..." in asked[-1]["messages"][0]["content"]


def test_a_rate_spaces_requests(tmp_path):
    times = []
    with judge_server(scripted(lambda *_: times.append(time.monotonic()))) as (url, _):
        endpoint = {"requests_per_minute": 240}
        inputs = url, write_prompts(tmp_path, 1)
        config = round_of(*inputs, endpoint=endpoint, judge={"kind": "function"})
        collect(config, tmp_path / "round", Spending(), lambda *_: {"overall_score": 1.0})
    assert times[3] - times[0] > 0.5  # three gaps of a quarter of a second


def test_a_model_here_answers_by_several_seeds_and_is_judged_by_implicit_reward(
    tmp_path, world, monkeypatch
):
    policy, reference = str(tmp_path / "policy"), str(tmp_path / "reference")
    model = save_small_model(world, policy)
    noise = jax.random.normal(jax.random.key(7), model.params["final_norm"].shape)
    changed = model.params | {"final_norm": model.params["final_norm"] + noise}
    save_model(other := model._replace(params=changed), reference)
    own = {"model": policy, "max_tokens": 12}
    contestants = {f"sample_{seed}": own | {"seed": seed} for seed in (0, 1)}
    rewarded = {"kind": "implicit_reward", "model": policy, "reference": reference, "beta": 0.3}
    lines = [{"prompt": f"Question {i}?"} for i in range(3)]
    lines.append({"prompt": "beyond the positions " * 99})
    inputs = "http://unused", write(tmp_path / "prompts.jsonl", lines)
    config = round_of(*inputs, contestants=contestants, judge=rewarded, batch_size=4)
    rows, account = collected(config, tmp_path / "round")
    assert len(rows) == 3
    assert [counts["too_long"] for counts in account["answers"].values()] == [1, 1]
    texts = [[c["response"] for c in row["completions"]] for row in rows]
    assert any(len(set(pair)) == 2 for pair in texts), "two seeds answer differently"
    first = rows[2]["completions"][0]
    ids, mask = zj.render_chat(model.tokenizer, messages(rows[2]["instruction"], first["response"]))
    logps = [alone(each, [ids], [mask], len(ids))[0].sum() for each in (model, other)]
    assert abs(first["overall_score"]) > 0.01
    assert first["overall_score"] == pytest.approx(0.3 * (logps[0] - logps[1]), abs=1e-4)
    # What is in the cache is not sampled again.
    monkeypatch.setattr(answers_module, "load_model", lambda *_: pytest.fail("nothing is missing"))
    assert collected(config, tmp_path / "round")[0] == rows
    monkeypatch.undo()
    judge = {"kind": "model", "model": policy, "max_tokens": 12, "aspects": ("honesty",)}
    judge |= {"attempts": 2}
    config = round_of(*inputs, contestants=contestants, judge=judge, batch_size=4)
    rows, account = collected(config, tmp_path / "judged")
    assert account["judgements"]["unreadable"] == 3 * 2, "a random model cannot judge"
    assert account["judgements"]["asked_again"] > 0
    assert rows[0]["completions"][0]["annotations"]["honesty"]["Rating"] == "N/A"


def test_recorded_answers_and_ratings_need_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("zephyr_jax.feedback.collect.seal", held_until_sealed)
    prompts = write_prompts(tmp_path, 4)
    with judge_server(scripted()) as (url, _):
        first = collect(round_of(url, prompts), tmp_path / "first", Spending())
    answers = {name: {"answers": str(first)} for name in MODELS[:2]}
    answers["another"] = {"answers": str(first), "model": MODELS[2]}
    judge = {"kind": "recorded", "ratings": str(first)}
    config = round_of("http://unused", prompts, contestants=answers, judge=judge)
    rows, _ = collected(config, tmp_path / "second")
    for old, new in zip(rows_of(first), rows, strict=True):
        scores = [[c["overall_score"] for c in row["completions"]] for row in (old, new)]
        assert scores[0][:3] == scores[1]


def test_prompts_are_drawn_kept_off_benchmarks_and_never_held_out(tmp_path):
    folder, say = tmp_path / "set", "Say the number {}\n\nin French"
    rows = [{"instruction": f"Say the number {i}", "input": "in French"} for i in range(9)]
    write(folder / "train.jsonl", [*rows, {"messages": messages("hi", "x")}])
    write(folder / "test.jsonl", [{"prompt": "held out"}])
    benchmark = write(tmp_path / "benchmark.jsonl", [{"prompt": say.format(3)}])
    config = PromptsConfig(str(folder), decontaminate=(str(benchmark),))
    prompts, counts = read_prompts(config, 0)
    assert counts == {"read": 10, "contaminated": 1, "prompts": 9}
    assert [prompt.text for prompt in prompts][:2] == [say.format(0), say.format(1)]
    drawn, counts = read_prompts(dataclasses.replace(config, count=4), 0)
    assert counts["not_drawn"] == 5
    assert set(drawn) < set(prompts)
    assert drawn != read_prompts(dataclasses.replace(config, count=4), 1)[0]


@pytest.mark.parametrize("name", ["feedback_ultrafeedback", "feedback_on_policy"])
def test_the_shipped_rounds_are_read(name):
    config = build(FeedbackConfig, read_file(name, ["--config.prompts.count=7"]))
    assert (config.prompts.count, len(config.contestants)) == (7, 4)


def test_bad_configs_end_in_one_line(tmp_path):
    prompts = write_prompts(tmp_path, 2)
    for change, words in (
        ({"judge": {"kind": "oracle"}}, "judge.kind='oracle'"),
        ({"judge": {"repeats": 0}}, "repeats=0"),
        ({"judge": {"modle": "x"}}, "did you mean model"),
        ({"judge": {"endpoint": "elsewhere"}}, "one of `endpoints`"),
        ({"principles": {"kindness": 1.0}}, "principles='kindness'"),
        ({"contestants": {"a": {}}}, "a contestant's model"),
        ({"contestants": {"a": {"model": "m", "top_p": 0.0}}}, "top_p=0.0"),
        ({"endpoint": {"url": "localhost:8000"}}, "http"),
        ({"endpoint": {"key_variable": "sk-abc"}}, "not a key"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            round_of("http://x", prompts, **change)
        assert "sk-abc" not in str(error.value)
    empty = write(tmp_path / "empty.jsonl", [{"prompt": " "}])
    with pytest.raises(ValueError, match="has no prompt to answer"):
        collect(round_of("http://x", empty), tmp_path / "r", Spending())
