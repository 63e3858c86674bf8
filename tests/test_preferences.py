import doctest
import json
from collections import Counter
from pathlib import Path

import pytest

from zephyr_jax.data import preferences, rows
from zephyr_jax.data.preferences import (
    BinarizationRules,
    binarize,
    mean_rating,
    repair_overall_score,
)
from zephyr_jax.data.rows import prompt_digest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def answer(text, score, ratings="4454", wrap=False):
    held = [{"Rating": "N/A" if rating == "-" else rating} for rating in ratings]
    annotations = {
        aspect: [rating] if wrap else rating for aspect, rating in zip(ASPECTS, held, strict=True)
    }
    return {"response": text, "overall_score": score, "annotations": annotations}


def rated(*answers, prompt="Q?"):
    return {"instruction": prompt, "source": "flan", "completions": list(answers)}


def published(chosen="good", rejected="bad", score_chosen=8.0, score_rejected=3.0, asked="Q?"):
    question = {"content": "Q?", "role": "user"}
    return {
        "prompt": "Q?",
        "prompt_id": prompt_digest("Q?"),
        "chosen": [question, {"content": chosen, "role": "assistant"}],
        "rejected": [{**question, "content": asked}, {"content": rejected, "role": "assistant"}],
        "messages": [question, {"content": chosen, "role": "assistant"}],
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
    }


def test_docstrings_are_true():
    for module in (preferences, rows):
        result = doctest.testmod(module)
        assert result.attempted
        assert result.failed == 0


@pytest.mark.parametrize("wrap", [False, True])
def test_mean_rating_reads_both_releases(wrap):
    assert mean_rating(answer("", 1, "4454", wrap)) == 4.25
    assert mean_rating(answer("", 1, "-45-", wrap)) == 4.5
    assert mean_rating(answer("", 1, "----", wrap)) is None


def test_mean_rating_survives_holes():
    assert mean_rating({}) is None
    assert mean_rating({"annotations": None}) is None
    assert mean_rating({"annotations": {"a": [], "b": None, "c": {}, "d": {"Rating": 5}}}) == 5.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (answer("", 9.5, "1111"), (9.5, None)),
        (answer("", 10, "1111"), (1.0, "score_10_to_1")),
        (answer("", 10.0, "2222"), (1.0, "score_10_to_1")),
        (answer("", 10, "2322", wrap=True), (4.5, "score_10_estimated")),
        (answer("", 10, "4444"), (8.0, "score_10_estimated")),
        (answer("", 10, "4445"), (10.0, "score_10_kept")),
        (answer("", 10, "----"), (10.0, "score_10_unrated")),
        ({**answer("", 10, "1111"), "fine-grained_score": 5.0}, (10.0, "score_10_kept")),
        ({**answer("", 10, "5555"), "fine-grained_score": 2}, (1.0, "score_10_to_1")),
        ({**answer("", 10, "5555"), "fine-grained_score": 3.0}, (10.0, "score_10_reannotated")),
        ({**answer("", 10, "3333"), "fine-grained_score": None}, (6.0, "score_10_estimated")),
        ({"overall_score": None}, (None, None)),
        ({}, (None, None)),
        ({"overall_score": float("nan")}, (None, None)),
    ],
)
def test_repair_overall_score(completion, expected):
    assert repair_overall_score(completion) == expected


def test_the_first_maximum_is_chosen_and_any_other_rejected():
    seen = Counter()
    for number in range(300):
        row = rated(
            answer("a", 3), answer("b", 9), answer("c", 9), answer("d", 5), prompt=f"Q{number}"
        )
        pair, counts = binarize(row, BinarizationRules())
        assert pair["chosen"][-1]["content"] == "b"
        assert pair["score_chosen"] == 9.0
        rejected = pair["rejected"][-1]["content"]
        assert pair["score_rejected"] == {"a": 3.0, "c": 9.0, "d": 5.0}[rejected]
        assert counts == (Counter(tie=1) if rejected == "c" else Counter())
        seen[rejected] += 1
    assert all(70 < seen[text] < 130 for text in "acd")


