"""Pairs in every shape, the user's and the published ones, become the same pair."""

import functools
import json
from collections import Counter

import pytest
from raw_rows import messages, of_parquet, sharegpt, system, through, unfit

from zephyr_jax.data.raw import pairs
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.schema import prompt_digest

ASK, GOOD, BAD = messages("Why?")[0], *(messages("", text)[1] for text in ("So.", "No."))
TEXTS, TURNS = {"chosen": "So.", "rejected": "No."}, {"chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
ARGILLA = {"chosen_response": "So.", "rejected_response": "No."}
OWN = {
    "texts": {"prompt": "Why?", **TEXTS},
    "question": {"question": "Why?", **TEXTS},
    "whole lists": WHOLE,
    "whole lists and a prompt": {"prompt": "Why?", **WHOLE},
    "whole lists and their beginning": {"prompt": [ASK], **WHOLE},
    "answers after turns": {"prompt": [ASK], **TURNS},
    "answers after a text": {"prompt": "Why?", **TURNS},
    "argilla": {"instruction": "Why?", **ARGILLA},
    "argilla's question": {"question": "Why?", **ARGILLA},
    "sharegpt": {
        "conversations": sharegpt(("human", "Why?")),
        "chosen": sharegpt(("gpt", "So."))[0],
        "rejected": sharegpt(("gpt", "No."))[0],
    },
    "transcripts": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.\n",
    },
    "transcript and answers": {"prompt": "\n\nHuman: Why?\n\nAssistant:", **TEXTS},
}
TRL = {**WHOLE, "score_chosen": 8.0, "score_rejected": 3.0}
H4 = {**TRL, "prompt": "Why?", "prompt_id": prompt_digest("Why?"), "messages": [ASK, GOOD]}
FLAN = {"source": "flan"}
PUBLISHED = {
    "h4": H4,
    "trl": TRL,
    "allenai": {**H4, **FLAN},
    "argilla": {**OWN["argilla"], **FLAN, "chosen_avg_rating": 8.0, "rejected_avg_rating": 3},
    "cleaned": {"prompt": "Why?", **WHOLE, **FLAN, "chosen-rating": 8.0, "rejected-rating": 3},
}
SCORES = {"h4": "score_chosen", "argilla": "chosen_avg_rating", "cleaned": "chosen-rating"}


def own(row, **rules):
    return through(pairs.own_schemas(BinarizationRules(**rules))["own"], row)


def published(row, **rules):
    return through(pairs.ultrafeedback_schemas(BinarizationRules(**rules))["binarized"], row)


def expected(**values):
    record = {"prompt": "Why?", "prompt_id": prompt_digest("Why?"), **WHOLE, "source": ""}
    return record | {"score_chosen": 0.0, "score_rejected": 0.0} | values


@pytest.mark.parametrize("shape", OWN)
def test_every_shape_becomes_the_same_pair(shape):
    row = OWN[shape]
    assert own(row) == (expected(), Counter())
    assert own(row, ties="drop") == (expected(), Counter())  # without scores there is no tie
    [parquet, _] = of_parquet(row, {**row, "score_chosen": 1.0, "source": "x"})
    assert own(parquet) == own(row)
    record, _ = own({**row, "system": "Be brief."})
    assert record == expected(chosen=[system(), ASK, GOOD], rejected=[system(), ASK, BAD])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_variant_becomes_the_same_pair(name):
    row, scores = PUBLISHED[name], {"score_chosen": 8.0, "score_rejected": 3.0}
    assert published(row) == (expected(source=row.get("source", ""), **scores), Counter())
    [parquet, _] = of_parquet(row, row)
    assert published(parquet) == published(row)
    record, counts = published(row, drop_sources=("flan",))
    assert (record is None) == ("source" in row)
    assert counts == Counter([f"source_{'dropped' if 'source' in row else 'missing'}"])


@pytest.mark.parametrize("name", SCORES)
def test_scores_decide_ties_and_faults(name):
    tied = {**PUBLISHED[name], SCORES[name]: 3.0}
    assert published(tied)[1] == Counter(tie=1)
    assert published(tied, ties="drop") == (None, Counter(tie_dropped=1))
    for missing in (None, float("nan")):
        assert published({**tied, SCORES[name]: missing}) == (None, Counter(missing_scores=1))
    assert published({**tied, SCORES[name]: 1}) == (None, Counter(inverted_scores=1))


def test_own_pairs_may_lack_scores():
    scored = {**OWN["texts"], "score_chosen": 8, "score_rejected": 3.5}
    record, counts = own(scored)
    assert (record["score_chosen"], record["score_rejected"], counts) == (8.0, 3.5, Counter())
    assert type(record["score_chosen"]) is float
    for missing in (None, float("nan")):
        assert own({**scored, "score_chosen": missing}) == (expected(), Counter(unscored_pair=1))
    assert own({**scored, "score_chosen": None, "score_rejected": None}) == (expected(), Counter())


