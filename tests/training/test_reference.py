"""Stored reference log-probs: what they depend on, who may read them, what a kill leaves."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_fields
from runs import ONE, config_of, mesh_of

from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.batches import make_plan
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.losses.tokens import pair_logps
from zephyr_jax.training.reference import (
    ReferenceLogps,
    compute_reference,
    load_reference,
    reference_digest,
    reference_parts,
    reference_path,
)
from zephyr_jax.training.setup import pack
from zephyr_jax.weights.checkpoint import params_digest

MADE_FROM = {
    "format": 3, "dataset": "d", "splits": ["a", "b"], "tokenizer": "t", "chat": {"bos": True},
    "max_length": 9, "max_prompt_length": 4, "seq_len": 32, "seed": 0, "batch_size": 4,
}  # fmt: skip


def parts_of(made_from=MADE_FROM, parameters="p", **dpo):
    config = with_fields(load_config("demo_dpo"), dpo=dpo)
    packed = PackedSet(Path("x"), {"made_from": made_from})
    return reference_parts(packed, parameters, config.model.dtype, config.dpo.option("ld_alpha"))


def test_whatever_shapes_the_log_probs_shapes_their_digest():  # pitfall 15
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    parameters = [
        params_digest(params),
        params_digest(params | {"b": jnp.zeros(4).at[1].set(1e-30)}),
        params_digest({"a": params["a"].T, "b": params["b"]}),
    ]
    shaping = ("format", "dataset", "splits", "tokenizer", "chat", "max_length")
    digests = [reference_digest(parts_of(parameters=digest)) for digest in parameters]
    digests += [reference_digest(parts_of(MADE_FROM | {name: "other"})) for name in shaping]
    digests.append(reference_digest(parts_of(MADE_FROM | {"max_prompt_length": 5})))
    digests.append(reference_digest(parts_of(options={"ld_alpha": 0.5})))
    packed = PackedSet(Path("x"), {"made_from": MADE_FROM})
    digests.append(reference_digest(reference_parts(packed, "p", "bfloat16", 1.0)))
    assert len(set(digests)) == len(digests)


def test_what_shapes_only_rows_and_steps_does_not():
    same = reference_digest(parts_of())
    for name, value in (("seq_len", 64), ("seed", 1), ("batch_size", 8)):
        assert reference_digest(parts_of(MADE_FROM | {name: value})) == same
    assert reference_digest(parts_of(beta=0.5, loss="ipo")) == same


def score(rows):
    """Stand-ins for log-probs, which only the pair's own tokens determine: `R K 2`."""
    return pair_logps(-rows.tokens.astype("float32"), rows.segments, rows.branches, 4)


@pytest.fixture
def stored(world, tmp_path):
    """A reference in a folder of its own: packed set, plan, parts, path, values."""
    with mesh_of(ONE):
        packed = pack(config_of(world, "dpo"))
        assert packed.manifest["pairs_per_row"] <= 4
        folder = tmp_path / "packed" / packed.folder.name
        shutil.copytree(packed.folder, folder)
        packed = PackedSet(folder, packed.manifest)
        plan = make_plan(packed, 8, 1, 0)
        parts = reference_parts(packed, "p", "float32", 1.0)
        path = reference_path(packed, reference_digest(parts))
        yield packed, plan, parts, path, computed(packed, plan, parts)


def computed(packed, plan, parts):
    n_pairs = packed.manifest["pairs_per_row"]
    return compute_reference(lambda rows: score(rows)[:, :n_pairs], packed, plan, parts, 0)


def test_an_unsealed_reference_is_computed_again(stored):
    packed, _, parts, folder, _ = stored
    assert load_reference(packed, parts).pair_ids.size
    (folder / "digests.json").unlink()  # a kill came before
    assert load_reference(packed, parts) is None


def test_lookup_joins_by_id_not_by_place():
    logps = np.asarray([[7, 70], [3, 30], [9, 90]], np.float32)
    table = ReferenceLogps(np.asarray([7, 3, 9]), logps)
    got = table.lookup(np.asarray([[9, 0], [3, 7]]))
    np.testing.assert_array_equal(got, [[[9, 90], [0, 0]], [[3, 30], [7, 70]]])
    empty = ReferenceLogps(np.zeros(0, np.int64), np.zeros((0, 2), np.float32))
    assert not empty.lookup(np.zeros((2, 3), np.int64)).any()
    for missing in (table, empty):
        with pytest.raises(ValueError, match="1 pairs have no stored log-probs, first id 8"):
            missing.lookup(np.asarray([[8, 0]]))
