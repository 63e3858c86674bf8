"""Rounds of feedback: rows, orders undone, stops and faults, judges here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import random_params
from feedback_rounds import MODELS, by_length, fair_script, round_of, rows_of, write_prompts
from scripted_server import serving

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.config import build, read_file
from zephyr_jax.evaluation.endpoints import CapReached, Spending
from zephyr_jax.feedback.answers import SYSTEM_PROMPTS
from zephyr_jax.feedback.collect import collect
from zephyr_jax.feedback.config import FeedbackConfig
from zephyr_jax.weights.huggingface import export_hf


def test_a_round_is_a_set_in_ultrafeedbacks_schema(tmp_path):
    with serving(fair_script()) as url:
        config = round_of(
            url,
            write_prompts(tmp_path, 6),
            principles={"honesty": 1.0, "truthfulness": 3.0},
            judge={"repeats": 2},
        )
        rows = rows_of(collect(config, tmp_path / "round", Spending()))
    assert [row["instruction"][:10] for row in rows] == [f"Question {i}" for i in range(6)]
    for row in rows:
        assert row["models"] == list(MODELS)
        for completion in row["completions"]:
            # The answers were shown in two random orders; each has the rating of its own text.
            (rating,) = by_length("", [completion["response"]])
            assert completion["overall_score"] == 2 * rating
            assert completion["fine-grained_score"] == rating
            assert {a["Rating"] for a in completion["annotations"].values()} == {str(rating)}
            assert completion["custom_system_prompt"] == SYSTEM_PROMPTS[completion["principle"]]
    orders = [each["order"] for each in rows_of(tmp_path / "round" / "judgements.jsonl")]
    assert len({tuple(order) for order in orders}) > 5
    assert all(a == b[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True))
    account = json.loads((tmp_path / "round" / "account.json").read_text())
    assert account["prompts"] == {
        "read": 9, "empty": 1, "duplicate": 1, "unreadable": 1, "prompts": 6
    }  # fmt: skip
    assert account["this_call"]["requests"] == 6 * (4 + 5 * 2)
    # A ten over low ratings, which in the published set is a one that was stored wrongly
    rows[0]["completions"][0] |= {"overall_score": 10.0, "fine-grained_score": 1.0}
    (tmp_path / "round" / "ultrafeedback.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    main(
        ["prepare_data", "ultrafeedback", f"--source={tmp_path / 'round' / 'ultrafeedback.jsonl'}",
         f"--data_dir={tmp_path / 'data'}", "--pairing=best_vs_worst", "--ties=drop"]
    )  # fmt: skip
    report = json.loads(next((tmp_path / "data").rglob("report.json")).read_text())
    assert not [rule for rule in report["rules"] if rule.startswith("score_10_to")], "tens are tens"


@pytest.mark.parametrize("step", [3, 7])
def test_a_round_that_is_stopped_again_and_again_asks_nothing_twice(tmp_path, step):
    prompts = write_prompts(tmp_path, 3)
    with serving(fair_script()) as url:
        whole = collect(round_of(url, prompts), tmp_path / "whole", Spending()).read_bytes()
    script, stops = fair_script(), 0
    with serving(script) as url:
        config = round_of(url, prompts)
        while True:
            try:
                rows = collect(config, tmp_path / "parts", Spending(max_requests=step))
                break
            except CapReached:
                stops += 1
    assert stops == (27 - 1) // step
    assert len(script.requests) == 3 * (4 + 5)
    assert rows.read_bytes() == whole


def test_a_cost_cap_ends_with_status_75(tmp_path, capsys):
    config = f"""
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({{"name": "r", "seed": 0}})
    config.prompts = ConfigDict({{"source": "{tmp_path}/prompts.jsonl"}})
    config.endpoints = ConfigDict({{"s": {{"url": "URL", "concurrency": 1}}}})
    asked = {{"endpoint": "s", "model": "a", "price": (1e6, 2e6)}}
    config.contestants = ConfigDict({{"x": asked}})
    config.judge = ConfigDict({{"endpoint": "s", "model": "judge", "price": (0.0, 0.0)}})
    return config
