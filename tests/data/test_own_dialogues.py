import doctest
import json
import pickle
import subprocess
import sys
from collections import Counter

import pytest
from own_rows import messages, of_parquet, sharegpt, system, through

from zephyr_jax.data.raw import own_dialogues as own_messages
from zephyr_jax.data.raw import own_pairs as own_preferences
from zephyr_jax.data.raw import turns
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.schema import prompt_digest

DIALOGUE = ["Why?", "So.", "And then?", "That."]


def chat(row, rules=None):
    """The record, the counts and what the report would show of each rule."""
    schema = own_messages.schemas(rules)["own"]
    return through(schema, row)


def test_docstrings_are_true():
    for module in (turns, own_messages, own_preferences):
        result = doctest.testmod(module)
        assert result.attempted
        assert result.failed == 0


CHATS = {
    "messages": {"messages": messages(*DIALOGUE)},
    "messages with a column beside": {"messages": messages(*DIALOGUE), "prompt": "x", "id": 3},
    "sharegpt": {
        "conversations": sharegpt(*zip(("human", "gpt", "user", "bing"), DIALOGUE, strict=True))
    },
    "sharegpt in our keys": {"conversations": messages(*DIALOGUE)},
    "messages in ShareGPT's keys": {
        "messages": sharegpt(*zip(("Human", "ChatGPT", "human", "bard"), DIALOGUE, strict=True))
    },
    "alpaca": {"instruction": "And then?", "output": "That.", "history": [["Why?", "So."]]},
    "alpaca with an empty input": {
        "instruction": "And then?",
        "input": " ",
        "output": "That.",
        "history": [["Why?", "So."]],
        "system": "",
    },
    "turns before and after": {
        "prompt": messages(*DIALOGUE[:3]),
        "completion": messages("That.", first="assistant"),
    },
    "turns before, text after": {"prompt": messages(*DIALOGUE[:3]), "response": "That."},
}


@pytest.mark.parametrize("shape", CHATS)
def test_every_shape_becomes_the_same_dialogue(shape):
    record, counts = chat(CHATS[shape])
    assert record == {
        "prompt": "Why?",
        "prompt_id": prompt_digest("Why?"),
        "messages": messages(*DIALOGUE),
    }
    assert list(record["messages"][0]) == ["role", "content"]
    assert counts == Counter()


def test_parquet_may_hold_several_shapes():
    # A column has one type, so lists and texts of prompts cannot meet in one.
    for row in of_parquet(
        *(row for row in CHATS.values() if not isinstance(row.get("prompt"), list))
    ):
        assert chat(row)[0]["messages"] == messages(*DIALOGUE)


def test_alpaca_joins_input_and_puts_the_system_first():
    row = {"instruction": "Say:", "input": "Oui", "output": "Yes", "system": "Be brief."}
    record, _ = chat(row)
    assert record["messages"] == [system(), *messages("Say:\n\nOui", "Yes")]
    assert record["prompt"] == "Say:\n\nOui"
    assert chat({**row, "instruction": ""})[0]["prompt"] == "Oui"
    assert chat({**row, "instruction": "", "input": None}) == (None, Counter(empty_turn=1))


def test_a_system_turn_of_its_own_wins():
    row = {"messages": [system("Mine."), *messages("Why?", "So.")], "system": "Column."}
    assert chat(row)[0]["messages"][0] == system("Mine.")


def test_the_row_may_bring_its_id():
    assert chat({**CHATS["messages"], "prompt_id": "mine"})[0]["prompt_id"] == "mine"
    for nothing in ("", None):
        record, _ = chat({**CHATS["messages"], "prompt_id": nothing})
        assert record["prompt_id"] == prompt_digest("Why?")


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": []}, "empty_dialogue"),
        ({"messages": [system()]}, "empty_dialogue"),
        ({"messages": messages("Why?")}, "empty_dialogue"),
        ({"messages": messages("Why?", " ")}, "empty_turn"),
        ({"messages": messages("", "So.")}, "empty_turn"),
        ({"messages": [*messages("Why?"), *messages("Why?", "So.")]}, "bad_roles"),
        (
            {"messages": [*messages("Why?", "So."), *messages("Why?"), *messages("Eh?")]},
            "bad_roles",
        ),
        ({"messages": messages("So.", "Why?", "That.", first="assistant")}, "bad_roles"),
        ({"messages": [*messages("Why?", "So."), system()]}, "bad_roles"),
        ({"messages": [system(), system(), *messages("Why?", "So.")]}, "bad_roles"),
        ({"messages": [*messages("Why?"), {"role": "tool", "content": "4"}]}, "unknown_role"),
        ({"conversations": sharegpt(("gpt", "a"), ("gpt", "b"))}, "bad_roles"),
        ({"conversations": sharegpt(("human", "a"), ("function_call", "b"))}, "unknown_role"),
        ({"prompt": "Why?", "completion": "So.", "label": False}, "label_false"),
    ],
)
def test_dialogues_are_dropped_and_counted(row, rule):
    assert chat(row) == (None, Counter([rule]))


