"""Several prepared sets in one packed set, by their weights."""

import shutil
from collections import Counter

import pytest
from conftest import with_fields
from raw_rows import dialogue, write
from test_packed import config_of, documents_of, prepared_pairs, rows_of

from zephyr_jax.data.packing.packed import build_packed, packed_folder
from zephyr_jax.data.prepare.prepare import prepare


def counted(packed, split):
    """How often each document is in the rows of a split."""
    return Counter(tuple(tokens.tolist()) for tokens, _, _ in documents_of(packed, split))


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
        return build_packed(config_of("demo_sft", two_sets, dataset=dataset), tok)

    sets = packed_of("ultrachat/raw"), packed_of("messages/own")
    first, second = (counted(packed, "train") for packed in sets)
    mixed = packed_of({"ultrachat/raw": 1.5, "messages/own": 0.5})
    found = counted(mixed, "train")
    half = round(len(first) / 2)
    assert found.keys() <= first.keys() | second.keys()
    assert sorted(found[document] for document in first) == [1] * (len(first) - half) + [2] * half
    assert sum(found[document] for document in second) == round(len(second) / 2)
    assert {found[document] for document in second} == {0, 1}
    held_out = counted(sets[0], "eval") + counted(sets[1], "eval")
    assert counted(mixed, "eval") == held_out
    assert set(held_out.values()) == {1}
    assert counted(packed_of({"ultrachat/raw": 2.0}), "train") == first + first
    weights = [{"ultrachat/raw": weight, "messages/own": 1.0} for weight in (1.0, 2.0, 0.5)]
    assert len({packed_of(dataset).folder for dataset in weights} | {mixed.folder}) == 4


def test_a_set_that_is_not_prepared_is_named(tok, two_sets):
    config = config_of("demo_sft", two_sets, dataset={"ultrachat/raw": 1.0, "nothing/own": 1.0})
    with pytest.raises(FileNotFoundError, match="no prepared set in .*nothing/own; make it with"):
        packed_folder(config, tok)


def test_pairs_taken_twice_are_no_duplicates(tok, tmp_path):
    config = prepared_pairs(tmp_path)
    shutil.copytree(tmp_path / "ultrafeedback", tmp_path / "preferences")
    once = build_packed(config, tok)
    doubled = with_fields(config, data={"dataset": {"ultrafeedback/binarized": 2.0}})
    twice = build_packed(doubled, tok)
    ids = (packed.pair_ids("train") for packed in (once, twice))
    counts = [Counter(own[own > 0].tolist()) for own in ids]
    assert set(counts[0].values()) == {config.train.epochs}
    assert counts[1] == {pair: 2 * n for pair, n in counts[0].items()}
    assert twice.manifest["splits"]["train"]["dropped_duplicate"] == 0
    assert (rows_of(twice, "train")["pair_ids"] == twice.pair_ids("train")).all()
    # the same pairs in another set are
    sets = {"ultrafeedback/binarized": 1.0, "preferences/binarized": 1.0}
    packed = build_packed(with_fields(config, data={"dataset": sets}), tok)
    info = packed.manifest["splits"]["train"]
    assert info["dropped_duplicate"] == info["documents"] == info["read"] / 2
