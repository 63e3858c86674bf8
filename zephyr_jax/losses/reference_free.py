"""The preference losses that need no reference; `zephyr_jax.losses.preference` says what all share.

w is the chosen and l the rejected answer, a(y) = log pi(y|x) / |y| the mean log-prob of a token.
"""
# ruff: noqa: ARG001 - one signature for all losses

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import log_sigmoid

from zephyr_jax.config.preference import LossOptions
from zephyr_jax.losses.pairs import (
    Loss,
    Losses,
    PairLogps,
    Weights,
    per_token,
    power_score,
    smoothed,
)

_LEAST = 2.0**-24  # a token's log-prob this near to 0 is the nearest that has finite odds


def simpo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (a(w) - a(l)) - gamma), no reference.

    SimPO, Meng et al. 2024, arXiv:2405.14734, eq. 6; gamma = beta simpo_gamma_ratio, as the paper
    tunes it. With `reward_alpha` A, (1 - exp(-A a)) / A stands for a: AlphaPO, Gupta et al. 2025,
    arXiv:2501.03884. TRL: CPOTrainer's "simpo" with `cpo_alpha` 0 (its default adds `sft`) and
    "alphapo"; its `simpo_gamma` is gamma itself, and smoothing as in `sigmoid` is its addition.
    """
    chosen, rejected = (power_score(a, options.reward_alpha) for a in _mean_logps(pairs))
    return smoothed(options.beta * (chosen - rejected - options.simpo_gamma_ratio), options)


def _mean_logps(pairs: PairLogps) -> tuple[Losses, Losses]:
    chosen = per_token(pairs.chosen, pairs.chosen_tokens)
    return chosen, per_token(pairs.rejected, pairs.rejected_tokens)


def orpo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-a(w) - beta log sigmoid(log odds(w) - log odds(l)); no reference.

    a is the mean log-prob of a token and odds = exp(a) / (1 - exp(a)): ORPO, Hong et al. 2024,
    arXiv:2403.07691, eqs. 4, 6 and 7, beta the paper's lambda. TRL: ORPOTrainer, whose first term
    is the mean over prompt and answer tokens of the batch; here, as in the paper, it is the
    answer's. TRL's gradient is NaN at a = 0; here that counts as the nearest float32 below.
    """
    chosen, rejected = _mean_logps(pairs)
    odds = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - options.beta * log_sigmoid(odds)


def _log_odds(logp: Losses) -> Losses:
    """The log-odds logp - log(1 - exp(logp)); each branch is given only what it is exact for."""
    logp = jnp.minimum(logp, -_LEAST)
    near = logp > -0.6931472  # -log 2
    small = jnp.log(-jnp.expm1(jnp.where(near, logp, -1.0)))
    large = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp)))
    return logp - jnp.where(near, small, large)


def cpo(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log sigmoid(beta (log pi(w) - log pi(l))) - a(w); no reference.

    a is the mean log-prob of a token: CPO, Xu et al. 2024, arXiv:2401.08417, eq. 3, whose second
    term is the sum over the answer. TRL: CPOTrainer's "sigmoid", which takes the mean over the
    batch's tokens, and has added smoothing. Here it is a pair's own mean, as in `sft`.
    """
    chosen, rejected = (jnp.asarray(x, jnp.float32) for x in pairs[:2])
    preference = smoothed(options.beta * (chosen - rejected), options)
    return preference + sft(pairs, options, weights)


def sft(pairs: PairLogps, options: LossOptions, weights: Weights) -> Losses:
    """-log pi(w) / |w|: the chosen answer's negative log-likelihood, nats per token.

    The term of RPO, Pang et al. 2024, arXiv:2404.19733, eq. 1. TRL: "sft" next to "sigmoid", which
    takes the mean over the batch's tokens. Here, as in the paper, each pair has its own mean.
    """
    return -per_token(pairs.chosen, pairs.chosen_tokens)


REFERENCE_FREE: dict[str, Loss] = {"simpo": simpo, "orpo": orpo, "cpo": cpo, "sft": sft}
