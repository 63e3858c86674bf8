"""`fit` on a very small world: resume, evaluation, reference, errors."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import zephyr_jax as zj
from zephyr_jax.config.run import MeshConfig, load_config
from zephyr_jax.data.packing.batches import make_plan, read_batches, row_indices
from zephyr_jax.data.packing.packed import open_packed
from zephyr_jax.sharding import AXES
from zephyr_jax.training import reference
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.setup import pack
from zephyr_jax.weights.digest import params_digest

ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)


def config_of(world, kind, **train):
    """The demo's recipe with a tiny model: 10 steps, micro-batches, a checkpoint at 5."""
    config = load_config(f"demo_{kind}")
    model = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=400)
    train = {
        "epochs": 4, "max_steps": 10, "batch_size": 8, "micro_batches": 2, "eval_every": 0,
        "checkpoint_every": 5, "keep_checkpoints": 2, "log_every": 5,
    } | train  # fmt: skip
    tokenizer = str(world / "tokenizer")
    data = dataclasses.replace(config.data, data_dir=str(world / "data"), tokenizer=tokenizer)
    return dataclasses.replace(
        config,
        model=model,
        init="",
        data=data,
        mesh=ONE,
        train=dataclasses.replace(config.train, **train),
    )


def mesh_of(config: MeshConfig):
    """A mesh over the first devices, set around `fit` as a notebook would."""
    sizes = [getattr(config, name) for name in AXES]
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return jax.set_mesh(jax.sharding.Mesh(devices, AXES, axis_types=explicit))


@pytest.fixture(autouse=True)
def _one_device():
    with mesh_of(ONE):
        yield


@pytest.fixture(params=[ONE, EIGHT], ids=["one device", "eight devices"])
def mesh_config(request):
    with mesh_of(request.param):
        yield request.param


class Killed(Exception):
    """What the test raises in the middle of a run."""


def kill_at(monkeypatch, step):
    """Lets `fit` die when it writes the metrics of a step."""
    from zephyr_jax.training import loop

    write = loop.MetricsFile.write

    def dying(self, at, split, values):
        write(self, at, split, values)
        if at == step and split == "train":
            raise Killed

    monkeypatch.setattr(loop.MetricsFile, "write", dying)


@pytest.mark.parametrize(
    ("mesh_config", "kind"),
    [
        pytest.param(ONE, "dpo", id="one device-dpo"),
        pytest.param(EIGHT, "sft", id="eight devices-sft"),
        pytest.param(ONE, "sft", id="one device-sft", marks=pytest.mark.slow),
        pytest.param(EIGHT, "dpo", id="eight devices-dpo", marks=pytest.mark.slow),
    ],
    indirect=["mesh_config"],
)
def test_ten_steps_equal_five_a_kill_and_five(world, tmp_path, monkeypatch, mesh_config, kind):
    """Pitfall 43, bit for bit, with gradient accumulation; the kill comes at step 8."""
    config = config_of(world, kind, log_every=1)
    whole = zj.fit(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            zj.fit(config, tmp_path / "cut")
    resumed = zj.fit(config, tmp_path / "cut")
    assert int(resumed.step) == 10
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))

    def losses(name):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(r["step"], r["split"], r.get("loss", r.get("eval_loss"))) for r in rows]

    assert losses("whole") == losses("cut")
    assert [r[0] for r in losses("cut") if r[1] == "train"] == list(range(1, 11))


