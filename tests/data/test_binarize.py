import doctest
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr_jax.data.raw import binarize as binarization
from zephyr_jax.data.raw import schema
from zephyr_jax.data.raw.binarize import (
    PAIRINGS,
    TIES,
    BinarizationRules,
    binarize,
    mean_rating,
    repair_overall_score,
)
from zephyr_jax.data.raw.schema import prompt_digest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared samples")
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
MODES = [(pairing, ties) for pairing in PAIRINGS for ties in TIES]


def answer(text, score, ratings="4454", wrap=False):
    held = [{"Rating": "N/A" if rating == "-" else rating} for rating in ratings]
    annotations = {
        aspect: [rating] if wrap else rating for aspect, rating in zip(ASPECTS, held, strict=True)
    }
    return {"response": text, "overall_score": score, "annotations": annotations}


def rated(*answers, prompt="Q?"):
    return {"instruction": prompt, "source": "flan", "completions": list(answers)}


def texts(pairs):
    return [(p["chosen"][-1]["content"], p["rejected"][-1]["content"]) for p in pairs]


def only(result):
    [pair], counts = result
    return pair, counts


def generated(count, seed=0):
    """Rows with holes, ties, faulty tens, twins and blanks."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        answers = []
        for _ in range(draw.integers(0, 6)):
            score = draw.choice([None, 3, 4.5, 8, 8, 9.5, 10, float("nan")])
            text = str(draw.choice(["a", "b", "c ", "c", "d", "e", "f", "g", " "]))
            ratings = str(draw.choice(["1111", "33-4", "4454", "5435", "5444", "----"]))
            answers.append(answer(text, score, ratings, bool(draw.integers(2))))
            if draw.integers(4) == 0:
                answers[-1]["annotations"] = None
        yield rated(*answers, prompt=f"Question {number}?")


def scores_of(row, rules):
    """The answers that have a score, as (score, text, mean), by another way than the library's."""
    found = []
    for completion in row["completions"]:
        mean = mean_rating(completion)
        if rules.criterion == "mean_rating":
            score = mean
        else:
            score = repair_overall_score(completion)[0]
            if not rules.repair_scores:
                score = completion["overall_score"]
        if score is not None and score == score:
            found.append((float(score), completion["response"], mean))
    return found


def allowed(row, rules):
    """The meetings that the definition of a pairing allows, as unordered pairs of answers."""
    answers = scores_of(row, rules)
    if len(answers) < 2:
        return []
    if rules.pairing == "all":
        return [list(itertools.combinations(answers, 2))]
    top, low = max(a[0] for a in answers), min(a[0] for a in answers)
    first = next(i for i, a in enumerate(answers) if a[0] == top)
    last = max(i for i, a in enumerate(answers) if a[0] == low)
    others = [last] if rules.pairing == "best_vs_worst" else range(len(answers))
    return [[(answers[first], answers[i])] for i in others if i != first]


def outcome(met, rules):
    """What one meeting must become: the set of (chosen, rejected) that may come out, and a rule."""
    (one, two), ties = met, rules.ties
    if not one[1].strip() or not two[1].strip():
        return set(), "empty_response"
    if one[1].strip() == two[1].strip():
        return set(), "identical_text"
    if one[0] != two[0]:
        return {(one[1], two[1]) if one[0] > two[0] else (two[1], one[1])}, None
    if ties == "keep":
        as_met = {(one[1], two[1])}
        return as_met | {(two[1], one[1])} if rules.pairing == "all" else as_met, "tie"
    if ties == "drop" or None in (one[2], two[2]) or one[2] == two[2]:
        return set(), "tie_dropped"
    return {(one[1], two[1]) if one[2] > two[2] else (two[1], one[1])}, "tie_by_rating"


def holds(row, rules):
    """Whether the pairs of a row are what one of the allowed meetings makes them."""
    pairs, counts = binarize(row, rules)
    about_pairs = ("empty_response", "identical_text", "tie", "tie_dropped", "tie_by_rating")
    found = Counter({rule: counts[rule] for rule in about_pairs if counts[rule]})
    plans = allowed(row, rules)
    if not plans:
        return not pairs and counts["too_few_scores"] == 1 and not found
    for meetings in plans:
        wanted = [outcome(met, rules) for met in meetings]
        results = Counter(map(frozenset, texts(pairs)))
        expected = Counter(frozenset(next(iter(out))) for out, _ in wanted if out)
        ways = set().union(*(out for out, _ in wanted))
        same = results == expected and all(pair in ways for pair in texts(pairs))
        if same and found == Counter(rule for _, rule in wanted if rule):
            return True
    return False


def test_docstrings_are_true():
    for module in (binarization, schema):
        result = doctest.testmod(module)
        assert result.attempted
        assert result.failed == 0


