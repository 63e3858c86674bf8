"""The step of every preference loss against the same pairs, each answer in a row by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_steps
from test_steps import alone

import zephyr_jax as zj
from zephyr_jax.losses.pairs import PairLogps
from zephyr_jax.losses.preference import ACROSS_BATCH, LOSSES, REFERENCE_FREE, loss_of
from zephyr_jax.training.steps import loss_sums, train_step

dpo_config, pairs = test_steps.dpo_config, test_steps.pairs
preference_batch = test_steps.preference_batch


def run_with(config, **dpo):
    return dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, **dpo))


def loss_alone(config, params, pairs, batch, shift=0.0):
    """The mean loss from every answer's own row, sums and weights taken one by one."""
    dpo, loss = config.dpo, loss_of(config.dpo, config.train.micro_batches)
    logps, mask = alone(config.model, params, pairs)
    mask, tokens = jnp.asarray(mask), jnp.asarray(mask).sum(-1)
    ref = jnp.asarray(batch.ref_logps)[jnp.asarray(batch.pair_mask)]
    rank = jnp.cumsum(mask, axis=-1)
    beyond = mask & (rank > tokens.min(axis=1)[:, None, None])
    sums = jnp.where(beyond, dpo.ld_alpha, 1.0) * logps
    chosen, rejected = sums.sum(-1).T
    losses = loss(PairLogps(chosen, rejected, *ref.T, *tokens.T, shift=shift), dpo, jnp.ones(6))
    if dpo.wpo:
        ids, _ = rows_alone(pairs)
        logits = zj.forward(config.model, params, ids.reshape(-1, ids.shape[-1]))
        squares = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits), axis=-1)
        squares = jnp.pad(squares[:, :-1], ((0, 0), (1, 0))).reshape(ids.shape)
        mean = jnp.where(mask, logps - squares, 0.0).sum(-1) / tokens
        losses *= jax.lax.stop_gradient(jnp.exp(mean.sum(-1)))
    return losses.mean()


def rows_alone(pairs):
    ids = np.zeros((len(pairs), 2, test_steps.LONGEST), np.int32)
    for i, (prompt, *answers, _) in enumerate(pairs):
        for k, answer in enumerate(answers):
            ids[i, k, : len(prompt) + len(answer)] = prompt + answer
    return ids, None


CASES = {
    "many": {
        "loss": {
            "sigmoid": 1.0,
            "ipo": 0.3,
            "simpo": 0.5,
            "orpo": 0.2,
            "sigmoid_norm": 2.0,
            "cpo": 0.1,
            "sft": 0.4,
        }
    },
    "ranks": {"loss": {"aot": 1.0, "aot_unpaired": 0.5}},
    "weighted by likelihood": {"loss": "sigmoid", "wpo": True},
    "shorter answers count more": {"loss": {"apo_zero": 1.0, "sigmoid": 1.0}, "ld_alpha": 0.3},
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("many", "ranks") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_losses_and_gradients_are_those_of_answers_alone(
    dpo_config, params, pairs, preference_batch, name
):
    config = run_with(dpo_config, **CASES[name])
    sums = loss_sums(config)

    def packed(params):
        total, out = sums(params, preference_batch)
        return total / out.sums["weight"]

    want, want_grads = jax.jit(
        jax.value_and_grad(lambda p: loss_alone(config, p, pairs, preference_batch))
    )(params)
    got, grads = jax.jit(jax.value_and_grad(packed))(params)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(want_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(np.abs(a).max()))


def test_the_mean_reward_is_carried_from_step_to_step(dpo_config, params, pairs, preference_batch):
    from zephyr_jax.losses.pairs import RewardShift

    config = run_with(dpo_config, loss="bco_pair", bco_decay=0.5)
    optimizer, state = test_steps.start(config, params)
    state = state._replace(shift=RewardShift(jnp.float32(0), jnp.float32(0)))
    step = jax.jit(train_step(loss_sums(config), optimizer, 2, shift_decay=0.5))
    alone_loss = jax.jit(
        lambda params, shift: loss_alone(config, params, pairs, preference_batch, shift=shift)
    )
    total = weight = 0.0
    for _ in range(3):
        delta = total / weight if weight else 0.0
        want = alone_loss(state.params, delta)
        state, info = step(state, preference_batch)
        np.testing.assert_allclose(info["loss"] / info["weight"], want, rtol=2e-5)
        rewards = float(info["rewards/chosen"] + info["rewards/rejected"])
        total, weight = 0.5 * total + rewards / 2, 0.5 * weight + 6
        np.testing.assert_allclose(state.shift.delta, total / weight, rtol=1e-5)
    assert delta != 0


def test_every_loss_runs_in_a_step(dpo_config, params, preference_batch):
    """One trace each: names, options and the reference's absence go together."""
    assert len(LOSSES) >= 18
    assert set(ACROSS_BATCH) | set(REFERENCE_FREE) < set(LOSSES)
    for name in LOSSES:
        mode = "none" if name in REFERENCE_FREE else "precomputed"
        smoothing = 0.1 if name == "exo_pair" else 0.0
        config = run_with(dpo_config, loss=name, reference=mode, label_smoothing=smoothing)
        shape = jax.eval_shape(loss_sums(config), params, preference_batch)
        assert shape[1].pairs.losses.shape == (4, 3)


@pytest.mark.parametrize(
    ("dpo", "n_micro", "said"),
    [
        (
            {"loss": {"sigmoid": 1.0, "dpo": 1.0}},
            1,
            "dpo.loss='dpo' is not known; use one of sigmoid, ",
        ),
        ({"reference": "none"}, 1, "compares with a reference, and dpo.reference is none"),
        ({"loss": "aot"}, 2, "train.micro_batches=1, and these are False and 2"),
        ({"loss": "aot", "wpo": True}, 1, "it takes dpo.wpo=False and .* these are True and 1"),
        ({"bco_decay": 0.9}, 1, "dpo.bco_decay=0.9 is for bco_pair, and dpo.loss is sigmoid"),
        ({"loss": "exo_pair"}, 1, "label_smoothing=0 makes exo_pair infinite"),
        ({"loss": "nca_pair", "divergence": "js"}, 1, "divergence='js' leaves a term"),
    ],
)
def test_what_does_not_go_together_is_refused(dpo_config, dpo, n_micro, said):
    config = run_with(dpo_config, **dpo)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batches=n_micro)
    )
    with pytest.raises(ValueError, match=said):
        loss_of(config.dpo, config.train.micro_batches)


@pytest.mark.parametrize(
    ("dpo", "said"),
    [
        ({"reference": "live"}, "dpo.reference='live' is not known; use one of precomputed, in_m"),
        ({"ref_sync_alpha": 0.0}, r"dpo.ref_sync_alpha=0.0 must be in \(0, 1\]"),
        ({"ref_sync_steps": 0}, "ref_sync_steps=0 must be positive"),
        ({"bco_decay": 1.5}, r"dpo.bco_decay=1.5 must be in \[0, 1\], or None"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"loss": {"sigmoid": -1.0}}, "weight -1.0 of sigmoid must be a number above 0"),
        ({"loss": ""}, "dpo.loss='' is empty"),
        ({"reference": "adapter_off"}, "dpo.reference=adapter_off needs config.lora"),
    ],
)
def test_wrong_options_are_refused(dpo_config, dpo, said):
    with pytest.raises(ValueError, match=said):
        run_with(dpo_config, **dpo)