def test_a_finished_run_starts_again_without_a_step(world, tmp_path):
    config = config_of(world, "sft")
    zj.fit(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert int(zj.fit(config, tmp_path).step) == 10
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(world, tmp_path):
    config = config_of(world, "sft")
    zj.fit(config, tmp_path)
    files = sorted((tmp_path / "checkpoints" / "10" / "params").rglob("*"), key=_size)
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(content)
    model = zj.load_model(tmp_path)
    assert model.lineage["step"] == 5
    assert int(zj.fit(config, tmp_path).step) == 10
    assert (tmp_path / "damaged" / "10").is_dir()
    for path in (tmp_path / "checkpoints").glob("*/params"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="none of the checkpoints .* is whole"):
        zj.fit(config, tmp_path)


def _size(path):
    return path.stat().st_size if path.is_file() else 0


def test_a_workdir_belongs_to_one_run(world, tmp_path):
    config = config_of(world, "sft", max_steps=1)
    zj.fit(config, tmp_path)
    other = dataclasses.replace(config, seed=9)
    with pytest.raises(ValueError, match="another run: seed was 0, is 9"):
        zj.fit(other, tmp_path)


def test_rows_that_the_mesh_cannot_divide_are_an_error(world, tmp_path, mesh_config):
    if mesh_config == ONE:
        pytest.skip("one device divides everything")
    config = config_of(world, "sft", batch_size=6, micro_batches=1)
    with pytest.raises(ValueError, match="batch_size=6 rows is not divisible .* = 4; use 4"):
        zj.fit(config, tmp_path)


def test_an_initial_model_of_another_architecture_is_refused(world, tmp_path):  # pitfall 33
    config = config_of(world, "sft", max_steps=1)
    zj.fit(config, tmp_path / "a")
    model = dataclasses.replace(config.model, rope_theta=1e6)
    config = dataclasses.replace(config, model=model, init=str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"rope_theta is 10000.0, config.model says 1000000.0"):
        zj.fit(config, tmp_path / "b")


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_evaluation_is_exact_whatever_the_batch(world, tmp_path, kind):  # pitfall 22
    seen = []
    for batch_size in (1, 3, 8):
        config = config_of(world, kind, batch_size=batch_size, micro_batches=1, max_steps=1)
        zj.fit(config, tmp_path / str(batch_size))
        rows = read_metrics(tmp_path / str(batch_size) / "metrics.jsonl")
        seen.append(rows[0])
        assert rows[0]["split"] == "eval"
        assert rows[0]["step"] == 0
    for row in seen[1:]:
        for name, value in seen[0].items():
            if name.startswith("eval_"):
                np.testing.assert_allclose(row[name], value, rtol=1e-5, err_msg=name)


def test_every_row_is_read_once_an_epoch_in_an_order_of_its_own(world):  # pitfall 42
    config = config_of(world, "sft")
    packed = pack(config, 1)
    plan = make_plan(packed, 8, 4, 0)
    n = packed.manifest["splits"]["train"]["rows"]
    epochs = []
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        order = np.concatenate([row_indices(packed, plan, "train", s, 0) for s in steps])
        epochs.append([i for i in order if i >= 0])
        assert sorted(epochs[-1]) == list(range(n))
        assert len(order) == plan.steps_per_epoch * 8
    assert epochs[0] != epochs[1]
    whole = [b.rows.tokens for b in read_batches(packed, plan, "train", 0, 6, 0)]
    late = [b.rows.tokens for b in read_batches(packed, plan, "train", 4, 6, 0)]
    np.testing.assert_array_equal(whole[4:], late)


def test_preference_batches_hold_exactly_n_pairs(world):
    config = config_of(world, "dpo", epochs=2)
    packed = pack(config, 4)
    manifest = packed.manifest
    assert manifest["rows_per_batch"] % 8 == 0  # four shards, two micro-batches
    plan = make_plan(packed, 8, 2, 0)
    batches = list(read_batches(packed, plan, "train", 0, plan.train_steps, 0))
    counts = [int((b.pair_ids != 0).sum()) for b in batches]
    n = manifest["splits"]["train"]["documents"]
    per_epoch = [8] * (n // 8) + ([n % 8] if n % 8 else [])
    assert counts == per_epoch * 2
    ids = np.concatenate([b.pair_ids[b.pair_ids != 0] for b in batches])
    assert len(set(ids[:n])) == n
    assert sorted(ids[:n]) == sorted(ids[n:])
    assert list(ids[:n]) != list(ids[n:])


def test_packing_follows_its_digests(world):
    config = config_of(world, "dpo")
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    first = pack(config, 1)
    again = open_packed(config, tok, 2)
    assert again is not None
    assert again.manifest == first.manifest
    for changed in (
        dataclasses.replace(config, chat=dataclasses.replace(config.chat, bos=False)),
        dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=160)),
        dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, max_length=100)),
        dataclasses.replace(config, seed=3),
    ):
        assert open_packed(changed, tok, 2) is None
    assert open_packed(config, tok, 4) is None


