"""KTO on labeled answers: rows with a mismatched answer, steps, whole runs, refusals."""

import functools

import jax
import numpy as np
import pytest
from conftest import device_mesh, with_fields
from preference_oracles import kto as oracle
from raw_rows import write
from runs import config_of, metrics_of
from test_evaluate import alone

import zephyr_jax as zj
from zephyr_jax.data.packing.batches import device_pairs, device_rows, make_plan, read_batches
from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.packing.plan import mismatched
from zephyr_jax.data.prepare.prepare import prepare, read_split, set_folder
from zephyr_jax.evaluation.scoring import pack_records, select_records
from zephyr_jax.training.loop import fit
from zephyr_jax.training.optim import make_optimizer
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.training.setup import pack, setup
from zephyr_jax.training.steps import initial_state, jitted_steps
from zephyr_jax.weights.checkpoint import Model

pytestmark = pytest.mark.usefixtures("one_device")


def records_of(data, name):
    return read_split(set_folder(str(data), name), "train_prefs")


@pytest.fixture(scope="module")
def labeled(world, tmp_path_factory):
    """The answers of the little world's pairs, labeled: all good ones, two bad ones of three."""
    root, rows = tmp_path_factory.mktemp("labeled"), []
    for i, record in enumerate(records_of(world / "data", "ultrafeedback/raw")):
        source = "ab"[i % 2]
        for side in ("chosen", "rejected")[: 1 + (i % 3 > 0)]:
            prompt = f"{record['prompt']} {i}"
            turns = {"prompt": prompt, "completion": record[side][-1]["content"]}
            rows.append(turns | {"label": side == "chosen", "source": source})
    prepare("unpaired", write(root / "mine.jsonl", rows), root / "data")
    return root


def kto_config(world, labeled, options=None, **train):
    """Ten steps of KTO on the labeled answers; the model is that of the other small runs."""
    config = config_of(world, "dpo", **train)
    data = {"data_dir": str(labeled / "data"), "dataset": "unpaired/own", "seq_len": 256}
    dpo = {"loss": "kto", "options": options or {}, "max_length": 128, "max_prompt_length": 64}
    return with_fields(config, data=data, dpo=dpo, optim={"peak_lr": 3e-3})


def answers_of(rows, ids):
    """(prompt, own answer, other answer, id) of every document of a batch, as tuples of tokens."""
    for row, own in zip(zip(*map(np.asarray, rows), strict=True), ids, strict=True):
        tokens, segments, _, branches, mask = row
        for k in range(segments.max()):
            here = segments == k + 1
            first = tuple(tokens[here & (branches < 2) & ~mask].tolist())
            both = (tuple(tokens[here & (branches == b) & mask].tolist()) for b in (1, 2))
            yield (first, *both, int(own[k]))


@pytest.fixture(scope="module")
def batches(world, labeled):
    """The packed set, and the documents of every step of two epochs."""
    packed = pack(kto_config(world, labeled))
    plan = make_plan(packed, 8, 2, 0)
    every = read_batches(packed, plan, "train", 0, plan.train_steps, 0)
    return packed, plan, [list(answers_of(batch.rows, batch.pair_ids)) for batch in every]


def test_each_prompt_is_also_scored_with_an_answer_of_its_batch_to_another_prompt(batches):
    packed, plan, steps = batches
    counts = packed.manifest["splits"]["train"]
    assert counts["desirable"] > counts["undesirable"] > 10
    for documents in steps[: plan.steps_per_epoch]:
        own = {(prompt, answer) for prompt, answer, _, _ in documents}
        answers = [answer for _, answer, _, _ in documents]
        assert sorted(other for _, _, other, _ in documents) == sorted(answers)
        assert not own & {(prompt, other) for prompt, _, other, _ in documents}
    first, second = steps[: plan.steps_per_epoch], steps[plan.steps_per_epoch :]
    every = [document for documents in first for document in documents]
    assert len(every) == counts["documents"] == counts["desirable"] + counts["undesirable"]
    assert sum(number > 0 for *_, number in every) == counts["desirable"]
    assert len({number for *_, number in every}) == len(every)
    assert first != second  # in another order, but the same batches: one reference serves all
    assert sorted(map(sorted, first)) == sorted(map(sorted, second))


