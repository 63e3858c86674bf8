"""Replies of judges, in every form in which they come."""

import pytest

from zephyr_jax.feedback.judges import FORMS, read_ratings, shown_order

BOTH = '{"ratings": [{"answer": 1, "rating": "5"}, {"answer": 2, "rating": "3"}'
REPLIES = {
    "JSON": (f"{BOTH}]}}", [5, 3]),
    "JSON in a fence, after a thought": (f"<think>{{?</think>A:\n```json\n{BOTH}]}}\n```", [5, 3]),
    "a list": ('[{"answer": 2, "rating": 3}, {"answer": "1", "rating": 5}]', [5, 3]),
    "lines": ("Answer 1\nRating: 5\nRationale: x\n\nAnswer 2\nRating: 3\nRationale: y.\nz", [5, 3]),
    "marked lines": ("**Answer 1**\n- **Rating:** 5/5\n\n### Answer 2:\nRating: [3]\n", [5, 3]),
    "other words": ("#### Output for Text 1\nScore: 5.0\n#### Response 2\nRating: 3", [5, 3]),
    "one is missing": ("Answer 1\nRating: 5", None),
    "beyond the scale": ("Answer 1\nRating: 5\nAnswer 2\nRating: 6", None),
    "words": ("Both are fine.", None),
    "cut": (BOTH, None),
    "a number in passing": ("Answer 1\nRating: about 5\nAnswer 2\nRating: 4 or 5", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("name", REPLIES)
def test_ratings_are_read_and_not_guessed(name):
    text, expected = REPLIES[name]
    ratings = read_ratings(FORMS["honesty"], text, 2)
    assert (ratings and [rating.number for rating in ratings]) == expected


def test_not_applicable_types_and_scores_to_ten_are_read():
    text = "Answer 1\nType: contradicts itself; contradicts the world\nRating: N/A\nRationale: r"
    types = ["contradicts itself", "contradicts the world"]
    assert read_ratings(FORMS["truthfulness"], text, 1) == [(None, "r", types)]
    text = "Answer 1\nScore: 10/10\nCritique: c"
    assert read_ratings(FORMS["overall"], text, 1) == [(10, "c", [])]


def test_orders_are_random_seeded_and_reversed_every_second_time():
    orders = [shown_order(0, str(i), "honesty", 0, 4) for i in range(400)]
    firsts = [order[0] for order in orders]
    assert all(60 < firsts.count(k) < 140 for k in range(4))
    assert shown_order(0, "7", "honesty", 1, 4) == orders[7][::-1]
    assert orders == [shown_order(0, str(i), "honesty", 0, 4) for i in range(400)]
    assert orders != [shown_order(1, str(i), "honesty", 0, 4) for i in range(400)]
