import doctest
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr_jax.data.raw import ratings
from zephyr_jax.data.raw.ratings import finite, mean_rating, repair_overall_score

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def answer(text, score, ratings="4454", wrap=False):
    held = [{"Rating": "N/A" if rating == "-" else rating} for rating in ratings]
    annotations = {
        aspect: [rating] if wrap else rating for aspect, rating in zip(ASPECTS, held, strict=True)
    }
    return {"response": text, "overall_score": score, "annotations": annotations}


def test_docstrings_are_true():
    result = doctest.testmod(ratings)
    assert result.attempted
    assert result.failed == 0


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
    made = [answer("a", 10, "45-4", wrap), {"response": "b"}, answer("c", None, "1---", wrap)]
    made[2]["annotations"]["honesty"] = None
    made[2]["fine-grained_score"] = 1.0
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"completions": made}]), buffer)
    [row] = pq.read_table(buffer).to_pylist()
    assert row["completions"][1]["annotations"] is None or not any(
        row["completions"][1]["annotations"].values()
    )
    for before, after in zip(made, row["completions"], strict=True):
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


def test_finite_takes_numbers_only():
    assert [finite(value) for value in (1, 2.5, True, "1", None, float("inf"))] == [
        1.0,
        2.5,
        *[None] * 4,
    ]
