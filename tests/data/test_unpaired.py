"""Labeled answers, KTO's rows: every shape becomes one record, and a prompt is in one split."""

from collections import Counter

import pytest
from raw_rows import (
    everything,
    messages,
    of_parquet,
    report,
    sharegpt,
    system,
    through,
    unfit,
    write,
)

from zephyr_jax.__main__ import main
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw import dialogues
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.schema import prompt_digest

TURNS = messages("Why?", "So.")
ROWS = {
    "texts": {"prompt": "Why?", "completion": "So."},
    "response": {"prompt": "Why?", "response": "So."},
    "turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "turns and a text": {"prompt": TURNS[:1], "completion": "So."},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": sharegpt(("human", "Why?"), ("gpt", "So."))},
    "alpaca": {"instruction": "Why?", "output": "So."},
}


def convert(row, **rules):
    return through(dialogues.unpaired_schemas(BinarizationRules(**rules))["own"], row)


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_becomes_the_same_labeled_answer(shape):
    record = {"prompt": "Why?", "prompt_id": prompt_digest("Why?"), "messages": TURNS, "source": ""}
    for value, label in ((True, True), (1, True), (0.0, False), ("false", False)):
        counts = Counter(["desirable" if label else "undesirable"])
        for row in ({**ROWS[shape], "label": value}, {**ROWS[shape], "kto_tag": value}):
            assert convert(row) == ({**record, "label": label}, counts)
            [parquet, _] = of_parquet(row, {**row, "source": "x", "system": "y"})
            assert convert(parquet) == ({**record, "label": label}, counts)
    row = {**ROWS[shape], "label": True, "system": "Be brief.", "source": "web", "prompt_id": "7"}
    record, _ = convert(row)
    assert record["messages"] == [system(), *TURNS]
    assert (record["source"], record["prompt_id"]) == ("web", "7")
    assert convert(row, drop_sources=("web",)) == (None, Counter(source_dropped=1))


def test_a_prompt_of_several_turns_is_identified_by_all_of_them():
    rows = [{"messages": messages("Hi", text, "Why?", "So."), "label": True} for text in "ab"]
    one, other = (convert(row)[0] for row in rows)
    assert one["prompt"] == other["prompt"] == "Hi"
    assert one["prompt_id"] != other["prompt_id"]


@pytest.mark.parametrize("label", [None, 2, 0.5, "good", [True]])
def test_a_label_that_is_neither_true_nor_false_does_not_fit(label):
    schema = dialogues.unpaired_schemas()["own"]
    reason = f"not_true_or_false:label={label}"
    assert unfit(schema, {"prompt": "Why?", "completion": "So.", "label": label}) == reason
    assert unfit(schema, {"messages": TURNS}) == "missing_key:label"


def test_answers_to_a_prompt_are_in_one_split_and_both_labels_are_counted(tmp_path, capsys):
    texts = [{"prompt": f"Do {n // 3}", "completion": f"Done {n}."} for n in range(120)]
    rows = [text | {"label": n % 3 == 0} for n, text in enumerate(texts)]
    path = prepare("unpaired", write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "mine")
    assert report(path)["rules"] == {"undesirable": 80, "desirable": 40}
    splits = everything(path)
    assert sorted(splits) == ["test_prefs", "train_prefs"]
    prompts = [{record["prompt"] for record in records} for records in splits.values()]
    assert not prompts[0] & prompts[1]
    records = [record for split in splits.values() for record in split]
    assert len(records) == 120
    for record in records:
        answer = record["messages"][-1]["content"]
        assert record["label"] is (int(answer[5:-1]) % 3 == 0)
    main(["inspect_data", "set", str(path)])
    label = "desirable" if splits["train_prefs"][0]["label"] else "undesirable"
    assert f", {label}" in capsys.readouterr().out
