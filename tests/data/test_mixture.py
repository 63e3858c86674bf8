"""Several prepared sets in one packed set, by their weights."""

import dataclasses
import shutil
from collections import Counter

import pytest
from raw_rows import dialogue, write
from test_packed import config_of, rated_pair

from zephyr_jax.data.packing.packed import build_packed, packed_folder
from zephyr_jax.data.prepare.prepare import prepare


def documents_of(made, split):
    """The token ids of every document in the rows, as a Counter."""
    found, info = Counter(), made.manifest["splits"][split]
    for row in made.rows(split).read(range(info["rows"])):
        for segment in range(1, row["segments"].max() + 1):
            found[tuple(row["tokens"][row["segments"] == segment].tolist())] += 1
    return found


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """A folder with ultrachat/raw, 60 dialogues, and messages/own, 40 others."""
    root = tmp_path_factory.mktemp("two_sets")
    write(root / "raw" / "train.jsonl", map(dialogue, range(60)))
    prepare("ultrachat", root / "raw", root)
    write(root / "own" / "train.jsonl", map(dialogue, range(100, 140)))
    prepare("ultrachat", root / "own", root / "other")
    shutil.copytree(root / "other" / "ultrachat" / "raw", root / "messages" / "own")
    return root


def test_sets_are_mixed_by_their_weights(tok, two_sets):
    def packed_of(dataset):
        return build_packed(config_of("demo_sft", two_sets, dataset=dataset), tok, 1)

    first, second = packed_of("ultrachat/raw"), packed_of("messages/own")
    n_first, n_second = (made.manifest["splits"]["train"]["documents"] for made in (first, second))
    mixed = packed_of({"ultrachat/raw": 1.5, "messages/own": 0.5})
    assert mixed.folder != first.folder
    found = documents_of(mixed, "train")
    theirs = [Counter({d: n for d, n in found.items() if d in documents_of(made, "train")})
              for made in (first, second)]  # fmt: skip
    assert sorted(theirs[0].values()) == [1] * (n_first - round(n_first / 2)) + [2] * round(
        n_first / 2
    )
    assert sorted(theirs[1].values()) == [1] * round(n_second / 2)
    assert theirs[0] + theirs[1] == found
    held_out = documents_of(first, "eval") + documents_of(second, "eval")
    assert documents_of(mixed, "eval") == held_out
    assert set(held_out.values()) == {1}
    twice = packed_of({"ultrachat/raw": 2.0})
    assert documents_of(twice, "train") == documents_of(first, "train") + documents_of(
        first, "train"
    )
    names = {
        packed_of({"ultrachat/raw": w, "messages/own": 1.0}).folder.name for w in (1.0, 2.0, 0.5)
    }
    assert len(names) == 3


@pytest.mark.parametrize(
    ("dataset", "error", "said"),
    [
        ({"ultrachat/raw": 1.0, "nothing/own": 1.0}, FileNotFoundError, "no prepared set in"),
        ({"ultrachat/raw": 0.0, "messages/own": 1.0}, ValueError, "weight 0.0 of ultrachat/raw"),
        (
            {"ultrachat/raw": -1.0},
            ValueError,
            "weight -1.0 of ultrachat/raw must be a number above 0",
        ),
        ({"ultrachat/raw": float("nan")}, ValueError, "weight nan"),
        ({}, ValueError, "is empty"),
        ("", ValueError, "is empty"),
    ],
)
def test_a_wrong_mixture_is_named(tok, two_sets, dataset, error, said):
    with pytest.raises(error, match=said):
        packed_folder(config_of("demo_sft", two_sets, dataset=dataset), tok, 1)


def test_pairs_taken_twice_are_no_duplicates(tok, tmp_path):
    write(tmp_path / "raw.jsonl", [rated_pair(n) for n in range(40)])
    prepare("ultrafeedback", tmp_path / "raw.jsonl", tmp_path, "binarized")
    shutil.copytree(tmp_path / "ultrafeedback", tmp_path / "preferences")
    once = config_of("demo_dpo", tmp_path, dataset="ultrafeedback/binarized")
    data = dataclasses.replace(once.data, dataset={"ultrafeedback/binarized": 2.0})
    twice = dataclasses.replace(once, data=data)
    ids = [made.pair_ids("train") for made in (build_packed(c, tok, 4) for c in (once, twice))]
    epochs = once.train.epochs
    counts = [Counter(found[found > 0].tolist()) for found in ids]
    assert set(counts[0].values()) == {epochs}
    assert counts[1] == {pair: 2 * n for pair, n in counts[0].items()}
    made = build_packed(twice, tok, 4)
    assert made.manifest["splits"]["train"]["dropped_duplicate"] == 0
    n_rows = made.manifest["splits"]["train"]["rows"]
    assert (made.rows("train").read(range(n_rows))["pair_ids"] == made.pair_ids("train")).all()
    # the same pairs in another set are
    sets = {"ultrafeedback/binarized": 1.0, "preferences/binarized": 1.0}
    data = dataclasses.replace(once.data, dataset=sets)
    both = build_packed(dataclasses.replace(once, data=data), tok, 4)
    info = both.manifest["splits"]["train"]
    assert info["dropped_duplicate"] == info["documents"] == info["read"] / 2
