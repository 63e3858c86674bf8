"""The step against the same documents, each in a row by itself, on every mesh, for every loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import device_mesh, random_pair, stack_rows, with_fields

import zephyr_jax as zj
from zephyr_jax.config.run import SAVED, load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.losses.pairs import PairLogps, RewardShift
from zephyr_jax.losses.preference import loss_of
from zephyr_jax.losses.tokens import sft_loss, token_logps
from zephyr_jax.models.layers import embed, rms_norm
from zephyr_jax.models.mistral import token_scores
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import named_sharding, spec
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.scores import micro_batches, reference_logps
from zephyr_jax.training.steps import loss_sums, train_step
from zephyr_jax.types import PreferenceBatch, TrainState

LONGEST = 24


@pytest.fixture(scope="module")
def dpo_config(cfg):
    return dataclasses.replace(load_config("demo_dpo"), model=cfg)


@pytest.fixture(scope="module")
def sft_config(cfg):
    return dataclasses.replace(load_config("demo_sft"), model=cfg)


@pytest.fixture(scope="module")
def pairs():
    """Six pairs with answers of one to nine tokens, prompts of one to eleven."""
    rng = np.random.default_rng(5)
    sizes = [(6, 5, 7), (1, 3, 9), (11, 1, 1), (4, 8, 2), (7, 2, 6), (3, 4, 4)]
    return [random_pair(rng, 104, *size, pair_id=i + 1) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def preference_batch(pairs):
    """Two pairs a row, so that half of them lie behind another document; a fourth, empty row."""
    documents = [pair[3] for pair in pairs]
    packed = [packing.build_row(documents[i : i + 2], 48, 3) for i in (0, 2, 4)]
    packed.append(packing.build_row([], 48, 3))
    rng = np.random.default_rng(6)
    ids = np.stack([row["pair_ids"] for row in packed])
    ref = rng.normal(-30, 4, (4, 3, 2)).astype(np.float32) * (ids != 0)[..., None]
    return PreferenceBatch(stack_rows(packed), jnp.asarray(ids != 0), jnp.asarray(ref))


def rows_alone(pairs):
    """Tokens and targets `pair, answer, token` of each sequence prompt + answer."""
    tokens = np.zeros((len(pairs), 2, LONGEST), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, (prompt, *answers, _) in enumerate(pairs):
        for k, answer in enumerate(answers):
            n = len(prompt) + len(answer)
            tokens[i, k, :n], mask[i, k, len(prompt) : n] = prompt + answer, True
    return tokens, mask


def logps_alone(cfg, params, pairs):
    """Log-probs `pair, answer, token` of each sequence in a row by itself, and the logits."""
    tokens, mask = (x.reshape(-1, LONGEST) for x in rows_alone(pairs))
    logits = zj.forward(cfg, params, tokens)
    return token_logps(logits, tokens, mask).reshape(len(pairs), 2, LONGEST), logits


def loss_alone(config, params, pairs, batch, shift=0.0):
    """The mean loss from every answer's own row, sums and weights taken one by one."""
    dpo, loss = config.dpo, loss_of(config.dpo, config.train.micro_batches)
    logps, logits = logps_alone(config.model, params, pairs)
    mask = jnp.asarray(rows_alone(pairs)[1])
    tokens = mask.sum(-1)
    ref = jnp.asarray(batch.ref_logps)[jnp.asarray(batch.pair_mask)]
    rank = jnp.cumsum(mask, axis=-1)
    beyond = mask & (rank > tokens.min(axis=1)[:, None, None])
    sums = jnp.where(beyond, dpo.option("ld_alpha"), 1.0) * logps
    chosen, rejected = sums.sum(-1).T
    losses = loss(PairLogps(chosen, rejected, *ref.T, *tokens.T, shift=shift), dpo, jnp.ones(6))
    if dpo.option("wpo"):
        squares = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits), axis=-1)
        squares = jnp.pad(squares[:, :-1], ((0, 0), (1, 0))).reshape(mask.shape)
        mean = jnp.where(mask, logps - squares, 0.0).sum(-1) / tokens
        losses *= jax.lax.stop_gradient(jnp.exp(mean.sum(-1)))
    return losses.mean()