@pytest.mark.parametrize(("pairing", "ties"), MODES)
@pytest.mark.parametrize("criterion", ["overall_score", "mean_rating"])
def test_every_mode_keeps_its_definition(pairing, ties, criterion):
    seen = Counter()
    for repair in (True, False):
        rules = BinarizationRules(criterion, pairing, ties, repair_scores=repair)
        for row in generated(200, seed=len(pairing)):
            assert holds(row, rules), row
            pairs, counts = binarize(row, rules)
            seen.update(counts)
            for pair in pairs:
                assert pair["score_chosen"] >= pair["score_rejected"]
                assert all(
                    isinstance(pair[f"score_{key}"], float) for key in ("chosen", "rejected")
                )
                answers = {(text, score) for score, text, _ in scores_of(row, rules)}
                for key in ("chosen", "rejected"):
                    assert (pair[key][-1]["content"], pair[f"score_{key}"]) in answers
    assert seen["identical_text"]
    assert seen["too_few_scores"]
    assert seen["unscored_completion"]
    assert seen["tie" if ties == "keep" else "tie_dropped"]
    # Equal mean ratings cannot tell between themselves.
    decided = (ties, criterion) == ("mean_rating", "overall_score")
    assert bool(seen["tie_by_rating"]) == decided


@pytest.mark.parametrize(("pairing", "ties"), MODES)
def test_the_order_of_distinct_answers_does_not_matter(pairing, ties):
    rules = BinarizationRules(pairing=pairing, ties=ties, repair_scores=False)
    for number, order in enumerate(itertools.permutations(range(4))):
        for prompt in ("One?", "Two?", "Three?"):
            answers = [answer(f"text {i}", (5, 7.5, 3, 9)[i]) for i in range(4)]
            straight = binarize(rated(*answers, prompt=prompt), rules)
            mixed = binarize(rated(*(answers[i] for i in order), prompt=prompt), rules)
            assert mixed == straight, number


@pytest.mark.parametrize("ties", TIES)
def test_all_pairs_do_not_depend_on_order_even_with_ties(ties):
    rules = BinarizationRules(pairing="all", ties=ties)
    answers = [answer(f"text {i}", (8, 8, 3, 8)[i], f"44{i + 1}4") for i in range(4)]
    results = [binarize(rated(*order), rules) for order in itertools.permutations(answers)]
    assert all(result == results[0] for result in results)
    assert len(results[0][0]) == {"keep": 6, "drop": 3, "mean_rating": 6}[ties]


def test_kept_ties_of_all_pairs_fall_both_ways():
    rules = BinarizationRules(pairing="all")
    answers = answer("a", 8), answer("b", 8)
    results = [binarize(rated(*answers, prompt=f"Q{n}"), rules) for n in range(200)]
    fallen = Counter(pair for pairs, _ in results for pair in texts(pairs))
    assert set(fallen) == {("a", "b"), ("b", "a")}
    assert 70 < fallen["a", "b"] < 130
    other = BinarizationRules(pairing="all", seed=1)
    assert results != [binarize(rated(*answers, prompt=f"Q{n}"), other) for n in range(200)]
    assert [counts for _, counts in results] == [Counter(tie=1)] * 200


def test_the_first_maximum_is_chosen_and_any_other_rejected():
    seen = Counter()
    for number in range(300):
        row = rated(
            answer("a", 3), answer("b", 9), answer("c", 9), answer("d", 5), prompt=f"Q{number}"
        )
        pair, counts = only(binarize(row, BinarizationRules()))
        assert pair["chosen"][-1]["content"] == "b"
        assert pair["score_chosen"] == 9.0
        rejected = pair["rejected"][-1]["content"]
        assert pair["score_rejected"] == {"a": 3.0, "c": 9.0, "d": 5.0}[rejected]
        assert counts == (Counter(tie=1) if rejected == "c" else Counter())
        seen[rejected] += 1
    assert all(70 < seen[text] < 130 for text in "acd")


def test_the_draw_depends_on_seed_and_prompt():
    answers = [answer(text, score) for text, score in zip("abcd", (3, 9, 4, 5), strict=True)]
    prompts = [f"Q{number}" for number in range(40)]

    def draws(seed):
        rules = BinarizationRules(seed=seed)
        pairs = [binarize(rated(*answers, prompt=prompt), rules)[0] for prompt in prompts]
        return [pair["rejected"][-1]["content"] for [pair] in pairs]

    # Written down: the same set prepared elsewhere must not come out different.
    assert "".join(draws(0)[:12]) == "dacdadaddcdc"
    assert draws(0) != draws(1)


