"""Judges whose faults are known are exposed, and a fair one is not."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from feedback_rounds import rows_of
from raw_rows import write
from scipy import stats

from zephyr_jax.__main__ import main
from zephyr_jax.data.raw.schema import prompt_digest
from zephyr_jax.feedback.judges import shown_order
from zephyr_jax.feedback.quality import judge_quality

NAMES = ["w", "x", "y", "z"]


def write_round(folder, judge, n=150, repeats=2):
    """A round of `n` prompts with four answers, judged by a rule; and the truth of its answers."""
    rng = np.random.default_rng(0)
    judgements, rows = [], []
    for i in range(n):
        lengths, quality = rng.integers(10, 500, 4), rng.integers(1, 11, 4)
        texts = [f"{i}/{k}".ljust(length, ".") for k, length in enumerate(lengths)]
        for repeat in range(repeats):
            order = shown_order(0, str(i), "overall", repeat, 4)
            ratings = JUDGES[judge][0](np.argsort(order), lengths, quality, rng)
            judged = {"prompt_id": prompt_digest(f"prompt {i}"), "form": "overall", "order": order}
            judged |= {"repeat": repeat, "contestants": NAMES, "lengths": lengths.tolist()}
            judgements.append(judged | {"ratings": list(map(float, ratings))})
        completions = [
            {"model": m, "response": t, "overall_score": float(q)}
            for m, t, q in zip(NAMES, texts, quality, strict=True)
        ]
        rows.append({"instruction": f"prompt {i}", "completions": completions})
    for name, lines in (("judgements", judgements), ("ultrafeedback", rows), ("truth", rows)):
        write(folder / f"{name}.jsonl", lines)
    return folder


# From the places, the lengths, the qualities and random numbers to ratings; and what is found
JUDGES = {
    "fair": (lambda _, __, good, rng: np.clip(np.round(good + rng.normal(0, 1.5, 4)), 1, 10), []),
    "first": (lambda place, *_: 9 - 2 * place, ["what is shown first", "contradicts itself"]),
    "longer": (
        lambda _, length, *__: 1 + length * 9 // 500,
        ["prefers longer answers; fair is 0%", "agrees with the record no better"],
    ),
    "chance": (
        lambda *inputs: inputs[-1].integers(1, 11, 4),
        ["contradicts itself", "agrees with the record no better"],
    ),
    "same": (lambda *_: np.full(4, 7), ["rates nearly all alike"]),
}


@pytest.mark.parametrize("judge", JUDGES)
def test_a_judges_faults_are_found_and_no_others(tmp_path, judge):
    folder = write_round(tmp_path / "round", judge)
    quality, _ = judge_quality(folder, str(folder / "truth.jsonl"))
    for words in JUDGES[judge][1]:
        assert any(words in finding for finding in quality["findings"]), quality["findings"]
    if judge == "fair":
        assert quality["findings"] == []
        assert quality["forms"]["overall"]["accuracy"]["value"] > 0.85
        assert quality["forms"]["overall"]["spearman"]["value"] > 0.8


def test_without_a_record_order_and_repeats_still_tell(tmp_path):
    assert judge_quality(write_round(tmp_path / "fair", "fair"))[0]["findings"] == []
    found = judge_quality(write_round(tmp_path / "first", "first"))[0]["findings"]
    assert "shown first" in found[0]
    (finding,) = judge_quality(write_round(tmp_path / "longer", "longer"))[0]["findings"]
    assert "which may be better" in finding


def test_the_command_writes_a_page(tmp_path, capsys):
    folder = write_round(tmp_path / "round", "first", n=30)
    main(["collect_feedback", "report", f"--workdir={folder}"])
    assert "overall: prefers what is shown first" in capsys.readouterr().out
    page = (folder / "judge.html").read_text("utf-8")
    assert "how often the answer that is shown first wins" in page
    assert json.loads((folder / "judge.json").read_text())["forms"]["overall"]["ties"]["n"] == 360


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "report --workdir=nowhere x.jsonl",
            "nowhere holds no finished round: it has no judgements.jsonl",
        ),
        ("report --workdir=nowhere --max_cost=1", "max_cost has no effect on report"),
        ("collect x.jsonl --config=c", "recorded has no effect on collect"),
        ("collect --config=c --max_cost=nan", "--max_cost=nan must be 0 or more dollars"),
    ],
)
def test_what_has_no_effect_is_refused(refused, words, message):
    assert message in refused("collect_feedback", *words.split())


def test_measures_equal_counting_by_hand(tmp_path):
    folder = write_round(tmp_path / "round", "fair", n=12)
    measures = judge_quality(folder, str(folder / "truth.jsonl"))[0]["forms"]["overall"]
    wins, shown_first, right, levels = 0, 0, [], []
    rows = rows_of(folder / "truth.jsonl")
    for k, each in enumerate(rows_of(folder / "judgements.jsonl")):
        truth = [c["overall_score"] for c in rows[k // 2]["completions"]]
        levels += zip(each["ratings"], truth, strict=True)
        for i, j in itertools.permutations(range(4), 2):
            if each["ratings"][i] > each["ratings"][j]:
                wins += 1
                shown_first += each["order"].index(i) < each["order"].index(j)
                right += [truth[i] > truth[j]] if truth[i] != truth[j] else []
    correlation: Any = stats.spearmanr(np.asarray(levels))
    assert measures["spearman"]["value"] == pytest.approx(correlation.statistic)
    assert measures["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert measures["first_shown_wins"]["value"] == pytest.approx(shown_first / wins)
    assert measures["first_shown_wins"]["n"] == wins