def test_labels_are_those_of_the_records(labeled, batches, world):
    tok, steps = zj.Tokenizer.from_folder(world / "tokenizer"), batches[2]
    records = records_of(labeled / "data", "unpaired/own")
    wanted = [(record["messages"][-1]["content"], bool(record["label"])) for record in records]
    for _, answer, _, number in (document for documents in steps for document in documents):
        assert any(
            text.startswith(tok.decode(list(answer[:-2])).strip()[:20]) and good == (number > 0)
            for text, good in wanted
        )


def test_mismatched_turns_as_far_as_the_most_frequent_prompt_goes():
    prompts = np.array([5, 5, 7, 8, 9, 5, 3])
    other = mismatched([[0, 1, 2, 3, 4, 5], [6]], prompts)
    assert not (prompts[other] == prompts).any()
    assert sorted(other[:6]) == list(range(6))
    assert other[6] == 0  # alone in its batch: an answer of the first one
    alone = np.arange(5)  # as TRL rotates: the answer of the one before
    np.testing.assert_array_equal(mismatched([range(5)], alone), [4, 0, 1, 2, 3])
    assert set(mismatched([[0, 1]], np.array([4, 4]))) == {0, 1}  # not its own, where all are one


@pytest.fixture(scope="module")
def host_batch(world, labeled, batches):
    """A batch of eight with another model's log-probs as the reference's, and its documents."""
    packed, _, steps = batches
    model, plan = kto_config(world, labeled).model, make_plan(packed, 8, 2, 0, 4)
    batch = next(iter(read_batches(packed, plan, "train", 0, 1, 0)))
    params = zj.init_params(model, jax.random.key(2))
    score = jax.jit(functools.partial(reference_logps, model, n_pairs=batch.pair_ids.shape[1]))
    return batch, np.asarray(score(params, device_rows(batch))), steps[0]


WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.75}


@pytest.fixture(scope="module")
def updated(world, labeled, host_batch):
    """A function from the reference's values and micro-batches to a step's sums and state."""
    batch, programs = host_batch[0], {}

    def update(refs, n_micro=1):
        config = kto_config(world, labeled, WEIGHTS, micro_batches=n_micro)
        optimizer = make_optimizer(config.optim, lambda step: 1e-3)
        if n_micro not in programs:
            programs[n_micro] = jitted_steps(config, optimizer)[0]
        params = zj.init_params(config.model, jax.random.key(1))
        pairs = device_pairs(batch, device_rows(batch), refs)
        state, info = programs[n_micro](initial_state(config, optimizer, params), pairs)
        return jax.device_get(info), jax.device_get(state)

    return update


def logps_alone(model, params, documents):
    """Summed log-probs `N 2` of both answers, each sequence in a row of its own."""
    both = [(d[0], answer) for d in documents for answer in d[1:3]]
    sequences = [(*prompt, *answer) for prompt, answer in both]
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in both]
    longest = max(map(len, sequences))
    logps, _, _ = alone(Model(model, params, None, {}), sequences, masks, longest)
    return logps.sum(axis=1).reshape(-1, 2)


