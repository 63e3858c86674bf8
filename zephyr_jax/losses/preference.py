"""The preference losses, each a pure function from pairs of log-probs to one loss a pair.

Every loss of pairs is `(pairs, options, weights) -> losses`, float32, of the pairs' own shape. A
trainer multiplies by its weights, sums, and divides by their sum. A pair of weight 0 is padding;
its loss is finite where its entries are. A new loss is one function and its name in `_ALL`.

In the equations w is the chosen and l the rejected answer y, |y| its number of tokens, e is
`label_smoothing`, and

    d(y) = log pi(y|x) - log ref(y|x)    r(y) = beta d(y)    a(y) = log pi(y|x) / |y|
    s(y) = `divergence_score` of d(y), by default d(y) itself    m = beta (s(w) - s(l))

Each loss equals that of its name in TRL 1.16 unless its docstring names a difference.
"""
# ruff: noqa: ARG001 - one signature for all; only a loss that looks across the batch has weights

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from zephyr_jax.config import choose, require
from zephyr_jax.config.preference import REFERENCE_FREE, DpoConfig, LossOptions
from zephyr_jax.losses import pairs as common
from zephyr_jax.losses.pairs import Loss, Losses, PairLogps, Weights

DISCOPOP_TAU = 0.05  # the paper's


def _margin(pairs: PairLogps, options: LossOptions, *, mean: bool = False) -> Losses:
    """The margin m; with `mean` each score is divided by its answer's tokens."""
    chosen, rejected = (common.divergence_score(d, options) for d in common.log_ratios(pairs))
    if mean:
        chosen = common.per_token(chosen, pairs.chosen_tokens)
        rejected = common.per_token(rejected, pairs.rejected_tokens)
    return options.beta * chosen - options.beta * rejected


