"""`setup` and `train` on a very small world: resume, evaluation, reference, errors."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import runs
from conftest import with_fields
from runs import EIGHT, ONE, assert_equal, config_of, mesh_of, metrics_of

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.batches import make_plan, read_batches, row_indices
from zephyr_jax.data.packing.packed import open_packed
from zephyr_jax.distributed import TRACED, ShutdownHandler
from zephyr_jax.reports.fit import write_report
from zephyr_jax.training import loop, reference
from zephyr_jax.training.loop import Due, due_after, fit
from zephyr_jax.training.setup import check_same_model, pack, setup
from zephyr_jax.training.steps import jitted_steps
from zephyr_jax.weights.checkpoint import params_digest

pytestmark = pytest.mark.usefixtures("one_device")


def test_what_is_due_after_which_step():
    train = load_config("demo_sft").train
    train = dataclasses.replace(train, log_every=2, eval_every=5, checkpoint_every=6)
    due = [due_after(step, 12, train) for step in range(13)]
    assert [step for step in range(13) if due[step].save] == [0, 6, 12]
    assert [step for step in range(13) if due[step].evaluate] == [0, 5, 10, 12]
    assert [step for step in range(13) if due[step].log] == [0, 2, 4, 5, 6, 8, 10, 12]
    assert due_after(3, 12, train, stops=True) == Due(log=True, evaluate=False, save=True)
    train = dataclasses.replace(train, eval_every=0, checkpoint_every=0)
    due = [due_after(step, 12, train) for step in range(1, 13)]
    assert [d.save for d in due] == [d.evaluate for d in due] == [False] * 11 + [True]


def losses_in(workdir):
    return [(x["step"], x["split"], x.get("loss", x.get("eval_loss"))) for x in metrics_of(workdir)]


def test_ten_steps_equal_five_a_kill_and_five(dpo_run, tmp_path, monkeypatch, cache_events):
    """Pitfall 43, bit for bit, with gradient accumulation; the kill comes at step 8."""
    resumed = runs.killed_and_resumed(monkeypatch, dpo_run.config, tmp_path, events=cache_events)
    assert cache_events["compile_requests_use_cache"] == cache_events["cache_hits"] > 0
    assert int(resumed.step) == 10
    assert_equal(dpo_run.state, resumed)
    assert losses_in(tmp_path) == losses_in(dpo_run.workdir)
    assert [row[0] for row in losses_in(tmp_path) if row[1] == "train"] == list(range(1, 11))


def test_a_finished_run_starts_again_without_a_step(sft_run, tmp_path):
    workdir = sft_run.copied(tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_text()
    assert_equal(fit(sft_run.config, workdir), sft_run.state)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(sft_run, tmp_path):
    workdir = sft_run.copied(tmp_path / "r[u]n*?")
    runs.flip_a_bit(workdir / "checkpoints" / "10" / "params")
    assert zj.load_model(workdir).lineage["step"] == 5
    assert_equal(fit(sft_run.config, workdir), sft_run.state)  # five and five again
    assert (workdir / "damaged" / "10").is_dir()
    for path in (workdir / "checkpoints").glob("*/params"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="none of the checkpoints .* is whole"):
        setup(sft_run.config, workdir)


def test_a_kill_before_the_digests_costs_nothing(sft_run, tmp_path):
    workdir = sft_run.copied(tmp_path / "run")
    digests = workdir / "checkpoints" / "10" / "digests.json"
    digests.unlink()
    (workdir / "checkpoints" / "unsealed").write_text("10")
    (workdir / "checkpoints" / "10" / ".DS_Store").write_text("a stray file is no damage")
    assert_equal(setup(sft_run.config, workdir).state, sft_run.state)
    assert digests.is_file()
    assert not (workdir / "checkpoints" / "unsealed").exists()


def test_a_workdir_belongs_to_one_run(sft_run, hf_folder, tmp_path):
    other = dataclasses.replace(sft_run.config, seed=9)
    with pytest.raises(ValueError, match="another run: seed was 0, is 9"):
        setup(other, sft_run.workdir)
    workdir = sft_run.copied(tmp_path / "ported")
    (workdir / "run_config.json").unlink()
    message = "run_config.json is missing: restore it, .* ported model is named"
    for folder in (workdir, hf_folder):
        with pytest.raises(ValueError, match=message):
            setup(sft_run.config, folder)


def test_another_number_of_micro_batches_or_devices_goes_on_where_it_was(dpo_run, tmp_path):
    workdir = dpo_run.copied(tmp_path / "run")
    for n_micro, mesh in ((1, ONE), (8, ONE), (3, EIGHT)):
        config = with_fields(dpo_run.config, train={"micro_batches": n_micro}, mesh=mesh)
        with mesh_of(mesh):
            run = setup(config, workdir)
        assert int(run.state.step) == 10
        assert run.plan.rows_per_batch % (n_micro * mesh.data * mesh.fsdp) == 0


def test_what_changed_the_rows_since_the_first_start_is_named(dpo_run, tmp_path, tok):
    workdir = dpo_run.copied(tmp_path / "run")
    tok.save(tmp_path)
    config = with_fields(dpo_run.config, data={"tokenizer": str(tmp_path)})
    folders = dpo_run.config.data.tokenizer, tmp_path
    was, now = (zj.Tokenizer.from_folder(folder).digest for folder in folders)
    with pytest.raises(ValueError, match=f"tokenizer was '{was}', is '{now}'; restore that"):
        setup(config, workdir)


def test_rows_that_the_mesh_cannot_divide_and_steps_that_the_run_lacks_are_refused(world, tmp_path):
    config = config_of(world, "sft", batch_size=6, micro_batches=1)
    with mesh_of(EIGHT), pytest.raises(ValueError, match="batch_size=6 rows must be .* = 4; use 4"):
        setup(config, tmp_path)
    with pytest.raises(ValueError, match="must be within the run's 10 steps"):
        setup(config_of(world, "sft", profile=(10, 12)), tmp_path)


def test_every_field_of_an_initial_model_is_compared(sft_run, tmp_path):  # pitfall 33
    tiny = sft_run.config.model
    for name, value in (("rope_theta", 1e6), ("sliding_window", 4096), ("rms_norm_eps", 1e-6)):
        wanted = dataclasses.replace(tiny, **{name: value})
        with pytest.raises(ValueError, match=f"{name} is .*, config.model says {value}"):
            check_same_model(wanted, tiny, "init")
    check_same_model(dataclasses.replace(tiny, dtype="bfloat16"), tiny, "init")
    config = dataclasses.replace(sft_run.config, model=wanted, init=str(sft_run.workdir))
    with pytest.raises(ValueError, match=r"rms_norm_eps is 1e-05, config.model says 1e-06"):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_evaluation_is_exact_whatever_the_batch(sft_run, dpo_run, tmp_path, kind):  # pitfall 22
    done = sft_run if kind == "sft" else dpo_run
    train = {"batch_size": 3, "micro_batches": 1, "max_steps": 1}
    run = setup(with_fields(done.config, train=train), tmp_path)
    _, eval_step = jitted_steps(run.config, run.optimizer)
    outputs = loop.open_outputs(run)
    loop.evaluate(run, eval_step, run.state, outputs, ShutdownHandler())
    outputs.bar.close()
    ours, wanted = (metrics_of(x)[0] for x in (tmp_path, done.workdir))
    assert (wanted["split"], wanted["step"]) == ("eval", 0)
    for name, value in wanted.items():
        if name.startswith("eval_"):
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)


def test_every_row_is_read_once_an_epoch_in_an_order_of_its_own(world):  # pitfall 42
    packed = pack(config_of(world, "sft"))
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
    packed = pack(config_of(world, "dpo", epochs=2))
    manifest = packed.manifest
    plan = make_plan(packed, 8, 2, 0, 8)  # four shards, two micro-batches
    assert plan.rows_per_batch % 8 == 0
    batches = list(read_batches(packed, plan, "train", 0, plan.train_steps, 0))
    for multiple in (1, 3, 5):  # what divides the rows does not shape them
        other = make_plan(packed, 8, 2, 0, multiple)
        assert other.rows_per_batch % multiple == 0
        again = read_batches(packed, other, "train", 0, other.train_steps, 0)
        for batch, same in zip(batches, again, strict=True):
            needed = manifest["rows_per_batch"]
            for array, alike in zip(batch.rows, same.rows, strict=True):
                np.testing.assert_array_equal(array[:needed], alike[:needed])
                assert not np.concatenate([array[needed:], alike[needed:]]).any()
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
    first = pack(config)
    again = open_packed(with_fields(config, train={"micro_batches": 4}, mesh=EIGHT), tok)
    assert again.manifest == first.manifest
    shaping = {"chat": {"bos": False}, "data": {"seq_len": 160}, "dpo": {"max_length": 100}}
    for name, value in (shaping | {"seed": 3}).items():
        assert open_packed(with_fields(config, **{name: value}), tok) is None, name


def test_reference_is_computed_once_for_all_runs_of_one_initial_model(
    dpo_run, tmp_path, monkeypatch
):
    """Pitfalls 15, 16: another reference is another file, and no pair ever gets another's."""
    calls, compute = [], reference.compute_reference
    counted = lambda *args: calls.append(1) or compute(*args)  # noqa: E731
    monkeypatch.setattr(reference, "compute_reference", counted)
    setup(dpo_run.config, tmp_path / "same")
    assert not calls
    setup(dataclasses.replace(dpo_run.config, init=str(dpo_run.workdir)), tmp_path / "other")
    assert calls == [1]
    first = metrics_of(dpo_run.workdir)[0]
    assert first["eval_rewards/chosen"] == 0
    assert abs(first["eval_loss"] - np.log(2)) < 1e-6
    assert first["eval_rewards/ties"] == 1