def test_the_pair_has_the_published_columns():
    pair, _ = only(binarize(rated(answer("bad", 3), answer("good", 8)), BinarizationRules()))
    question = {"role": "user", "content": "Q?"}
    assert pair == {
        "prompt": "Q?",
        "prompt_id": prompt_digest("Q?"),
        "chosen": [question, {"role": "assistant", "content": "good"}],
        "rejected": [question, {"role": "assistant", "content": "bad"}],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
        "source": "flan",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "best"}, "criterion 'best' .*overall_score, mean_rating"),
        ({"pairing": "worst"}, "pairing 'worst' .*random, best_vs_worst, all"),
        ({"ties": True}, "ties True .*keep, drop, mean_rating"),
        ({"drop_sources": "truthful_qa"}, r'drop_sources=.*\("truthful_qa",\)'),
        ({"drop_sources": ("",)}, "drop_sources"),
    ],
)
def test_rules_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as stop:
        BinarizationRules(**options)
    assert "\n" not in str(stop.value)


def test_the_repair_changes_who_is_chosen():
    row = rated(answer("faulty", 10, "1112"), answer("fair", 7))
    pair, counts = only(binarize(row, BinarizationRules()))
    assert pair["chosen"][-1]["content"] == "fair"
    assert counts == Counter(score_10_to_1=1)
    pair, counts = only(binarize(row, BinarizationRules(repair_scores=False)))
    assert pair["chosen"][-1]["content"] == "faulty"
    assert counts == Counter()


def test_sources_are_dropped_by_name():
    rules = BinarizationRules(drop_sources=("truthful_qa", "flan"))
    row = rated(answer("a", 3), answer("b", 10, "----"))
    assert binarize(row, rules) == ([], Counter(source_dropped=1))
    assert only(binarize({**row, "source": "flan_v2"}, rules))[1] == Counter(score_10_unrated=1)
    for source in (None, ""):
        _, counts = only(binarize({**row, "source": source}, rules))
        assert counts == Counter(source_missing=1, score_10_unrated=1)


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
    ],
)
def test_pairs_are_dropped_and_counted(row, counts):
    assert binarize(row, BinarizationRules()) == ([], Counter(counts))


@pytest.mark.parametrize("wrap", [False, True])
def test_mean_rating_reads_both_releases(wrap):
    assert mean_rating(answer("", 1, "4454", wrap)) == 4.25
    assert mean_rating(answer("", 1, "-45-", wrap)) == 4.5
    assert mean_rating(answer("", 1, "----", wrap)) is None


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        (None, None),
        ({}, None),
        ([], None),
        ("4", None),
        ([{"a": {"Rating": "4"}}], 4.0),
        ({"a": [], "b": None, "c": {}, "d": {"Rating": 5}, "e": [None]}, 5.0),
        ({"a": {"Rating": None}, "b": {"Rating": " 3 "}, "c": {"Rating": 4.0}}, 3.5),
        ({"a": {"Rating": "6"}, "b": {"Rating": "0"}, "c": {"Rating": "2.5"}}, None),
    ],
)
def test_mean_rating_survives_holes(annotations, expected):
    assert mean_rating({"annotations": annotations}) == expected
    assert mean_rating({}) is None


@pytest.mark.parametrize("wrap", [False, True])
def test_parquet_keeps_the_ratings(wrap):
    answers = [answer("a", 10, "45-4", wrap), {"response": "b"}, answer("c", None, "1---", wrap)]
    answers[2]["annotations"]["honesty"] = None
    answers[2]["fine-grained_score"] = 1.0
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"completions": answers}]), buffer)
    [row] = pq.read_table(buffer).to_pylist()
    assert row["completions"][1]["annotations"] is None or not any(
        row["completions"][1]["annotations"].values()
    )
    for before, after in zip(answers, row["completions"], strict=True):
        assert mean_rating(after) == mean_rating(before)
        assert repair_overall_score(after) == repair_overall_score(before)
    assert mean_rating(row["completions"][0]) == pytest.approx(13 / 3)


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
        ({"overall_score": "N/A"}, (None, None)),
    ],
)
def test_repair_overall_score(completion, expected):
    assert repair_overall_score(completion) == expected


@needs_samples
@pytest.mark.parametrize(("pairing", "ties"), MODES)
def test_real_ratings_keep_every_definition(pairing, ties):
    lines = (SHARED / "ultrafeedback_like_mtbench_320.jsonl").read_text().splitlines()
    rules = BinarizationRules(pairing=pairing, ties=ties)
    results = Counter()
    for line in lines:
        row = json.loads(line)
        assert holds(row, rules)
        results["pairs"] += len(binarize(row, rules)[0])
    if ties == "keep":
        assert results["pairs"] > (1900 if pairing == "all" else 310)
    else:
        assert results["pairs"] < (1900 if pairing == "all" else 310)
