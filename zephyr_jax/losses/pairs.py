"""The inputs of the preference losses, and what several of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

from zephyr_jax.config.preference import LossOptions
from zephyr_jax.types import AnyArray

Values = Float[AnyArray, "*N"]
Losses = Float[Array, "*N"]
Weights = Float[AnyArray, "*N"] | Bool[AnyArray, "*N"]
Loss = Callable[["PairLogps", LossOptions, Weights], Losses]
_LARGEST_EXPONENT = 40.0  # of exp(): its square, times a log-ratio, is still a float32


class PairLogps(NamedTuple):
    """Log-probs of pairs, nats, summed over an answer's target tokens, and how many those are."""

    chosen: Values
    rejected: Values
    ref_chosen: Values
    ref_rejected: Values
    chosen_tokens: Values
    rejected_tokens: Values
    # Of `bco_pair` the mean reward of earlier pairs; of `kto` the batch's KL, None: of these pairs
    shift: Float[AnyArray, ""] | float | None = 0.0
    desirable: Bool[AnyArray, "*N"] | None = None  # `kto`: the label of `chosen`; None: all good


def kl_estimate(total: Array, weight: Array) -> Float[Array, ""]:
    """max(0, total / weight) without gradient, from the log-ratios of answers to other prompts."""
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(weight, 1.0), 0.0))


def power_score(x: Values, alpha: float) -> Losses:
    """(1 - exp(-alpha x)) / alpha, x for alpha = 0; exponents above 40 count as 40; float32."""
    x = jnp.asarray(x, jnp.float32)
    return x if alpha == 0 else -jnp.expm1(jnp.minimum(-alpha * x, _LARGEST_EXPONENT)) / alpha


def divergence_score(log_ratio: Values, options: LossOptions) -> Losses:
    """f'(u) - f'(1) at u = exp(log_ratio), the ratio of policy to reference; float32.

    The reward of an answer is beta f'(u) up to a term of the prompt alone (Wang et al. 2023,
    arXiv:2309.16240, table 1):

        reverse_kl  log u
        forward_kl  1 - 1/u
        js          log(2u / (1 + u))
        a number a  (1 - u^-a) / a;  0 is reverse_kl, 1 is forward_kl

    f'(1) is subtracted so that a score is 0 at the reference. The coefficient of TRL's
    `f_divergence_type` is 1 - alpha.
    """
    log_ratio = jnp.asarray(log_ratio, jnp.float32)
    if options.divergence == "js":
        return math.log(2) + log_sigmoid(log_ratio)
    alphas: dict[Any, Any] = {"reverse_kl": 0.0, "forward_kl": 1.0}
    return power_score(log_ratio, float(alphas.get(options.divergence, options.divergence)))


def ld_logps(shared: Values, rest: Values, alpha: float) -> Losses:
    """Log-probs, nats, in which tokens beyond the other answer's length count `alpha`.

    shared + alpha rest: LD-DPO, Liu et al. 2024, arXiv:2409.06411. TRL: `ld_alpha`.
    """
    return jnp.asarray(shared, jnp.float32) + alpha * jnp.asarray(rest, jnp.float32)


def wpo_weights(sums: Float[AnyArray, "*N 2"], tokens: Float[AnyArray, "*N 2"]) -> Losses:
    """The factors of losses by how likely the policy is to write each pair; float32, no gradient.

    w(y_w) w(y_l), w(y) = exp(mean over tokens of log p(y_t) - log sum_v p(v)^2), whose sums are
    `sums`: WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2, aligned. TRL: `use_weighting`.
    """
    return jax.lax.stop_gradient(jnp.exp(per_token(sums, tokens).sum(axis=-1)))


def per_token(sums: Values, tokens: Values) -> Losses:
    """Sums over answers divided by their numbers of tokens, float32; no tokens count as one."""
    return jnp.asarray(sums, jnp.float32) / jnp.maximum(jnp.asarray(tokens, jnp.float32), 1.0)


def mean_logps(pairs: PairLogps) -> tuple[Losses, Losses]:
    """Log-probs of the answers under the policy divided by their tokens, float32."""
    chosen = per_token(pairs.chosen, pairs.chosen_tokens)
    return chosen, per_token(pairs.rejected, pairs.rejected_tokens)