def assert_near(got, want, share):
    """The arrays of two trees differ by at most this share of a leaf's largest value."""
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a, b = jax.device_get((a, b))
        np.testing.assert_allclose(b, a, rtol=0, atol=share * float(np.abs(a).max()))


def test_packed_pairs_have_the_log_probs_of_each_sequence_alone(
    cfg, params, pairs, preference_batch
):
    rows, (_, mask) = preference_batch.rows, rows_alone(pairs)
    got = np.asarray(jax.jit(functools.partial(token_scores, cfg))(params, rows).logps)
    each = np.asarray(jax.jit(lambda p: logps_alone(cfg, p, pairs)[0])(params))
    compared = 0
    for i, (*_, document) in enumerate(pairs):
        at = np.flatnonzero(np.asarray(rows.segments[i // 2]) == i % 2 + 1)
        assert len(at) == len(document.tokens)
        for branch in (1, 2):
            here = at[(document.branches == branch) & document.loss_mask]
            want = each[i, branch - 1][mask[i, branch - 1]]
            np.testing.assert_allclose(got[i // 2, here], want, atol=1e-5)
            compared += len(here)
    assert compared == rows.loss_mask.sum()


MANY = {"sigmoid": 1.0, "ipo": 0.3, "simpo": 0.5, "orpo": 0.2, "sigmoid_norm": 2.0, "cpo": 0.1}
BOTH = {"apo_zero": 1.0, "sigmoid": 1.0}
CASES = {
    "dpo": {},
    "many": {"loss": MANY | {"sft": 0.4, "aot": 1.0, "aot_unpaired": 0.5}},
    "weighted by likelihood": {"loss": "sigmoid", "options": {"wpo": 1}},
    "shorter answers count more": {"loss": BOTH, "options": {"ld_alpha": 0.3}},
}
SLOW = ("weighted by likelihood", "shorter answers count more")


def mean_loss(config, batch):
    """The jitted mean loss of a batch and its gradients."""
    sums = loss_sums(config)

    def mean(params):
        total, out = sums(params, batch)
        return total / out.sums["weight"]

    return jax.jit(jax.value_and_grad(mean))


@pytest.fixture(scope="module")
def on_one_device(dpo_config, params, preference_batch):
    return mean_loss(dpo_config, preference_batch)(params)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in CASES]
)
def test_packed_pairs_have_the_loss_and_gradients_of_each_alone(
    dpo_config, params, pairs, preference_batch, on_one_device, name
):
    config = with_fields(dpo_config, dpo=CASES[name])
    alone = jax.value_and_grad(lambda p: loss_alone(config, p, pairs, preference_batch))
    want, want_grads = jax.jit(alone)(params)
    got, grads = on_one_device if name == "dpo" else mean_loss(config, preference_batch)(params)
    np.testing.assert_allclose(got, want, rtol=1e-5 if name == "dpo" else 2e-5)
    assert_near(grads, want_grads, 1e-4 if name == "dpo" else 2e-4)


def start(config, params, steps=10):
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, steps))
    copy = jax.tree.map(jnp.array, params)
    return optimizer, TrainState(jnp.int32(0), copy, jax.jit(optimizer.init)(copy))


@pytest.mark.parametrize(
    ("dtype", "n_micro"), [("float32", 1), pytest.param("bfloat16", 2, marks=pytest.mark.slow)]
)
def test_at_step_zero_the_loss_is_log_two_and_rewards_are_zero(
    dpo_config, params, preference_batch, n_micro, dtype
):  # pitfalls 14, 15
    config = with_fields(dpo_config, model={"dtype": dtype})
    score = jax.jit(functools.partial(reference_logps, config.model, n_pairs=3, n_micro=n_micro))
    batch = preference_batch._replace(ref_logps=score(params, preference_batch.rows))
    optimizer, state = start(config, params)
    step = jax.jit(train_step(loss_sums(config), optimizer, n_micro))
    state, info = step(state, batch)
    assert abs(float(info["loss"] / info["weight"]) - np.log(2)) < 1e-6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert info[name] == 0, name
    assert info["rewards/ties"] == info["weight"] == 6
    state, _ = step(state, batch)  # the first update has learning rate 0
    _, info = step(state, batch)
    assert abs(float(info["loss"] / info["weight"]) - np.log(2)) > 1e-5  # pitfall 15


def ragged_rows(n=8, t=16):
    rng = np.random.default_rng(7)
    rows = []
    for i in range(n):
        length = int(rng.integers(3, t + 1))
        ids = rng.integers(3, 104, length)
        targets = rng.random(length) < (0.9 if i % 2 else 0.2)
        targets[-1] = True
        rows.append(packing.build_row([packing.dialogue_document(ids, targets, t)], t, 0))
    return stack_rows(rows)


@pytest.fixture(scope="module")
def sft_grads(sft_config, params):
    """The metrics and gradients of rows in n micro-batches."""

    @functools.cache
    def step_of(n):
        return jax.jit(train_step(loss_sums(sft_config), optax.sgd(1.0), n))

    def grads(rows, n=1):
        begun = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
        state, info = step_of(n)(begun, rows)
        return info, jax.tree.map(lambda a, b: a - b, params, state.params)

    return grads


@pytest.mark.parametrize("n_micro", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(sft_grads, n_micro):  # pitfalls 24, 49
    (info, want), (same, got) = sft_grads(ragged_rows()), sft_grads(ragged_rows(), n_micro)
    np.testing.assert_allclose(info["loss"] / info["weight"], same["loss"] / same["weight"], 1e-6)
    assert_near(got, want, 1e-5)  # measured 4.1e-6: the order of float32 additions


def test_padding_tokens_may_be_any_id(sft_grads):  # pitfalls 3, 38
    rows = ragged_rows()
    eos = rows._replace(tokens=np.where(rows.segments == 0, 2, rows.tokens))
    assert_near(sft_grads(eos), sft_grads(rows), 0)


@pytest.mark.parametrize("mesh", [(2, 2, 1), (4, 1, 1), (1, 4, 1)])
def test_micro_batches_keep_rows_on_their_devices(mesh):
    rows = jnp.arange(16).reshape(8, 2)
    np.testing.assert_array_equal(micro_batches(rows, 2)[0], rows[0::2])
    with jax.set_mesh(device_mesh(*mesh)):
        placed = jax.device_put(rows, named_sharding(spec("BT")))
        got = jax.jit(lambda x: micro_batches(x, 2))(placed)
        assert jax.typeof(got).sharding.spec == jax.P(None, ("data", "fsdp"), None)


def test_a_preference_step_on_eight_devices_is_that_on_one_and_moves_no_rows(
    dpo_config, params, preference_batch, on_one_device
):
    """Nothing but gathers of weights, reductions, and the embedding's gradients to their places.

    tests/training/test_sequence.py has more meshes, and dialogues.
    """
    sgd = optax.sgd(1.0)
    step = jax.jit(train_step(loss_sums(dpo_config), sgd, 1))
    host_params, batch = jax.device_get((params, preference_batch))
    with jax.set_mesh(device_mesh(2, 2, 2)):
        placed = jax.device_put(host_params, param_shardings(dpo_config.model))
        place = lambda x: jax.device_put(x, named_sharding(spec("BTSG"[: x.ndim])))  # noqa: E731
        batch = jax.tree.map(place, batch)
        state = TrainState(jnp.int32(0), placed, sgd.init(placed))
        compiled = step.lower(state, batch).compile()
        after, info = jax.device_get(compiled(state, batch))
    loss, grads = on_one_device
    np.testing.assert_allclose(info["loss"] / info["weight"], loss, rtol=1e-5)
    assert_near(jax.tree.map(lambda a, b: a - b, host_params, after.params), grads, 1e-4)
    text = compiled.as_text()
    assert "all-reduce" in text
    exchanged = [line for line in text.splitlines() if " all-to-all(" in line]
    assert len(exchanged) == 1
    assert "embedding_gradient" in exchanged[0]
    assert "collective-permute" not in text


def test_the_answers_end_token_carries_loss(cfg, params):  # pitfall 3
    document = packing.dialogue_document([1, 5, 9, 2], [0, 0, 1, 1], 8)
    rows = stack_rows([packing.build_row([document], 8, 0)])
    logps = jax.jit(functools.partial(token_scores, cfg))(params, rows).logps
    assert logps[0, 3] < 0
    _, info = sft_loss(logps, jnp.asarray(rows.loss_mask))
    assert info.weight == 2


@pytest.mark.parametrize("remat", ["dots", "offload", ("q", "k", "v", "attention")])
def test_gradients_are_the_same_whatever_is_saved(cfg, params, grads_of, remat):
    assert_near(grads_of(remat), grads_of("none"), 1e-5)


@pytest.fixture(scope="module")
def grads_of(cfg, params):
    """The gradients of a small batch, by what is saved for the backward pass."""
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 104)

    def loss(params, remat):
        logits = zj.forward(cfg, params, tokens, options=zj.ForwardOptions(remat=remat))
        return token_logps(logits, tokens, tokens > -1).sum()

    return functools.cache(functools.partial(jax.jit(jax.grad(loss), static_argnums=1), params))


def test_named_outputs_are_what_is_saved(cfg, params):
    tokens = jnp.ones((2, 7), jnp.int32)

    def products(remat):
        options = zj.ForwardOptions(remat=remat)
        grad = jax.grad(lambda p: zj.forward(cfg, p, tokens, options=options).sum())
        return str(jax.make_jaxpr(grad)(params)).count("dot_general")

    assert products(SAVED) < products(("q", "k", "v")) < products("full")


def test_the_embedding_gradient_is_summed_in_float32():
    """A token that occurs 4,096 times in a bfloat16 batch; a bfloat16 sum of ones stops at 256."""
    tokens = jnp.full((4, 1024), 7)

    def total(table):
        return embed(table, tokens, "bfloat16", "float32", "BTD").astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(total))(jnp.ones((11, 3)))
    np.testing.assert_array_equal(grad[7], 4096)
    assert not grad[:7].any()


