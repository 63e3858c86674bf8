import json
from collections import Counter

import pytest
from own_rows import messages, of_parquet, sharegpt, system, through

from zephyr_jax.data.raw import own_pairs as own_preferences
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.schema import prompt_digest

ASK, GOOD, BAD = messages("Why?")[0], *(messages("", text)[1] for text in ("So.", "No."))
PAIRS = {
    "texts": {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    "question": {"question": "Why?", "chosen": "So.", "rejected": "No."},
    "whole lists": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "whole lists and a prompt": {"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "whole lists and their beginning": {
        "prompt": [ASK],
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
    },
    "answers behind turns": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "answers behind a text": {"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]},
    "argilla": {"instruction": "Why?", "chosen_response": "So.", "rejected_response": "No."},
    "argilla's question": {
        "question": "Why?",
        "chosen_response": "So.",
        "rejected_response": "No.",
    },
    "sharegpt": {
        "conversations": sharegpt(("human", "Why?")),
        "chosen": sharegpt(("gpt", "So."))[0],
        "rejected": sharegpt(("gpt", "No."))[0],
    },
    "transcripts": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.\n",
    },
    "transcript and answers": {
        "prompt": "\n\nHuman: Why?\n\nAssistant:",
        "chosen": "So.",
        "rejected": "No.",
    },
}


def pair(row, **rules):
    return through(own_preferences.schemas(BinarizationRules(**rules))["own"], row)


@pytest.mark.parametrize("shape", PAIRS)
def test_every_shape_becomes_the_same_pair(shape):
    record, counts = pair(PAIRS[shape])
    assert record == {
        "prompt": "Why?",
        "prompt_id": prompt_digest("Why?"),
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "score_chosen": 0.0,
        "score_rejected": 0.0,
        "source": "",
    }
    assert counts == Counter()
    # No score is no tie.
    assert pair(PAIRS[shape], ties="drop") == (record, Counter())


@pytest.mark.parametrize("shape", PAIRS)
def test_parquet_changes_no_pair(shape):
    [row, _] = of_parquet(PAIRS[shape], {**PAIRS[shape], "score_chosen": 1.0, "source": "x"})
    assert pair(row) == pair(PAIRS[shape])


def test_scores_of_pairs():
    row = PAIRS["texts"]
    scored = {**row, "score_chosen": 8, "score_rejected": 3.5}
    record, counts = pair(scored)
    assert (record["score_chosen"], record["score_rejected"], counts) == (8.0, 3.5, Counter())
    assert type(record["score_chosen"]) is float
    assert pair({**scored, "score_chosen": 3}) == (None, Counter(inverted_scores=1))
    tied = {**scored, "score_chosen": 3.5}
    assert pair(tied)[1] == Counter(tie=1)
    assert pair(tied, ties="drop") == (None, Counter(tie_dropped=1))
    for hole in (None, float("nan")):
        record, counts = pair({**scored, "score_chosen": hole})
        assert (record["score_chosen"], record["score_rejected"]) == (0.0, 0.0)
        assert counts == Counter(unscored_pair=1)
    assert pair({**row, "score_chosen": None, "score_rejected": None})[1] == Counter()


def test_prompts_of_several_turns():
    before = messages("Hi", "Hello", "Why?")
    row = {"prompt": before, "chosen": [GOOD], "rejected": [BAD], "source": "mine"}
    record, _ = pair(row)
    said = json.dumps(before, sort_keys=True, separators=(",", ":"))
    assert (record["prompt"], record["prompt_id"]) == ("Hi", prompt_digest(said))
    assert record["source"] == "mine"
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "
    assert pair({"chosen": talk + "So.", "rejected": talk + "No.", "source": "mine"})[0] == record
    spoken = sharegpt(("human", "Hi"), ("gpt", "Hello"), ("human", "Why?"))
    answers = {"chosen": sharegpt(("gpt", "So.")), "rejected": sharegpt(("gpt", "No."))}
    assert pair({"conversations": spoken, **answers, "source": "mine"})[0] == record
    assert pair({**row, "prompt_id": "mine"})[0]["prompt_id"] == "mine"


@pytest.mark.parametrize("shape", PAIRS)
def test_a_system_column_comes_first(shape):
    record, _ = pair({**PAIRS[shape], "system": "Be brief."})
    assert record["chosen"] == [system(), ASK, GOOD]
    assert record["rejected"] == [system(), ASK, BAD]
    assert (record["prompt"], record["prompt_id"]) == ("Why?", prompt_digest("Why?"))


def test_an_input_follows_its_instruction():
    row = {"instruction": "Say:", "input": "Oui", "chosen": "Yes", "rejected": "No"}
    assert pair(row)[0]["prompt"] == "Say:\n\nOui"
    assert pair({**row, "input": None})[0]["prompt"] == "Say:"


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "Why?", "chosen": "a", "rejected": " "}, "empty_response"),
        ({"prompt": "Why?", "chosen": "a", "rejected": " a\n"}, "identical_text"),
        ({"chosen": [ASK, GOOD], "rejected": [messages("Who?")[0], BAD]}, "different_prompts"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "different_prompts",
        ),
        (
            {"prompt": [ASK], "chosen": [messages("Who?")[0], GOOD], "rejected": [ASK, BAD]},
            "bad_roles",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "bad_roles"),
        ({"prompt": "Why?", "chosen": [], "rejected": [BAD]}, "bad_roles"),
        (
            {"prompt": [ASK], "chosen": [{"role": "tool", "content": "4"}], "rejected": [BAD]},
            "unknown_role",
        ),
        ({**PAIRS["texts"], "source": "flan"}, "source_dropped"),
    ],
)
def test_own_pairs_are_dropped_and_counted(row, rule):
    sources = {"drop_sources": ("flan",)} if rule == "source_dropped" else {}
    assert pair(row, **sources) == (None, Counter([rule]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "missing_key:prompt"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "missing_key:prompt"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "b"}, "missing_key:prompt"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type:prompt"),
        ({"question": ["a"], "chosen": "a", "rejected": "b"}, "wrong_type:question[0]"),
        ({"prompt": "Why?", "chosen": None, "rejected": "b"}, "wrong_type:chosen"),
        ({"prompt": "Why?", "chosen": "a", "rejected": [3]}, "wrong_type:rejected[0]"),
        (
            {"prompt": "Why?", "chosen": {"text": "a"}, "rejected": "b"},
            "unknown_keys:chosen[0]{text}",
        ),
        ({"conversations": "Why?", "chosen": "a", "rejected": "b"}, "wrong_type:conversations"),
        (
            {"instruction": "Why?", "chosen_response": "a", "rejected_response": 3},
            "wrong_type:rejected_response",
        ),
        ({**PAIRS["texts"], "score_rejected": True}, "wrong_type:score_rejected"),
        ({**PAIRS["texts"], "score_chosen": "8"}, "wrong_type:score_chosen"),
        ({**PAIRS["texts"], "source": 3}, "wrong_type:source"),
        ({**PAIRS["texts"], "prompt_id": 3}, "wrong_type:prompt_id"),
    ],
)
def test_problems_of_pairs_name_the_place(row, said):
    schema = own_preferences.schemas()["own"]
    assert schema.unfit(row) == said