def log_ratios(pairs: PairLogps) -> tuple[Losses, Losses]:
    """d(w) and d(l): log-probs of the answers less those of the reference, float32."""
    chosen, rejected, ref_chosen, ref_rejected = (jnp.asarray(x, jnp.float32) for x in pairs[:4])
    return chosen - ref_chosen, rejected - ref_rejected


def implicit_rewards(logps: Any, ref_logps: Any, beta: float) -> Any:
    """The rewards beta (log pi - log ref), arXiv:2305.18290, of NumPy or JAX arrays."""
    return beta * (logps - ref_logps)


def rewards(pairs: PairLogps, options: LossOptions) -> tuple[Losses, Losses]:
    """The implicit rewards of both answers, float32."""
    chosen, rejected = log_ratios(pairs)
    return options.beta * chosen, options.beta * rejected


def compared(name: str, values: Any) -> dict[str, Any]:
    """Whether the chosen value of `... 2` is above the rejected one, and whether both are equal."""
    chosen, rejected = values[..., 0], values[..., 1]
    return {f"{name}/accuracies": chosen > rejected, f"{name}/ties": chosen == rejected}


def preference_metrics(logps: Any, ref_logps: Any, beta: float) -> dict[str, Any]:
    """The metrics of each pair by TRL's names, from NumPy or JAX log-probs (chosen, rejected)."""
    both = implicit_rewards(logps, ref_logps, beta)
    values = {"rewards/margins": both[..., 0] - both[..., 1]}
    for name, each in (("rewards", both), ("logps", logps)):
        values |= compared(name, each)
        values |= {f"{name}/chosen": each[..., 0], f"{name}/rejected": each[..., 1]}
    return values


def label_metrics(logps: Any, ref_logps: Any, good: Any, beta: float) -> dict[str, Any]:
    """The metrics of labeled answers, from log-probs `... 2` of an answer and of a mismatched one.

    A reward with the sign of its answer's label is accurate; `kl` is the log-ratio of the
    mismatched answer. Names in chosen are of `good` answers (0 or 1), those in rejected of others.
    """
    rewards = implicit_rewards(logps, ref_logps, beta)[..., 0]
    signed = rewards * (2 * good - 1)
    values = {"kl": (logps - ref_logps)[..., 1]}
    values |= {"rewards/accuracies": signed > 0, "rewards/ties": signed == 0}
    for name, here in (("chosen", good), ("rejected", 1 - good)):
        values |= {f"weight/{name}": here, f"rewards/{name}": rewards * here}
        values[f"logps/{name}"] = logps[..., 0] * here
    return values


def means_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Every sum divided by its weight: `weight`, or `weight/X` for names in X; none of weight 0.

    `rewards/margins` of labeled answers is the difference of the two means, as in TRL.
    """
    means = {}
    for name in (name for name in sums if not name.startswith("weight")):
        own = sums.get(f"weight/{name.rpartition('/')[2]}")
        if own != 0:
            means[name] = sums[name] / (own or max(sums["weight"], 1.0))
    if "weight/chosen" in sums and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def smoothed(margin: Losses, options: LossOptions) -> Losses:
    """-(1-e) log sigmoid(margin) - e log sigmoid(-margin)."""
    e = options.label_smoothing
    losses = -(1 - e) * log_sigmoid(margin)
    return losses - e * log_sigmoid(-margin) if e else losses


class RewardShift(NamedTuple):
    """The running sum of rewards of `bco_pair`, and its weight; both start as 0."""

    sum: Float[AnyArray, ""]
    weight: Float[AnyArray, ""]

    @property
    def delta(self) -> Float[Array, ""]:
        """The mean reward so far; 0 before any pair."""
        return jnp.asarray(self.sum) / jnp.where(jnp.asarray(self.weight) > 0, self.weight, 1.0)

    def after(self, rewards_sum: Array, weight: Array, decay: float) -> RewardShift:
        """The shift after `weight` pairs and the sum of their rewards; old sums count `decay`."""
        return RewardShift(decay * self.sum + 0.5 * rewards_sum, decay * self.weight + weight)