def sigmoid(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """The DPO losses; with e above 0 those of conservative DPO.

    -(1-e) log sigmoid(m) - e log sigmoid(-m): Rafailov et al. 2023, arXiv:2305.18290, eq. 7; e:
    Mitchell 2023, ericmitchell.ai/cdpo.pdf; divergences: Wang et al. 2023, arXiv:2309.16240.
    """
    return common.smoothed(_margin(pairs, options), options)


def sigmoid_norm(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (s(w) / |w| - s(l) / |l|)): Lambert et al. 2024, arXiv:2411.15124."""
    return -log_sigmoid(_margin(pairs, options, mean=True))


def robust(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """(-(1-e) log sigmoid(m) + e log sigmoid(-m)) / (1-2e), which is not bounded below.

    Unbiased if a fraction e of pairs is flipped: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    margin, e = _margin(pairs, options), options.label_smoothing
    return (-(1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1 - 2 * e)


def hinge(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """max(0, 1 - m).

    RSO, Liu et al. 2023, arXiv:2309.06657; SLiC-HF, arXiv:2305.10425, has delta times this, with
    beta = 1/delta and a reference of 0.
    """
    return jax.nn.relu(1 - _margin(pairs, options))


def ipo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """(s(w) / |w| - s(l) / |l| - 1 / (2 beta))^2, beta the paper's tau.

    IPO, Azar et al. 2023, arXiv:2310.12036, eq. 17, but per token, as in TRL.
    """
    margin = _margin(pairs, options, mean=True) / options.beta
    return jnp.square(margin - 1 / (2 * options.beta))


def exo_pair(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """KL of (sigmoid(m), sigmoid(-m)) to (1-e, e); e = 0 is a ValueError, the loss is infinite.

    EXO for two answers, Ji et al. 2024, arXiv:2402.00856, eq. 16, whose e is 1e-3.
    """
    e = options.label_smoothing
    if not e:
        raise ValueError("label_smoothing=0 makes exo_pair infinite; the paper's value is 1e-3")
    margin = _margin(pairs, options)
    agree, differ = log_sigmoid(margin), log_sigmoid(-margin)
    kept, flipped = jnp.log1p(jnp.float32(-e)), jnp.log(jnp.float32(e))
    return jnp.exp(agree) * (agree - kept) + jnp.exp(differ) * (differ - flipped)


def nca_pair(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(r(w)) - (log sigmoid(-r(w)) + log sigmoid(-r(l))) / 2.

    NCA of a preference, Chen et al. 2024, arXiv:2402.05369, section 4.1.
    """
    chosen, rejected = common.rewards(pairs, options)
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


def bco_pair(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(r(w) - delta) - log sigmoid(delta - r(l)), delta = `PairLogps.shift`.

    BCO, Jung et al. 2024, arXiv:2404.04656, section 4: delta is the running mean of both rewards, a
    `RewardShift`. TRL now subtracts nothing.
    """
    chosen, rejected = common.rewards(pairs, options)
    delta = jax.lax.stop_gradient(jnp.asarray(pairs.shift, jnp.float32))
    return -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected)


def apo_zero(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """1 - sigmoid(r(w)) + sigmoid(r(l)): for chosen answers better than the model's.

    APO, D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, which has no 1.
    """
    chosen, rejected = common.rewards(pairs, options)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """sigmoid(r(w)) + 1 - sigmoid(r(w) - r(l)): for chosen answers that are worse.

    APO, D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8, which has no 1.
    """
    chosen, rejected = common.rewards(pairs, options)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def sppo_hard(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """(d(w) - 1 / (2 beta))^2 + (d(l) + 1 / (2 beta))^2, beta the paper's 1/eta.

    SPPO, Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with winning probabilities 1 and 0.
    """
    chosen, rejected = common.log_ratios(pairs)
    target = 0.5 / options.beta
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def discopop(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-(1-g) log sigmoid(m) + g exp(-m), g = sigmoid(m / 0.05).

    The log-ratio modulated loss, Lu et al. 2024, arXiv:2406.08414, eq. 5. TRL's is NaN for m below
    -88; here the two exponents are added first.
    """
    margin = _margin(pairs, options)
    gate = margin / DISCOPOP_TAU
    exponential = jnp.exp(log_sigmoid(gate) - margin)
    return -jax.nn.sigmoid(-gate) * log_sigmoid(margin) + exponential


def _by_rank(higher: Losses, lower: Losses, options: LossOptions, weights: Weights) -> Losses:
    """Smoothed losses of rank against rank; a rank's loss goes to the pair of its `higher` value.

    Pairs of weight 0 come last. On a mesh every device sorts the whole batch.
    """
    shape, sharding = higher.shape, jax.typeof(higher).sharding
    on_mesh = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    flat = [x.reshape(-1) for x in (higher, lower, jnp.asarray(weights) > 0)]
    higher, lower, present = [jax.reshard(x, jax.P()) for x in flat] if on_mesh else flat
    highest, lowest = (jnp.argsort(jnp.where(present, x, jnp.inf)) for x in (higher, lower))
    gap = jnp.where(present[highest], higher[highest] - lower[lowest], 0.0)
    ranked = jnp.where(present[highest], common.smoothed(options.beta * gap, options), 0.0)
    losses = jnp.zeros_like(ranked).at[highest].set(ranked).reshape(shape)
    return jax.reshard(losses, sharding.spec) if on_mesh else losses


def aot(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (p_(i) - q_(i))), smoothed as in `sigmoid`; x_(i) has rank i in a batch.

    p = log pi(w) - log pi(l), q the same of the reference. AOT for pairs, Melnyk et al. 2024,
    arXiv:2406.05882, section 3, logistic cost, hard sorting; TRL added smoothing.
    """
    chosen, rejected, ref_chosen, ref_rejected = (jnp.asarray(x, jnp.float32) for x in pairs[:4])
    return _by_rank(chosen - rejected, ref_chosen - ref_rejected, options, weights)


def aot_unpaired(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (d(w)_(i) - d(l)_(i))): as `aot`, of answers that need not be pairs."""
    return _by_rank(*common.log_ratios(pairs), options, weights)


def simpo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (a(w) - a(l)) - gamma), gamma = beta simpo_gamma_ratio; no reference.

    SimPO, Meng et al. 2024, arXiv:2405.14734, eq. 6. With `reward_alpha` A, (1 - exp(-A a)) / A
    stands for a: AlphaPO, Gupta et al. 2025, arXiv:2501.03884. TRL: CPOTrainer with `cpo_alpha` 0;
    its `simpo_gamma` is gamma itself.
    """
    alpha, logps = options.option("reward_alpha"), common.mean_logps(pairs)
    chosen, rejected = (common.power_score(a, alpha) for a in logps)
    gap = chosen - rejected - options.option("simpo_gamma_ratio")
    return common.smoothed(options.beta * gap, options)


def orpo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-a(w) - beta log sigmoid(log odds(w) - log odds(l)), odds = exp(a) / (1 - exp(a)).

    No reference. Hong et al. 2024, arXiv:2403.07691, eqs. 4, 6 and 7, beta the paper's lambda. The
    first term of TRL's ORPOTrainer is the mean over the batch's tokens, prompts included.
    """
    chosen, rejected = common.mean_logps(pairs)
    odds = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - options.beta * log_sigmoid(odds)


def _log_odds(logp: Losses) -> Losses:
    logp = jnp.minimum(logp, -(2.0**-24))  # the nearest to 0 that has finite odds
    return logp - jax.nn.log1mexp(-logp)


def cpo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (log pi(w) - log pi(l))) - a(w); no reference.

    CPO, Xu et al. 2024, arXiv:2401.08417, eq. 3, whose second term is a sum; that of TRL's
    CPOTrainer is the mean over the batch's tokens.
    """
    chosen, rejected = (jnp.asarray(x, jnp.float32) for x in pairs[:2])
    preference = common.smoothed(options.beta * (chosen - rejected), options)
    return preference + sft(pairs, options, weights)


def sft(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-a(w), nats per token, the term of RPO, Pang et al. 2024, arXiv:2404.19733; no reference.

    TRL takes the mean over the batch's tokens; here, as in the paper, each pair has its own mean.
    """
    return -common.per_token(pairs.chosen, pairs.chosen_tokens)


def kto(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """The losses of answers w that are each good or bad alone.

    desirable_weight (1 - sigmoid(beta (d(w) - z))) of a good one, of a bad one undesirable_weight
    (1 - sigmoid(beta (z - d(w)))): Ethayarajh et al. 2024, arXiv:2402.01306, eqs. 7 and 8.
    z = max(0, mean d(l)) without gradient, l an answer to another prompt of the batch, estimates
    KL(policy || reference). The z of TRL's KTOTrainer is that of a micro-batch, not of the batch.
    """
    good, other = common.log_ratios(pairs)
    kl = pairs.shift
    if kl is None:
        present = (jnp.asarray(weights) > 0).astype(jnp.float32)
        kl = common.kl_estimate((present * other).sum(), present.sum())
    gain = options.beta * (good - kl)
    desirable = options.option("desirable_weight") * jax.nn.sigmoid(-gain)
    undesirable = options.option("undesirable_weight") * jax.nn.sigmoid(gain)
    label = True if pairs.desirable is None else pairs.desirable
    return jnp.where(label, desirable, undesirable)


_ALL = (sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, apo_zero, apo_down)
_ALL += (sppo_hard, discopop, aot, aot_unpaired, simpo, orpo, cpo, sft, kto)
LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in _ALL}
LABEL_WEIGHTS = ("desirable_weight", "undesirable_weight")
ACROSS_BATCH = ("aot", "aot_unpaired")  # a pair's loss depends on the others of its batch


def balanced(dpo: DpoConfig, counts: dict[str, int]) -> DpoConfig:
    """`dpo` with weights of labels, by default so that both labels weigh the same together.

    The paper advises 1 to 4/3 for the desirable ones' share. A ValueError if a label is missing.
    """
    good, bad = counts["desirable"], counts["undesirable"]
    if not (good and bad):
        raise ValueError(
            f"dpo.loss=kto learns from good and bad answers, and the training set has {good} "
            f"desirable and {bad} undesirable ones; add the others, or take SFT"
        )
    if dpo.options.keys() & {*LABEL_WEIGHTS}:
        return dpo
    weights = dict(zip(LABEL_WEIGHTS, (max(1.0, bad / good), max(1.0, good / bad)), strict=True))
    return dataclasses.replace(dpo, options=dpo.options | weights)


def combined(weights_of: dict[str, float]) -> Loss:
    """The weighted sum of several losses of `LOSSES`; {"sigmoid": 1, "sft": a} is RPO."""
    for name in weights_of:
        choose("dpo.loss", name, tuple(LOSSES))

    def loss(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
        parts = [w * LOSSES[name](pairs, options, weights) for name, w in weights_of.items()]
        return sum(parts[1:], start=parts[0])

    return loss


def loss_of(dpo: DpoConfig, n_micro: int) -> Loss:
    """The loss of a preference stage of `n_micro` micro-batches; a ValueError if options misfit."""
    names = dpo.loss_weights
    loss = combined(names)
    free = dpo.reference != "none" or not names.keys() - {*REFERENCE_FREE}
    rule = f"one of {', '.join(REFERENCE_FREE)}, as dpo.reference is none; or take precomputed"
    require(free, "dpo.loss", dpo.loss, rule)
    ranked = n_micro > 1 or dpo.option("wpo")
    rule = f"without {', '.join(ACROSS_BATCH)}, which rank a whole batch: "
    rule += f"train.micro_batches={n_micro} must be 1, and wpo 0"
    require(not (ranked and names.keys() & {*ACROSS_BATCH}), "dpo.loss", dpo.loss, rule)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(lambda x: loss(PairLogps(*[x] * 6), dpo, x), one)  # refuses what they refuse
    return loss