"""
    write_prompts(tmp_path, 5)
    with serving(fair_script()) as url:
        (tmp_path / "c.py").write_text(config.replace("URL", url))
        words = ["collect_feedback", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'o'}"]
        main([*words, "--dry_run"])
        planned = json.loads(capsys.readouterr().out)
        assert planned["x"]["requests"] == 5
        assert planned["judge"]["requests"] == 25
        assert planned["x"]["cost"] >= 5 * 2 * 512
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--max_cost=39"])
    assert stopped.value.code == 75
    # A reply costs 10 x $1 + 5 x $2: after two the cap is reached.
    assert "--max_cost=39 is reached after 2 requests, $40.00" in capsys.readouterr().err


FAULTS = {
    "500 once": (lambda n: (500, {}) if n == 2 else None, {}),
    "429 with Retry-After": (lambda n: (429, {"Retry-After": "1"}) if n == 2 else None, {}),
    "429 without": (lambda n: (429, {}) if n == 2 else None, {}),
    "a reply cut in the middle": (lambda n: "cut" if n in (2, 3) else None, {}),
    "not JSON": (lambda n: "not_json" if n == 2 else None, {}),
    "200 with an error": (lambda n: "error_body" if n == 2 else None, {}),
    "never answering": (lambda n: "silent" if n in (2, 3) else None, {}),
    "refused": (lambda n: (400, {}) if n == 2 else None, {"refused": 1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_retried_or_counted_and_asked_again(tmp_path, name):
    fault, counts = FAULTS[name]
    script = fair_script(fault=fault)
    with serving(script) as url:
        endpoints = {"server": {"url": url, "retries": 2, "timeout": 0.5, "concurrency": 1}}
        config = round_of(url, write_prompts(tmp_path, 2), endpoints=endpoints)
        rows = rows_of(collect(config, tmp_path / "round", Spending()))
        account = json.loads((tmp_path / "round" / "account.json").read_text())
        total = {kind: sum(c.get(kind, 0) for c in account["answers"].values()) for kind in counts}
        assert total == counts
        assert sum(len(row["completions"]) for row in rows) == 8 - sum(counts.values())
        again = rows_of(collect(config, tmp_path / "round", Spending()))
    assert sum(len(row["completions"]) for row in again) == 8 - counts.get("refused", 0)


FATAL = {
    "wrong key": ((401, {}), "refuses the key of K_TEST"),
    "no such model": ((404, {}), "has no model 'a'"),
    "down": ((503, {}), "failed 8 requests for"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_no_retry_can_help_ends_in_one_line_without_the_key(tmp_path, name, monkeypatch):
    fault, words = FATAL[name]
    monkeypatch.setenv("K_TEST", "sk-very-secret")
    with serving(fair_script(fault=lambda n: fault if n > 3 else None)) as url:
        endpoints = {"server": {"url": url, "retries": 0, "key_variable": "K_TEST"}}
        config = round_of(url, write_prompts(tmp_path, 20), endpoints=endpoints)
        with pytest.raises(ValueError, match=words) as error:
            collect(config, tmp_path / "round", Spending())
    assert "sk-very-secret" not in str(error.value)
    assert "\n" not in str(error.value)
    for path in (tmp_path / "round").rglob("*"):
        assert b"sk-very-secret" not in path.read_bytes(), path


def test_a_missing_key_and_an_endpoint_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("K_TEST", raising=False)
    prompts = write_prompts(tmp_path, 9)
    keyed = {"server": {"url": "http://127.0.0.1:9/v1", "key_variable": "K_TEST"}}
    with pytest.raises(ValueError, match="needs the environment variable K_TEST"):
        collect(round_of("", prompts, endpoints=keyed), tmp_path / "r", Spending())
    closed = {"server": {"url": "http://127.0.0.1:9/v1", "retries": 0}}
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9.* cannot be reached"):
        collect(round_of("", prompts, endpoints=closed), tmp_path / "r", Spending())


def test_ratings_that_cannot_be_read_are_asked_again_and_then_not_applicable(tmp_path):
    # The first judgement is garbled twice, the second always: asked three times.
    script = fair_script(fault=lambda n: "garbled" if n in (9, 10, 12, 13, 14) else None)
    with serving(script) as url:
        endpoints = {"server": {"url": url, "concurrency": 1}}
        config = round_of(url, write_prompts(tmp_path, 2), endpoints=endpoints)
        rows = rows_of(collect(config, tmp_path / "round", Spending()))
    account = json.loads((tmp_path / "round" / "account.json").read_text())
    assert account["judgements"] == {
        "rated": 9, "unreadable": 1, "asked_again": 4, "tokens_in": 140, "tokens_out": 70
    }  # fmt: skip
    assert rows[0]["completions"][0]["annotations"]["honesty"]["Rating"] == "N/A"
    assert rows[1]["completions"][0]["annotations"]["honesty"]["Rating"] != "N/A"
    assert len(script.requests[9]["messages"]) == 4, "it sees what it wrote"


def test_a_server_without_schemas_is_asked_in_lines_of_text(tmp_path):
    script = fair_script(fault=lambda n: None)
    plain = script.reply

    def refuses(n):
        return (400, {}) if script.requests[-1].get("response_format") else None

    script.fault, script.reply = refuses, plain
    with serving(script) as url:
        endpoints = {"server": {"url": url, "concurrency": 1}}
        config = round_of(url, write_prompts(tmp_path, 2), endpoints=endpoints)
        rows = rows_of(collect(config, tmp_path / "round", Spending()))
    assert rows[0]["completions"][0]["critique"] == "Because."
    assert sum("response_format" in body for body in script.requests) == 1


@pytest.fixture(scope="module")
def exported(cfg, tok, tmp_path_factory):
    """Two models with other weights, as folders."""
    root = tmp_path_factory.mktemp("models")
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, num_hidden_layers=2)
    params = random_params(cfg)
    export_hf(cfg, params, tok, root / "policy", dtype="float32")
    noise = jax.random.normal(jax.random.key(7), params["final_norm"].shape)
    params["final_norm"] = params["final_norm"] + 0.1 * noise
    export_hf(cfg, params, tok, root / "reference", dtype="float32")
    return root


def test_a_model_here_answers_by_several_seeds_and_is_judged_by_implicit_reward(
    tmp_path, exported, monkeypatch
):
    contestants = {
        f"sample_{seed}": {"model": str(exported / "policy"), "seed": seed, "max_tokens": 12}
        for seed in (0, 1)
    }
    rewarded = {
        "kind": "implicit_reward",
        "model": str(exported / "policy"),
        "reference": str(exported / "reference"),
        "beta": 0.3,
    }
    prompts = write_prompts(tmp_path, 5)
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "beyond the positions " * 99}) + "\n")
    config = round_of(
        "http://unused", prompts, contestants=contestants, judge=rewarded, batch_size=2
    )
    rows = rows_of(collect(config, tmp_path / "round", Spending()))
    assert len(rows) == 5
    account = json.loads((tmp_path / "round" / "account.json").read_text())
    assert [counts["too_long"] for counts in account["answers"].values()] == [1, 1]
    texts = [[c["response"] for c in row["completions"]] for row in rows]
    assert any(len(set(pair)) == 2 for pair in texts), "two seeds answer differently"
    policy = zj.load_hf(exported / "policy")
    reference = zj.load_hf(exported / "reference")
    tok = zj.Tokenizer.from_folder(exported / "policy")
    for completion in rows[2]["completions"]:
        chat = [
            {"role": "user", "content": rows[2]["instruction"]},
            {"role": "assistant", "content": completion["response"]},
        ]
        ids, mask = zj.render_chat(tok, chat)
        tokens, targets = jnp.asarray([ids]), jnp.asarray([mask], bool)
        logps = [
            float(zj.token_logps(zj.forward(*model, tokens), tokens, targets).sum())
            for model in (policy, reference)
        ]
        assert completion["overall_score"] == pytest.approx(0.3 * (logps[0] - logps[1]), abs=1e-3)
    # What is in the cache is not sampled again, and a batch that lacks one answer gives the same.
    from zephyr_jax.feedback import answers as module

    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("nothing is missing"))
    again = rows_of(collect(config, tmp_path / "round", Spending()))
    assert again == rows


def test_recorded_answers_and_ratings_need_no_model(tmp_path):
    prompts = write_prompts(tmp_path, 4)
    with serving(fair_script()) as url:
        first = collect(round_of(url, prompts), tmp_path / "first", Spending())
    answers = {name: {"answers": str(first)} for name in MODELS[:3]}
    judge = {"kind": "recorded", "ratings": str(first)}
    config = round_of("http://unused", prompts, contestants=answers, judge=judge)
    rows = rows_of(collect(config, tmp_path / "second", Spending()))
    for old, new in zip(rows_of(first), rows, strict=True):
        assert [c["overall_score"] for c in new["completions"]] == [
            c["overall_score"] for c in old["completions"][:3]
        ]


@pytest.mark.parametrize("name", ["feedback_ultrafeedback", "feedback_on_policy"])
def test_the_shipped_rounds_are_read(name):
    config = build(FeedbackConfig, read_file(name, ["--config.prompts.count=7"]))
    assert config.prompts.count == 7
    assert len(config.contestants) == 4


def test_bad_configs_end_in_one_line(tmp_path):
    prompts = write_prompts(tmp_path, 2)
    for change, words in (
        ({"judge": {"kind": "oracle"}}, "judge.kind='oracle'"),
        ({"judge": {"repeats": 0}}, "repeats=0"),
        ({"principles": {"kindness": 1.0}}, "principles='kindness'"),
        ({"contestants": {"a": {}}}, "name a model, or a file"),
        ({"endpoints": {"server": {"url": "localhost:8000"}}}, "http"),
    ):
        with pytest.raises(ValueError, match=words):
            round_of("http://x", prompts, **change)
    with pytest.raises(ValueError, match="one of `endpoints`"):
        round_of("http://x", prompts, judge={"endpoint": "elsewhere"})
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": " "}\n')
    with pytest.raises(ValueError, match="has no prompt to answer"):
        collect(round_of("http://x", empty), tmp_path / "r", Spending())