def test_what_hangs_over_is_cut_off():
    trailing = [*messages(*DIALOGUE), *messages("Eh?")]
    record, counts = chat({"messages": trailing})
    assert record["messages"] == messages(*DIALOGUE)
    assert counts == Counter(trailing_user_turn=1)
    leading = [("system", "Be brief."), ("gpt", "Hello!"), ("human", "Why?"), ("gpt", "So.")]
    record, counts = chat({"conversations": sharegpt(*leading, ("human", " "))})
    assert record["messages"] == [system(), *messages("Why?", "So.")]
    assert counts == Counter(leading_answer=1, trailing_user_turn=1)


def test_the_report_shows_what_hung_over_and_whose_role_is_unknown():
    excerpt = own_messages.schemas()["own"].excerpt
    row = {"messages": [*messages(*DIALOGUE), *messages("Eh?")]}
    record, _ = chat(row)
    assert excerpt("trailing_user_turn", row, [record])[0] == ["assistant: That.", "user: Eh?"]
    row = {"messages": [*messages("Why?"), {"role": "tool", "content": "4"}]}
    assert excerpt("unknown_role", row, []) == (["tool: 4"], None)


def test_cleaning_is_off_until_it_is_asked_for():
    row = {"messages": [system("be brief."), *messages("why?", "well. as an AI, so.")]}
    record, counts = chat(row)
    assert [turn["content"] for turn in record["messages"]] == [
        t["content"] for t in row["messages"]
    ]
    assert counts == Counter()
    record, counts = chat(row, CleaningRules(drop_refusals=False))
    assert record["messages"] == [system("be brief."), *messages("Why?", "Well. As an AI, so.")]
    assert (record["prompt_id"], counts) == (prompt_digest("Why?"), Counter(truecase=1))
    schema = own_messages.schemas(CleaningRules(drop_refusals=False))["own"]
    assert schema.excerpt("truecase", row, [record]) == (["why?"], ["Why?"])
    assert chat(row, CleaningRules()) == (None, Counter(refusal=1))
    assert (
        own_messages.schemas(CleaningRules())["own"]
        .excerpt("refusal", row, [])[0][0]
        .startswith("As an AI: ")
    )


def test_pairs_are_no_dialogues():
    schema = own_messages.schemas()["own"]
    for extra in ("chosen", "rejected"):
        assert not schema.fits({**CHATS["messages"], extra: []})
    for row in CHATS.values():
        assert not own_preferences.schemas()["own"].fits(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "Why?"}, "wrong_type:messages"),
        ({"messages": None}, "wrong_type:messages"),
        (
            {"messages": [*messages("a", "b"), {"role": "user", "content": 3}]},
            "wrong_type:messages[2].content",
        ),
        ({"messages": ["Why?"]}, "wrong_type:messages[0]"),
        ({"messages": [{"role": None, "content": "Why?"}]}, "wrong_type:messages[0].role"),
        ({"messages": [{"role": "user", "text": "Why?"}]}, "missing_key:messages[0].content"),
        (
            {"conversations": [{"speaker": "a", "text": "b"}]},
            "unknown_keys:conversations[0]{speaker,text}",
        ),
        ({"conversations": [{"from": "human", "value": []}]}, "wrong_type:conversations[0].value"),
        ({"instruction": ["a"], "output": "b"}, "wrong_type:instruction"),
        ({"instruction": "a", "output": None}, "wrong_type:output"),
        ({"instruction": "a", "output": "b", "input": 3}, "wrong_type:input"),
        ({"instruction": "a", "output": "b", "system": 3}, "wrong_type:system"),
        ({"instruction": "a", "output": "b", "history": "c"}, "wrong_type:history"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"], ["e", 5]]},
            "wrong_type:history[1]",
        ),
        ({"prompt": "a", "completion": 3}, "wrong_type:completion"),
        (
            {"prompt": "a", "response": [{"role": "assistant", "content": 1}]},
            "wrong_type:response[0].content",
        ),
        ({"prompt": "a", "response": "b", "prompt_id": 3}, "wrong_type:prompt_id"),
    ],
)
def test_problems_of_dialogues_name_the_place(row, said):
    schema = own_messages.schemas()["own"]
    assert schema.unfit(row) == said


PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def test_schemas_say_what_they_want():
    chats, pairs = own_messages.schemas()["own"], own_preferences.schemas()["own"]
    assert chats.wanted.startswith("messages or conversations or instruction, output or ")
    assert pairs.wanted.startswith("prompt, chosen, rejected or question, chosen, rejected or ")
    assert pairs.unfit({"prompt": "Why?", "chosen": "So."}) == "missing_key:rejected"
    assert chats.unfit({"instruction": "Why?"}) == "missing_key:messages"


def test_schemas_travel_and_need_neither_jax_nor_tfds():
    for schema in (own_messages.schemas()["own"], own_preferences.schemas()["own"]):
        again = pickle.loads(pickle.dumps(schema))
        row = PAIR if "chosen" in schema.wanted else CHATS["messages"]
        assert again.convert(row) == schema.convert(row)
        json.dumps(schema.rules)
    program = (
        "import sys, zephyr_jax.data.raw.own_dialogues, "
        "zephyr_jax.data.raw.own_pairs, "
        "zephyr_jax.data.raw.ultrafeedback; "
        "print([m for m in ('jax', 'tensorflow_datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
