"""Replies of judges, in every form in which they come."""

import pytest

from zephyr_jax.feedback.judges import FORMS, judge_chat, read_ratings, shown_order

READABLE = {
    "JSON": '{"ratings": [{"answer": 2, "rating": "3"}, {"answer": 1, "rating": 5}]}',
    "JSON in a fence": (
        'Here:\n```json\n{"ratings": [{"answer": 1, "rating": "5"}, '
        '{"answer": 2, "rating": "3"}]}\n```'
    ),
    "lines": (
        "Answer 1\nRating: 5\nRationale: Good.\n\nAnswer 2\nRating: 3\nRationale: So so.\nReally."
    ),
    "marked lines": (
        "**Answer 1**\n- **Rating:** 5/5\n- **Rationale:** x\n\n### Answer 2:\nRating: [3]\n"
    ),
    "other words": (
        "#### Output for Text 1\nRating: 5.0\nRationale: a\n"
        "#### Output for Text 2\nRating: 3\nRationale: b"
    ),
}


@pytest.mark.parametrize("name", READABLE)
def test_ratings_are_read(name):
    ratings = read_ratings(FORMS["honesty"], READABLE[name], 2)
    assert ratings is not None
    assert [rating.number for rating in ratings] == [5, 3]


UNREADABLE = {
    "one is missing": "Answer 1\nRating: 5",
    "beyond the scale": "Answer 1\nRating: 5\nAnswer 2\nRating: 6",
    "words": "Both are fine.",
    "cut": '{"ratings": [{"answer": 1, "rating": "5"}, {"answer": 2, "rat',
    "a number in passing": "Answer 1\nRating: about 5\nAnswer 2\nRating: 4 or 5",
    "nothing": "",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_does_not_rate_every_answer_is_not_guessed(name):
    assert read_ratings(FORMS["honesty"], UNREADABLE[name], 2) is None


def test_not_applicable_types_and_scores_to_ten_are_read():
    text = "Answer 1\nType: contradicts itself; contradicts the world\nRating: N/A\nRationale: r"
    (rating,) = read_ratings(FORMS["truthfulness"], text, 1) or [None]
    assert rating is not None
    assert rating.number is None
    assert rating.types == ["contradicts itself", "contradicts the world"]
    assert read_ratings(FORMS["overall"], "Answer 1\nScore: 10/10\nCritique: c", 1) == [
        (10, "c", [])
    ]


def test_orders_are_random_seeded_and_reversed_every_second_time():
    orders = [shown_order(0, str(i), "honesty", 0, 4) for i in range(400)]
    firsts = [order[0] for order in orders]
    assert all(60 < firsts.count(k) < 140 for k in range(4))
    assert shown_order(0, "7", "honesty", 1, 4) == orders[7][::-1]
    assert orders == [shown_order(0, str(i), "honesty", 0, 4) for i in range(400)]
    assert orders != [shown_order(1, str(i), "honesty", 0, 4) for i in range(400)]


def test_the_judge_reads_the_answers_in_their_order_and_the_form():
    system, user = judge_chat(FORMS["helpfulness"], "Why?", ["B", "A"], as_json=True)
    assert user["content"] == "[Instruction]\nWhy?\n\n[Answer 1]\nB\n\n[Answer 2]\nA"
    assert '"types"' in system["content"]
    text = judge_chat(FORMS["overall"], "Why?", ["B"], as_json=False)[0]["content"]
    assert "1 to 10" in text
    assert "Rating: ..." in text