def test_missing_sets_say_how_to_make_them(world, tmp_path):
    config = config_of(world, "sft")
    data = dataclasses.replace(config.data, data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="prepare_data.py ultrachat --source=FOLDER"):
        zj.fit(dataclasses.replace(config, data=data), tmp_path / "run")


def test_reference_is_computed_once_and_joined_by_id(world, tmp_path, monkeypatch):
    """Pitfalls 15, 16: another reference is another file, and no pair ever gets another's."""
    config = config_of(world, "dpo", max_steps=2)
    zj.fit(config, tmp_path / "a")
    calls = []
    from zephyr_jax.training import reference_modes

    compute = reference_modes.compute_reference
    counted = lambda *a: calls.append(1) or compute(*a)  # noqa: E731
    monkeypatch.setattr(reference_modes, "compute_reference", counted)
    zj.fit(config, tmp_path / "b")
    assert not calls
    longer = dataclasses.replace(config, init=str(tmp_path / "a"))
    zj.fit(longer, tmp_path / "c")
    assert calls == [1]
    rows = read_metrics(tmp_path / "c" / "metrics.jsonl")
    assert rows[0]["eval_rewards/chosen"] == 0
    assert abs(rows[0]["eval_loss"] - np.log(2)) < 1e-6
    assert rows[0]["eval_rewards/ties"] == 1


def test_in_memory_and_stored_references_agree(world, tmp_path):
    stored = config_of(world, "dpo", max_steps=3)
    kept = dataclasses.replace(stored, dpo=dataclasses.replace(stored.dpo, reference="in_memory"))
    a = zj.fit(stored, tmp_path / "a")
    b = zj.fit(kept, tmp_path / "b")
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_lookup_joins_by_id_not_by_place():
    ids = np.asarray([7, 3, 9])
    table = reference.ReferenceLogps(ids, np.asarray([[7, 70], [3, 30], [9, 90]], np.float32))
    got = table.lookup(np.asarray([[9, 0], [3, 7]]))
    np.testing.assert_array_equal(got, [[[9, 90], [0, 0]], [[3, 30], [7, 70]]])
    with pytest.raises(ValueError, match="1 pairs have no stored reference log-probs, first id 8"):
        table.lookup(np.asarray([[8, 3]]))


def test_params_digest_sees_every_bit_and_no_mesh(mesh_config):
    cfg = zj.MistralConfig.tiny()
    params = zj.init_params(cfg, jax.random.key(0))
    host = jax.tree.map(np.array, jax.device_get(params))
    digest = params_digest(params)
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        assert params_digest(jax.tree.map(jax.numpy.asarray, host)) == digest
        bits = host["head"].view(np.uint32)
        bits[3, 5] ^= 1
        assert params_digest(jax.tree.map(jax.numpy.asarray, host)) != digest
        bits[3, 5] ^= 1
        host["head"][[2, 4]] = host["head"][[4, 2]]
        assert params_digest(jax.tree.map(jax.numpy.asarray, host)) != digest


