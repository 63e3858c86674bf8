"""Published pairs in all their variants become the same pairs."""

import dataclasses
import doctest
import hashlib
import io
import json
import pickle
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr_jax.data.raw import sources, ultrachat, ultrafeedback
from zephyr_jax.data.raw.binarize import BinarizationRules, binarize, check_pair, exchange
from zephyr_jax.data.raw.schema import prompt_digest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SHARED.exists(), reason="the shared samples are not here")
PAIR = {
    "prompt": "Q?",
    "prompt_id": prompt_digest("Q?"),
    "chosen": exchange("Q?", "good"),
    "rejected": exchange("Q?", "bad"),
    "score_chosen": 8.0,
    "score_rejected": 3.0,
}
H4 = {**PAIR, "messages": PAIR["chosen"]}
RATED = {
    "instruction": "Q?",
    "completions": [
        {"response": text, "overall_score": score}
        for text, score in zip("abc", (3, 8, 8), strict=True)
    ],
}


def only(result):
    [pair], counts = result
    return pair, counts


def test_a_prompt_of_several_turns_is_named_by_all_of_them():
    before = [("user", "Hi"), ("assistant", "Hé"), ("user", "Q?")]
    turns = [{"content": text, "role": role} for role, text in before]
    row = {key: [*turns, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    pair, _ = only(check_pair(row, BinarizationRules(), scored=False))
    said = ",".join(f'{{"content":"{text}","role":"{role}"}}' for role, text in before)
    assert pair["prompt_id"] == hashlib.sha256(f"[{said}]".encode()).hexdigest()
    assert pair["prompt"] == "Hi"
    given, _ = only(check_pair({**row, "prompt_id": "mine"}, BinarizationRules(), scored=False))
    assert given["prompt_id"] == "mine"


def test_a_pair_without_prompt_gets_it_from_the_turns():
    row = {key: value for key, value in H4.items() if not key.startswith("prompt")}
    pair, _ = only(check_pair(row, BinarizationRules()))
    assert (pair["prompt"], pair["prompt_id"]) == ("Q?", prompt_digest("Q?"))


def test_ties_of_ready_pairs_stay_unless_told_otherwise():
    row = {**H4, "score_rejected": 8.0}
    assert only(check_pair(row, BinarizationRules()))[1] == Counter(tie=1)
    for ties in ("drop", "mean_rating"):
        assert check_pair(row, BinarizationRules(ties=ties)) == ([], Counter(tie_dropped=1))
    assert only(check_pair(row, BinarizationRules(ties="drop"), scored=False))[1] == Counter()


def convert(row, **rules):
    schema = ultrafeedback.schemas(BinarizationRules(**rules))["binarized"]
    assert schema.fits(row)
    assert schema.problem(row) is None
    made = schema.convert(row)
    schema.excerpt("any", row, made[0])
    return made


ARGILLA = {
    "source": "flan_v2_cot",
    "instruction": "Q?",
    "chosen_response": "good",
    "rejected_response": "bad",
    "chosen_avg_rating": 8.0,
    "rejected_avg_rating": 3.0,
    "chosen_model": "gpt-4",
}
CLEANED = {
    "source": "flan_v2_cot",
    "prompt": "Q?",
    "chosen": PAIR["chosen"],
    "chosen-rating": 8.0,
    "chosen-model": "gpt-4",
    "rejected": PAIR["rejected"],
    "rejected-rating": 3.0,
    "rejected-model": "bard",
}
VARIANTS = {
    "h4": H4,
    "trl": {key: value for key, value in PAIR.items() if not key.startswith("prompt")},
    "argilla": ARGILLA,
    "cleaned": CLEANED,
    "allenai": {**H4, "source": "flan_v2_cot"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_published_variant_becomes_the_same_pair(variant):
    row = VARIANTS[variant]
    source = row.get("source", "")
    pair, counts = only(convert(row))
    assert pair == {**PAIR, "source": source}
    assert counts == Counter()
    rules = {"drop_sources": ("flan_v2_cot",)}
    dropped = convert(row, **rules)
    assert dropped[1] == (Counter(source_dropped=1) if source else Counter(source_missing=1))
    assert bool(dropped[0]) == (not source)


@pytest.mark.parametrize("variant", ["argilla", "cleaned"])
def test_ratings_of_the_variants_are_their_scores(variant):
    keys = {"argilla": "chosen_avg_rating", "cleaned": "chosen-rating"}
    tied = {**VARIANTS[variant], keys[variant]: 3.0}
    assert only(convert(tied))[1] == Counter(tie=1)
    assert convert(tied, ties="drop") == ([], Counter(tie_dropped=1))
    assert convert({**tied, keys[variant]: None}) == ([], Counter(missing_scores=1))
    assert convert({**tied, keys[variant]: 1}) == ([], Counter(inverted_scores=1))


def test_schemas_say_what_is_wrong():
    raw, ready = (ultrafeedback.schemas()[name] for name in ("raw", "binarized"))
    row = {**RATED, "completions": [RATED["completions"][0], {"response": None}]}
    assert raw.problem(row) == "wrong_type:completions[1].response"
    assert raw.problem({**row, "completions": ["a"]}) == "wrong_type:completions[0]"
    assert raw.problem({**row, "completions": None}) == "wrong_type:completions"
    assert raw.problem({**row, "instruction": None}) == "wrong_type:instruction"
    assert ready.problem({**ARGILLA, "rejected_response": None}) == "wrong_type:rejected_response"
    assert ready.problem({**ARGILLA, "source": 3}) == "wrong_type:source"
    assert ready.problem({**H4, "chosen": "good"}) == "wrong_type:chosen"
    assert ready.problem({**H4, "prompt": 3}) == "wrong_type:prompt"
    assert not ready.fits({"prompt": "Q?", "chosen": "a", "rejected": "b"})
    assert ready.unfit({**CLEANED, "chosen-rating": 1}) is None
    assert "instruction, chosen_response" in ready.wanted


def test_schemas_travel_to_other_processes():
    rules = BinarizationRules(pairing="all", drop_sources=("x",))
    for schema in ultrafeedback.schemas(rules).values():
        again = pickle.loads(pickle.dumps(schema))
        assert again.rules == schema.rules
        json.dumps(schema.rules)
    row = RATED
    schema = pickle.loads(pickle.dumps(ultrafeedback.schemas(rules)["raw"]))
    pairs, counts = schema.convert(row)
    assert (pairs, counts) == binarize(row, rules)
    assert schema.rules == dataclasses.asdict(rules)
    shown, after = schema.excerpt("tie", row, pairs)
    assert len(shown) == 3
    assert sorted(after) == ["8.0: b", "8.0: c"]


@needs_samples
def test_real_pairs_pass_through():
    lines = (SHARED / "ultrafeedback_binarized_train_prefs_1000.jsonl").read_text().splitlines()
    made = [(json.loads(line), *convert(json.loads(line))) for line in lines]
    counts = sum((count for _, _, count in made), Counter())
    assert counts == Counter(tie=110, identical_text=4, empty_response=2)
    for row, pairs, _ in made:
        for pair in pairs:
            assert all(pair[key] == row[key] for key in pair if key != "source")


def test_rows_of_parquet_are_the_same_rows():
    table = pa.Table.from_pylist([H4, VARIANTS["trl"], {**H4, "source": None}])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    for row in pq.read_table(buffer).to_pylist():
        assert only(convert(row))[0] == {**PAIR, "source": ""}
    rated = pa.Table.from_pylist(
        [{**RATED, "completions": [*RATED["completions"], {"response": "d"}]}]
    )
    [row] = rated.to_pylist()
    assert ultrafeedback.schemas()["raw"].problem(row) is None
    pairs, counts = binarize(row, BinarizationRules(pairing="all"))
    assert (len(pairs), counts) == (3, Counter(unscored_completion=1, tie=1))


def test_docstrings_are_true():
    for module in (sources, ultrafeedback, ultrachat):
        result = doctest.testmod(module)
        assert result.attempted
        assert result.failed == 0