def test_a_lost_reference_is_computed_from_the_initial_model(dpo_run, tmp_path):  # pitfall 15
    config, workdir = dpo_run.config, dpo_run.copied(tmp_path / "run")
    run = setup(config, workdir)
    folder = reference.reference_path(run.packed, run.meta["reference_digest"])
    with np.load(folder / "logps.npz") as file:
        first = dict(file)
    folder.rmtree()
    setup(config, workdir)  # has no step to make, and a policy that has moved
    with np.load(folder / "logps.npz") as again:
        for name, value in first.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_params_digest_sees_every_bit_and_no_mesh():
    with mesh_of(EIGHT):
        params = zj.init_params(zj.MistralConfig.tiny(), jax.random.key(0))
        host = jax.tree.map(np.array, jax.device_get(params))
        digest = params_digest(params)
    assert params_digest(host) == digest
    head = host["head"].copy()
    head.view(np.uint32)[3, 5] ^= 1
    assert params_digest(host | {"head": head}) != digest
    head = host["head"].copy()
    head[[2, 4]] = head[[4, 2]]
    assert params_digest(host | {"head": head}) != digest


def test_a_run_without_a_held_out_split_trains_and_reports(world, tmp_path):
    config = config_of(world, "dpo", max_steps=2, checkpoint_every=0, profile=(2, 3))
    fit(with_fields(config, data={"splits": (config.data.splits[0], "")}), tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (2, "train")]
    status = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert [status[name] for name in ("step", "total_steps", "doing")] == [2, 2, "done"]
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert TRACED.encode() in trace.read_bytes()
    write_report(str(tmp_path / "run"), 3)
    assert "The run holds no split out" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ValueError, match=r"\(TRAINING, HELD_OUT\), or \('train_sft', ''\)"):
        dataclasses.replace(config.data, splits=("", "test_sft"))