def test_norm_scales_get_float32_gradients():
    x = jnp.ones((4, 1024, 3), jnp.bfloat16)

    def total(scale):
        return rms_norm(x, scale, 1e-5).astype(jnp.float32).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.ones(3)), 4096, rtol=1e-3)


def test_the_mean_reward_is_carried_from_step_to_step(dpo_config, params, pairs, preference_batch):
    config = with_fields(dpo_config, dpo={"loss": "bco_pair", "options": {"bco_decay": 0.5}})
    optimizer, state = start(config, params)
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


@pytest.mark.parametrize(
    ("dpo", "n_micro", "message"),
    [
        ({"loss": {"sigmoid": 1.0, "dpo": 1.0}}, 1, "dpo.loss='dpo' is not known; use one of sig"),
        ({"reference": "none"}, 1, "must be one of simpo, .* dpo.reference is none"),
        ({"loss": "aot"}, 2, "train.micro_batches=2 must be 1, and wpo 0"),
        ({"loss": "aot", "options": {"wpo": 1}}, 1, "must be without aot, aot_unpaired, which"),
        ({"options": {"bco_decay": 0.9}}, 1, "dpo.options.bco_decay=0.9 is read by bco_pair alone"),
        ({"options": {"gamma_ratio": 1}}, 1, "is no option; did you mean simpo_gamma_ratio"),
        ({"options": {"ref_sync_steps": 9}}, 1, "read by synced alone; this run has dpo.loss=sigm"),
        ({"loss": "ipo", "label_smoothing": 0.1}, 1, "dpo.label_smoothing=0.1 is read by sigmoid"),
        ({"loss": "exo_pair"}, 1, "label_smoothing=0 makes exo_pair infinite"),
        ({"loss": "nca_pair", "divergence": "js"}, 1, "divergence='js' leaves in the rewards"),
        ({"reference": "live"}, 1, "reference='live' is not known; use one of precomputed, in_m"),
        ({"beta": 0.0}, 1, "beta=0.0 must be above 0"),
        ({"loss": {"sigmoid": -1.0}}, 1, "weight -1.0 of sigmoid must be a number above 0"),
        ({"loss": ""}, 1, "dpo.loss='' is empty"),
        ({"reference": "adapter_off"}, 1, "dpo.reference=adapter_off needs adapters"),
    ],
)
def test_what_does_not_go_together_is_refused(dpo_config, dpo, n_micro, message):
    with pytest.raises(ValueError, match=message):
        loss_of(with_fields(dpo_config, dpo=dpo).dpo, n_micro)