def test_the_draw_hangs_on_seed_and_prompt():
    answers = [answer(text, score) for text, score in zip("abcd", (3, 9, 4, 5), strict=True)]
    prompts = [f"Q{number}" for number in range(40)]

    def draws(seed):
        rules = BinarizationRules(seed=seed)
        pairs = [binarize(rated(*answers, prompt=prompt), rules)[0] for prompt in prompts]
        return [pair["rejected"][-1]["content"] for pair in pairs]

    # Sets prepared by older versions must not come out different.
    assert "".join(draws(0)[:12]) == "dacdadaddcdc"
    assert draws(0) != draws(1)


def test_the_pair_has_the_published_columns():
    pair, _ = binarize(rated(answer("bad", 3), answer("good", 8)), BinarizationRules())
    wanted = published()
    assert {key: pair[key] for key in wanted} == wanted
    assert pair["source"] == "flan"


def test_criteria_differ():
    row = rated(answer("a", 9, "1111"), answer("b", 2, "5555"))
    assert binarize(row, BinarizationRules())[0]["score_chosen"] == 9.0
    pair, _ = binarize(row, BinarizationRules(criterion="mean_rating"))
    assert (pair["chosen"][-1]["content"], pair["score_chosen"]) == ("b", 5.0)
    with pytest.raises(ValueError, match="overall_score, mean_rating"):
        BinarizationRules(criterion="best")


def test_the_repair_changes_who_is_chosen():
    row = rated(answer("faulty", 10, "1112"), answer("fair", 7))
    pair, counts = binarize(row, BinarizationRules())
    assert pair["chosen"][-1]["content"] == "fair"
    assert counts == Counter(score_10_to_1=1)
    pair, counts = binarize(row, BinarizationRules(repair_scores=False))
    assert pair["chosen"][-1]["content"] == "faulty"
    assert counts == Counter()


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        (rated(), {"too_few_scores": 1}),
        (rated(answer("a", 3)), {"too_few_scores": 1}),
        (rated(answer("a", 3), answer("b", None)), {"too_few_scores": 1, "unscored_completion": 1}),
        (rated(answer("same", 3), answer(" same\n", 4)), {"identical_text": 1}),
        (rated(answer("a", 3), answer(" ", 4)), {"empty_response": 1}),
        (rated(answer("", 3), answer("b", 4)), {"empty_response": 1}),
        (rated(answer("a", 3), answer("b", 4), prompt=" "), {"empty_prompt": 1}),
        (published(chosen="same", rejected="same"), {"identical_text": 1}),
        (published(rejected="\n"), {"empty_response": 1}),
        (published(score_chosen=None), {"missing_scores": 1}),
        (published(score_chosen=2.0), {"inverted_scores": 1}),
        (published(asked="Other?"), {"different_prompts": 1}),
        ({**published(), "rejected": []}, {"bad_roles": 1}),
        ({**published(), "chosen": published()["chosen"][:1]}, {"bad_roles": 1}),
    ],
)
def test_pairs_are_dropped_and_counted(row, counts):
    assert binarize(row, BinarizationRules()) == (None, Counter(counts))


def test_ties_stay_unless_told_otherwise():
    row = published(score_rejected=8.0)
    pair, counts = binarize(row, BinarizationRules())
    assert pair is not None
    assert counts == Counter(tie=1)
    assert binarize(row, BinarizationRules(keep_ties=False)) == (None, Counter(tie_dropped=1))


def test_a_pair_without_prompt_gets_it_from_the_turns():
    row = {key: value for key, value in published().items() if not key.startswith("prompt")}
    pair, _ = binarize(row, BinarizationRules())
    assert (pair["prompt"], pair["prompt_id"]) == ("Q?", prompt_digest("Q?"))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared samples are not here")
def test_real_pairs_pass_through():
    lines = (SHARED / "ultrafeedback_binarized_train_prefs_1000.jsonl").read_text().splitlines()
    made = [(json.loads(line), *binarize(json.loads(line), BinarizationRules())) for line in lines]
    counts = sum((count for _, _, count in made), Counter())
    assert counts == Counter(tie=110, identical_text=4, empty_response=2)
    for row, pair, _ in made:
        assert pair is None or all(pair[key] == row[key] for key in pair if key != "source")