def test_prompts_of_several_turns_are_identified_by_all_of_them():
    before = messages("Hi", "Hello", "Why?")
    row = {"prompt": before, "chosen": [GOOD], "rejected": [BAD], "source": "mine"}
    record, _ = own(row)
    text = json.dumps(before, sort_keys=True, separators=(",", ":"))
    assert (record["prompt"], record["prompt_id"]) == ("Hi", prompt_digest(text))
    assert record["source"] == "mine"
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "
    assert own({"chosen": talk + "So.", "rejected": talk + "No.", "source": "mine"})[0] == record
    turns = sharegpt(("human", "Hi"), ("gpt", "Hello"), ("human", "Why?"))
    answers = {"chosen": sharegpt(("gpt", "So.")), "rejected": sharegpt(("gpt", "No."))}
    assert own({"conversations": turns, **answers, "source": "mine"})[0] == record
    assert own({**row, "prompt_id": "mine"})[0]["prompt_id"] == "mine"


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "Why?", "chosen": "a", "rejected": " "}, "empty_response"),
        ({"prompt": "Why?", "chosen": "a", "rejected": " a\n"}, "identical_text"),
        ({"chosen": [ASK, GOOD], "rejected": [messages("Who?")[0], BAD]}, "different_prompts"),
        ({"prompt": [ASK], **WHOLE, "chosen": [messages("Who?")[0], GOOD]}, "bad_roles"),
        ({"prompt": "Why?", **TURNS, "chosen": []}, "bad_roles"),
    ],
)
def test_pairs_are_dropped_and_counted(row, rule):
    assert own(row) == (None, Counter([rule]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "chosen": "So."}, "missing_key:rejected"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "b"}, "missing_key:prompt"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type:prompt"),
        ({**OWN["texts"], "rejected": [3]}, "wrong_type:rejected[0]"),
        ({**OWN["texts"], "chosen": {"text": "a"}}, "unknown_keys:chosen[0]{text}"),
        ({**OWN["texts"], "score_rejected": True}, "wrong_type:score_rejected"),
    ],
)
def test_the_reason_of_an_unfit_pair_names_the_place(row, reason):
    assert unfit(pairs.own_schemas()["own"], row) == reason


def test_the_reason_of_an_unfit_row_of_ultrafeedback_names_the_place():
    schemas = pairs.ultrafeedback_schemas()
    rated = functools.partial(unfit, schemas["raw"])
    ready = functools.partial(unfit, schemas["binarized"])
    row = {"instruction": "Why?", "completions": [{"response": "So."}, {"response": None}]}
    assert rated(row) == "wrong_type:completions[1].response"
    assert rated({**row, "completions": ["a"]}) == "wrong_type:completions[0]"
    assert rated({**row, "completions": None}) == "wrong_type:completions"
    assert rated({"instruction": None, "completions": []}) == "wrong_type:instruction"
    argilla = {**PUBLISHED["argilla"], "rejected_response": None}
    assert ready(argilla) == "wrong_type:rejected_response"
    assert ready({**H4, "chosen": 3}) == "wrong_type:chosen"
    assert not schemas["binarized"].fits(OWN["texts"])


def test_examples_show_answers_with_scores():
    rules = BinarizationRules(pairing="best_vs_worst")
    answers = [{"response": t, "overall_score": s} for t, s in (("a", 3), ("b", 8), ("c", 8))]
    row = {"instruction": "Why?", "completions": answers}
    schema = pairs.ultrafeedback_schemas(rules)["raw"]
    assert schema.texts(row, "tie") == ["3: a", "8: b", "8: c"]
    assert schema.texts(schema.convert(row)[0][0], "tie") == ["8.0: b", "3.0: a"]


@pytest.mark.parametrize("form", ["{}-rating", "score_{}", "rating_{}", "{}_avg_rating"])
def test_own_ratings_of_any_name_decide_ties_and_inverted_pairs(form):
    names = form.format("chosen"), form.format("rejected")

    def rated(chosen, rejected):
        return {**OWN["texts"], **dict(zip(names, (chosen, rejected), strict=True))}

    assert own(rated(8, 3)) == (expected(score_chosen=8.0, score_rejected=3.0), Counter())
    assert own(rated(3, 8)) == (None, Counter(inverted_scores=1))
    if names[0] != "score_chosen":  # a declared number
        assert own(rated("3", "8.5")) == (None, Counter(inverted_scores=1))
    assert own({**OWN["texts"], names[0]: 4}) == (expected(), Counter(unscored_pair=1))
    [row, _] = of_parquet(rated(4, 4), {"chosen_model": "m"})
    assert own(row)[1] == Counter(tie=1)
