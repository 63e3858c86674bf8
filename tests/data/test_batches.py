"""Global batches: the same rows in the same order, whoever reads them and from where on."""

import dataclasses

import jax
import numpy as np
import pytest
import row_digests
from conftest import with_fields
from processes import start_processes, wait_for
from row_digests import mesh_in_order
from runs import config_of
from test_reference import computed

from zephyr_jax.data.packing.batches import device_rows, make_plan, read_batches, row_indices
from zephyr_jax.training.reference import (
    load_reference,
    reference_digest,
    reference_parts,
    reference_path,
)
from zephyr_jax.training.setup import pack


@pytest.fixture(scope="module", params=["dpo", pytest.param("sft", marks=pytest.mark.slow)])
def packed(request, world):
    return pack(config_of(world, request.param, micro_batches=1))


def test_rows_are_placed_on_the_devices_that_hold_them(packed):
    plan = make_plan(packed, 8, 3, 0, 8)
    with jax.set_mesh(mesh_in_order(np.random.default_rng(0).permutation(8))):
        (batch,) = read_batches(packed, plan, "train", 0, 1, 0)
        placed = device_rows(batch)
        assert all((x == y).all() for x, y in zip(placed, batch.rows, strict=True))
        assert placed.tokens.sharding.shard_shape(placed.tokens.shape)[0] * 4 == plan.rows_per_batch


def test_pair_ids_of_a_batch_are_those_in_its_rows(world):
    packed = pack(config_of(world, "dpo", micro_batches=1))
    plan = make_plan(packed, 8, 1, 0, 8)
    n_held_out = packed.manifest["splits"]["eval"]["rows"]
    for split, n_rows, stop in (("train", plan.rows_per_batch, 3), ("eval", n_held_out + 2, 1)):
        source, changed = packed.rows(split), plan._replace(rows_per_batch=n_rows)
        with jax.set_mesh(mesh_in_order([0], (1, 1, 1))):
            batches = list(read_batches(packed, changed, split, 0, stop, 0))
        for step, batch in enumerate(batches):
            at = row_indices(packed, changed, split, step, 0)
            assert split == "train" or list(at) == [*range(n_held_out), -1, -1]
            assert (source.read(at)["pair_ids"] == batch.pair_ids).all()
            assert batch.pair_ids.any()


def digests_of(packed, processes, start, stop, logs):
    """(step, row) -> hash, put together from what each of several processes printed."""
    words = [row_digests.__file__, str(packed.folder), str(start), str(stop)]
    started = start_processes(words, processes, 8 // processes, logs)
    assert wait_for(started, logs) == [0] * processes
    found = {}
    for i in range(processes):
        lines = (logs / f"{i}.log").read_text().splitlines()
        for _, step, row, digest in (line.split() for line in lines if line.startswith("row ")):
            key = int(step), int(row)
            assert found.setdefault(key, digest) == digest  # tensor: two devices hold each row
    return found


def undisturbed(packed, stop):
    """What this process alone, with all eight devices, would print."""
    plan = make_plan(packed, 8, 3, 0, 8)
    assert plan.train_steps >= stop
    with jax.set_mesh(mesh_in_order(range(8))):
        found = {(s, row): digest for s, row, digest in row_digests.digests(packed, 0, stop)}
    assert sorted(found) == [(s, row) for s in range(stop) for row in range(plan.rows_per_batch)]
    assert len(set(found.values())) > stop
    return found


def test_two_processes_hold_the_batches_of_one(packed, tmp_path):
    assert digests_of(packed, 2, 0, 4, tmp_path / "two") == undisturbed(packed, 4)


@pytest.mark.slow
def test_four_processes_stop_and_two_go_on(packed, tmp_path):
    whole = undisturbed(packed, 6)
    before = digests_of(packed, 4, 0, 3, tmp_path / "four")
    after = digests_of(packed, 2, 3, 6, tmp_path / "two")
    assert before | after == whole
    assert {step for step, _ in after} == {3, 4, 5}


def test_a_pair_that_is_taken_twice_has_one_reference_at_home_too(world, tmp_path):
    config = with_fields(config_of(world, "dpo"), data={"dataset": {"ultrafeedback/raw": 2.0}})
    with jax.set_mesh(mesh_in_order([0], (1, 1, 1))):
        home = str(tmp_path / "packed" / "set")  # where a bucket's URL stands
        packed = dataclasses.replace(pack(config), home=home)
        parts = reference_parts(packed, "p", "float32", 1.0)
        made = computed(packed, make_plan(packed, 8, 1, 0), parts)
    assert reference_path(packed, reference_digest(parts)).parent == tmp_path / "reference"
    stored = load_reference(packed, parts)
    assert (stored.logps == made.logps).all()
    train = packed.pair_ids("train")
    everywhere = {*train.reshape(-1).tolist(), *packed.pair_ids("eval").reshape(-1).tolist()}
    assert stored.pair_ids.tolist() == sorted(everywhere - {0})
    found = made.lookup(train)
    assert (found == stored.lookup(train)).all()
    assert (found[train != 0] < 0).all()
