import doctest
from collections import Counter

import pytest
from raw_rows import messages, sharegpt, system, through, unfit

from zephyr_jax.data.raw import dialogues, schema
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.pairs import own_schemas as pair_schemas
from zephyr_jax.data.raw.schema import prompt_digest

TEXTS = ["Why?", "So.", "And then?", "That."]
SCHEMA = dialogues.own_schemas()["own"]


def convert(row, rules=None):
    """The record of a row and the counts; every example is checked on the way."""
    return through(dialogues.own_schemas(rules)["own"], row)


def test_docstrings_are_true():
    assert doctest.testmod(schema) == (0, 1)


ROWS = {
    "messages": {"messages": messages(*TEXTS)},
    "messages and other columns": {"messages": messages(*TEXTS), "prompt": "x", "id": 3, "data": 1},
    "sharegpt": {
        "conversations": sharegpt(*zip(("human", "gpt", "user", "bing"), TEXTS, strict=True))
    },
    "sharegpt with role and content": {"conversations": messages(*TEXTS)},
}


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_becomes_the_same_dialogue(shape):
    record = {"prompt": "Why?", "prompt_id": prompt_digest("Why?"), "messages": messages(*TEXTS)}
    assert convert(ROWS[shape]) == (record, Counter())


def test_alpaca_joins_input_and_puts_the_system_first():
    row = {"instruction": "Say:", "input": "Oui", "output": "Yes", "system": "Be brief."}
    record, _ = convert(row)
    assert record["messages"] == [system(), *messages("Say:\n\nOui", "Yes")]
    assert record["prompt"] == "Say:\n\nOui"
    assert convert({**row, "instruction": ""})[0]["prompt"] == "Oui"
    assert convert({**row, "instruction": "", "input": None}) == (None, Counter(empty_turn=1))
    record, _ = convert({**row, "history": [["Why?", "So."]]})
    assert record["messages"] == [system(), *messages("Why?", "So.", "Say:\n\nOui", "Yes")]
    row = {"messages": [system("Mine."), *messages("Why?", "So.")], "system": "Column."}
    assert convert(row)[0]["messages"][0] == system("Mine.")


@pytest.mark.parametrize("own_id", ["mine", "", None])
def test_the_prompt_id_of_the_row_stays(own_id):
    record, _ = convert({**ROWS["messages"], "prompt_id": own_id})
    assert record["prompt_id"] == (own_id or prompt_digest("Why?"))


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": []}, "empty_dialogue"),
        ({"messages": messages("Why?", " ")}, "empty_turn"),
        ({"messages": [*messages("Why?"), *messages("Why?", "So.")]}, "bad_roles"),
        ({"messages": messages("So.", "Why?", "That.", first="assistant")}, "bad_roles"),
        ({"messages": [system(), system(), *messages("Why?", "So.")]}, "bad_roles"),
        ({"prompt": "Why?", "completion": "So.", "label": False}, "label_false"),
    ],
)
def test_dialogues_are_dropped_and_counted(row, rule):
    assert convert(row) == (None, Counter([rule]))


def test_unanswered_questions_and_unasked_answers_are_cut_off():
    record, counts = convert({"messages": [*messages(*TEXTS), *messages("Eh?")]})
    assert record["messages"] == messages(*TEXTS)
    assert counts == Counter(trailing_user_turn=1)
    leading = [("system", "Be brief."), ("gpt", "Hello!"), ("human", "why?"), ("gpt", "So.")]
    row = {"conversations": sharegpt(*leading, ("human", " "))}
    record, counts = convert(row, CleaningRules())
    assert record["messages"] == [system(), *messages("Why?", "So.")]
    assert counts == Counter(leading_answer=1, trailing_user_turn=1, truecase=1)


def test_examples_show_what_a_rule_objected_to():
    row = {"messages": [*messages(*TEXTS), *messages("Eh?")]}
    record, _ = convert(row)
    texts = SCHEMA.texts(row, "trailing_user_turn")
    assert texts == [*SCHEMA.texts(record, "trailing_user_turn"), "user: Eh?"]
    row = {"messages": [*messages("Why?"), {"role": "tool", "content": "4"}]}
    assert SCHEMA.texts(row, "tool_turn") == ["tool: 4"]


def test_cleaning_is_off_by_default():
    row = {"messages": [system("be brief."), *messages("why?", "well. as an AI, so.")]}
    record, counts = convert(row)
    assert (record["messages"], counts) == (row["messages"], Counter())
    record, counts = convert(row, CleaningRules(drop_refusals=False))
    assert record["messages"] == [system("be brief."), *messages("Why?", "Well. As an AI, so.")]
    assert (record["prompt_id"], counts) == (prompt_digest("Why?"), Counter(truecase=1))
    assert convert(row, CleaningRules()) == (None, Counter(refusal=1))
    own = dialogues.own_schemas(CleaningRules())["own"]
    assert own.texts(row, "refusal")[0].startswith("As an AI: ")


def test_rows_of_pairs_do_not_fit():
    for key in ("chosen", "rejected"):
        assert not SCHEMA.fits({**ROWS["messages"], key: []})
    for row in ROWS.values():
        assert not pair_schemas()["own"].fits(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Why?"}, "missing_key:messages"),
        ({"messages": None}, "wrong_type:messages"),
        ({"messages": [{"role": None, "content": "Why?"}]}, "wrong_type:messages[0].role"),
        ({"instruction": "a", "output": None}, "wrong_type:output"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "wrong_type:history"),
        ({"prompt": "a", "completion": 3}, "wrong_type:completion"),
        ({"prompt": "a", "response": "b", "prompt_id": 3}, "wrong_type:prompt_id"),
    ],
)
def test_the_reason_of_an_unfit_dialogue_names_the_place(row, reason):
    assert unfit(SCHEMA, row) == reason


def test_ultrachat_rows_of_wrong_types_are_unfit():
    for name, row in {
        "raw": {"id": "0", "data": ["Why?", "So."]},
        "200k": {"prompt": "Why?", "prompt_id": "0", "messages": messages("Why?", "So.")},
    }.items():
        schema = dialogues.ultrachat_schemas()[name]
        assert unfit(schema, row) is None
        reasons = {unfit(schema, {**row, key: None}) for key in row}
        assert reasons == {f"wrong_type:{key}" for key in row}