def test_metrics_have_trl_names_and_rates(dpo_run):
    train, evals = (metrics_of(dpo_run.workdir, split) for split in ("train", "eval"))
    names = {"loss", "grad_norm", "eta_s", "logps/chosen", "logps/rejected"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    assert names <= train[-1].keys()
    assert train[-1]["pairs_per_s"] > 0
    assert 0 < train[-1]["target_tokens_per_s"] < train[-1]["tokens_per_s"]
    assert [row["step"] for row in evals] == [0, 10]
    saved = json.loads((dpo_run.workdir / "run_config.json").read_text())
    assert zj.RunConfig.from_config_dict(saved) == dpo_run.config
    rates = [row["learning_rate"] for row in train]
    peak = dpo_run.config.optim.peak_lr  # pitfall 25: warm-up 1 of 10 steps, 0 at the end
    np.testing.assert_allclose([rates[4], rates[9]], [peak * 6 / 9, peak / 9], rtol=1e-5)


def test_a_run_stopped_by_a_signal_saves_first(world, tmp_path, monkeypatch):
    write = loop.MetricsFile.write

    def stop(self, at, split, values):
        write(self, at, split, values)
        if at == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.MetricsFile, "write", stop)
    with pytest.raises(SystemExit) as stopped:
        fit(config_of(world, "sft"), tmp_path)
    assert stopped.value.code == 75
    assert zj.load_model(tmp_path).lineage["step"] in (3, 4)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["doing"] == "stopped"