def test_metrics_have_trl_names_and_rates(world, tmp_path):
    zj.fit(config_of(world, "dpo"), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"][-1]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies"):
        assert name in train
    for name in ("rewards/margins", "logps/chosen", "logps/rejected", "grad_norm", "eta_s"):
        assert name in train
    assert train["pairs_per_s"] > 0
    assert 0 < train["target_tokens_per_s"] < train["tokens_per_s"]
    evals = [row for row in rows if row["split"] == "eval"]
    assert [row["step"] for row in evals] == [0, 10]
    saved = json.loads((tmp_path / "run_config.json").read_text())
    assert zj.RunConfig.from_config_dict(saved) == config_of(world, "dpo")
    rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
    peak = config_of(world, "dpo").optim.peak_lr  # pitfall 25: warm-up 1 of 10 steps, 0 at the end
    np.testing.assert_allclose(rates, [peak * 6 / 9, peak / 9], rtol=1e-5)


def test_a_lost_reference_is_computed_from_the_initial_model(world, tmp_path):  # pitfall 15
    config, stored = config_of(world, "dpo", max_steps=2), world / "data" / "reference"
    for path in stored.glob("*.npz"):
        path.unlink()
    zj.fit(config, tmp_path)
    (path,) = stored.glob("*.npz")
    with np.load(path) as file:
        first = dict(file)
    path.unlink()
    zj.fit(config, tmp_path)  # has no step to make, and a policy that has moved
    with np.load(path) as again:
        for name, value in first.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_every_field_of_an_initial_model_is_compared():  # pitfall 33
    from zephyr_jax.training.setup import check_same_model

    found = zj.MistralConfig.tiny()
    for name, value in (("rope_theta", 1e6), ("sliding_window", 4096), ("rms_norm_eps", 1e-6)):
        wanted = dataclasses.replace(found, **{name: value})
        with pytest.raises(ValueError, match=f"{name} is .*, config.model says {value}"):
            check_same_model(wanted, found, "init")
    check_same_model(dataclasses.replace(found, dtype="bfloat16"), found, "init")


def test_a_kill_before_the_checksums_costs_nothing(world, tmp_path):
    config = config_of(world, "sft", keep_checkpoints=1)
    whole = zj.fit(config, tmp_path)
    (sums,) = (tmp_path / "checkpoints").glob("*.sums.json")
    sums.unlink()
    (tmp_path / "checkpoints" / "10" / ".DS_Store").write_text("a stray file is no damage")
    again = zj.fit(config, tmp_path)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sums.is_file()


def test_a_run_stopped_by_a_signal_saves_first(world, tmp_path, monkeypatch):
    import os
    import signal

    from zephyr_jax.training import loop

    config = config_of(world, "sft", log_every=1)
    write = loop.MetricsFile.write

    def stop(self, at, split, values):
        write(self, at, split, values)
        if at == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsFile, "write", stop)
        with pytest.raises(SystemExit) as stopped:
            zj.fit(config, tmp_path)
    assert stopped.value.code == 75
    assert zj.load_model(tmp_path).lineage["step"] in (3, 4)
    assert int(zj.fit(config, tmp_path).step) == 10


def test_a_loss_that_is_not_finite_is_never_saved(world, tmp_path):
    config = config_of(world, "sft", checkpoint_every=1, log_every=1)
    wild = dataclasses.replace(config.optim, peak_lr=1e30, warmup_ratio=0.0, max_grad_norm=1e30)
    with pytest.raises(FloatingPointError, match="another --workdir"):
        zj.fit(dataclasses.replace(config, optim=wild), tmp_path)
    if (tmp_path / "checkpoints").is_dir():
        params = zj.load_model(tmp_path).params
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_nothing_is_written_where_the_initial_model_does_not_fit(world, tmp_path):
    config = config_of(world, "sft", max_steps=1)
    zj.fit(config, tmp_path / "a")
    model = dataclasses.replace(config.model, rope_theta=1e6)
    with pytest.raises(ValueError, match="rope_theta"):
        zj.fit(dataclasses.replace(config, model=model, init=str(tmp_path / "a")), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    (tmp_path / "a" / "run_config.json").unlink()
    with pytest.raises(ValueError, match="is a ported model, not a run"):
        zj.fit(config, tmp_path / "a")