@pytest.mark.parametrize("rise", [-5.0, 5.0])  # of the other answers: an estimate of 0, or above 0
def test_a_step_has_the_loss_of_each_sequence_alone(world, labeled, host_batch, updated, rise):
    batch, refs, documents = host_batch
    refs = refs - np.float32([0, rise]) * (refs != 0)
    info, _ = updated(refs)
    model = kto_config(world, labeled).model
    logps = logps_alone(model, zj.init_params(model, jax.random.key(1)), documents)
    ref, good = refs[batch.pair_ids != 0], np.array([d[3] > 0 for d in documents])
    kl = (logps - ref)[:, 1].mean()
    assert kl * rise > 5
    losses = oracle(logps[:, 0], ref[:, 0], good, kl, 0.1, 1.0, 1.75)
    assert info["weight"] == 8
    np.testing.assert_allclose(info["loss"] / 8, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(info["kl"] / 8, kl, rtol=1e-4)
    reward = 0.1 * (logps - ref)[:, 0]
    np.testing.assert_allclose(info["rewards/chosen"], reward[good].sum(), rtol=1e-4)
    np.testing.assert_allclose(info["rewards/rejected"], reward[~good].sum(), rtol=1e-4)
    assert info["weight/chosen"] == good.sum()


def test_micro_batches_and_shards_have_the_estimate_of_the_whole_batch(host_batch, updated):
    refs = host_batch[1]
    refs = refs - np.float32([0, 5]) * (refs != 0)
    sums, state = updated(refs)
    assert sums["kl"] / 8 > 1
    with jax.set_mesh(device_mesh(1, 2, 1)):
        others, other = updated(refs, n_micro=2)
    for name, value in sums.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    # Adam's second moments are the squared gradients, whatever their sign's rounding
    leaves = map(jax.tree.leaves, (state.opt_state, other.opt_state))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max() + 1e-30))


def test_a_run_learns_and_writes_the_metrics_of_labels(world, labeled, tmp_path):
    config = kto_config(world, labeled, micro_batches=1, max_steps=5, checkpoint_every=0)
    fit(config, tmp_path)
    first, *_, last = metrics_of(tmp_path, "eval")
    counts = pack(config).manifest["splits"]
    held_out = counts["eval"]
    raised = counts["train"]["desirable"] / counts["train"]["undesirable"]
    share = held_out["desirable"] / (held_out["desirable"] + held_out["undesirable"])
    start = 0.5 * (share + (1 - share) * raised)  # every sigmoid is a half
    assert first["eval_loss"] == pytest.approx(start, abs=1e-6)
    assert first["eval_rewards/ties"] == 1
    assert first["eval_kl"] == first["eval_rewards/margins"] == 0
    assert last["eval_loss"] < start
    train = metrics_of(tmp_path, "train")[-1]
    assert {"kl", "rewards/accuracies", "logps/chosen", "pairs_per_s"} <= train.keys()
    margin = train["rewards/chosen"] - train["rewards/rejected"]
    assert train["rewards/margins"] == pytest.approx(margin, abs=1e-6)


def test_what_does_not_fit_is_refused_in_one_line(world, labeled, tmp_path):
    config = kto_config(world, labeled)
    pairs = config_of(world, "dpo").data
    pairs = {"data_dir": pairs.data_dir, "dataset": pairs.dataset}
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    wrong = {
        "has pairs and the run takes labeled answers": {"data": pairs},
        "has labeled answers and the run takes pairs": {"dpo": {"loss": "sigmoid"}},
        "has labeled answers and the run takes dialogues": {"dpo": None},
        "train.batch_size=1 must be at least 2": {"train": {"batch_size": 1}},
        "data.seq_len=255 must be at least twice dpo.max_length=128": {"data": {"seq_len": 255}},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message) as stop:
            build_packed(with_fields(config, **changes), tok)
        assert "\n" not in str(stop.value)
    sft = {"loss": {"kto": 1.0, "sft": 0.1}}
    for fields in (sft, {"options": {"wpo": 1}}, {"options": {"ld_alpha": 0.5}}):
        with pytest.raises(ValueError, match="must be kto alone, .* single labeled answers"):
            with_fields(config, dpo=fields)
    rows = [{"prompt": f"{i}?", "completion": "yes", "label": True} for i in range(30)]
    prepare("unpaired", write(tmp_path / "good.jsonl", rows), tmp_path / "data")
    good = with_fields(config, data={"data_dir": str(tmp_path / "data")})
    with pytest.raises(ValueError, match="the training set has 2. desirable and 0 undesirable"):
        setup(good, tmp_path / "run")
    sets = select_records(str(labeled / "data"), "unpaired/own", limit=2)
    with pytest.raises(ValueError, match="has labeled answers and the run takes dialogues"):
        pack_records(sets, tok, Rendering(config.chat, False, 64), 64)
