"""Log-probs of whole documents from packed rows: tokens on the devices, sums in float64 here."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.evaluation.documents import ScoreSet
from zephyr_jax.losses.tokens import token_logps
from zephyr_jax.models.mistral import forward
from zephyr_jax.models.scoring import token_scores
from zephyr_jax.sharding import axis_size, named_sharding, spec
from zephyr_jax.types import Params, Rows

LOGITS_AT_ONCE = 1 << 27  # entries on one device, of each of two models: 512 MB in float32


class Scorer(NamedTuple):
    """A model that gives log-probs."""

    cfg: MistralConfig
    params: Params


class Scored(NamedTuple):
    """Sums over the target tokens of `N` documents, by branch: 0 shared, 1 chosen, 2 rejected.

    A dialogue has only branch 0, a pair only the two answers.
    """

    logps: np.ndarray  # N 3 float64, nats
    tokens: np.ndarray  # N 3 float64, how many were summed
    ref_logps: np.ndarray | None = None  # N 3; None without a reference
    kl: np.ndarray | None = None  # N 3, sums of KL(model || reference) of each token's distribution


@functools.partial(jax.jit, static_argnames=("cfg", "branched"))
def _score(cfg: MistralConfig, params: Params, rows: Rows, branched: bool) -> Array:
    return token_scores(cfg, params, rows, branched=branched).logps


@functools.partial(jax.jit, static_argnames=("cfg", "branched"))
def _logits(cfg: MistralConfig, params: Params, rows: Rows, branched: bool) -> Array:
    branches = rows.branches if branched else None
    return forward(cfg, params, rows.tokens, rows.segments, branches, rows.positions)


@jax.jit
def token_kl(
    logits: Float[Array, "B T V"],
    ref_logits: Float[Array, "B T V"],
    loss_mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Entry t is KL(p || r) = sum_v p(v) (log p(v) - log r(v)) where token t is predicted, nats.

    Exact, over the whole vocabulary; 0 where masked. The predictor of token t is entry t-1.
    """
    logp, logr = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, ref_logits))
    each = (jnp.exp(logp) * (logp - logr)).sum(axis=-1)
    shifted = jnp.concatenate([jnp.zeros_like(each[:, :1]), each[:, :-1]], axis=1)
    first = jnp.arange(each.shape[1])[None] == 0
    return jnp.where(loss_mask & ~first, shifted, 0.0)


_token_logps = jax.jit(token_logps)


def score(documents: ScoreSet, models: Sequence[Scorer], n_rows: int) -> Scored:
    """Returns the sums of all documents, in their order, whatever stands next to them in a row.

    With a reference both models' logits are held, and a batch has fewer rows where these would be
    large. A bar shows tokens per second and the time that is left.

    Args:
        documents: what to score.
        models: the model, and where rewards are wanted a reference of the same vocabulary.
        n_rows: rows of a batch, a multiple of the mesh's data x fsdp.

    Raises:
        FloatingPointError: if a log-prob is not finite.
    """
    names = ["logps"]
    if len(models) > 1:
        names = ["logps", "ref_logps", "kl"]
        logits = documents.seq_len * models[0].cfg.vocab_size // axis_size("tensor")
        shards = axis_size("data", "fsdp")
        n_rows = min(n_rows, shards * max(1, LOGITS_AT_ONCE // logits))
    sums = {name: np.zeros((len(documents), 3)) for name in ("tokens", *names)}
    n_tokens, start, pending = 0, time.monotonic(), None
    with tqdm(total=len(documents.plan), desc="score", unit="row") as bar:
        for rows, plan in documents.batches(n_rows):
            arrays = _compute(documents.pairs, models, rows)
            if pending is not None:  # one batch late, so that the devices never wait for the host
                _add(sums, *pending)
            pending = rows, plan, dict(zip(names, arrays, strict=True))
            n_tokens += int((rows.segments > 0).sum())
            rate = n_tokens / (time.monotonic() - start)
            bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
            bar.update(len(plan))
        if pending is not None:
            _add(sums, *pending)
    bad = int((~np.isfinite(sums["logps"])).any(axis=1).sum())
    if bad:
        raise FloatingPointError(
            f"{bad} of {len(documents)} documents have no finite log-prob under the model; "
            f"are its weights whole, and is --dtype=float32 better?"
        )
    return Scored(**sums)


def _compute(branched: bool, models: Sequence[Scorer], host: Rows) -> list[Array]:
    """Log-probs, and with a reference its log-probs and the KL; `B T` each, 0 where masked."""
    rows = jax.device_put(host, named_sharding(spec("BT")))
    if len(models) == 1:
        return [_score(models[0].cfg, models[0].params, rows, branched)]
    # The same programs for both: of equal models every difference is exactly 0.
    logits = [_logits(m.cfg, m.params, rows, branched) for m in models]
    logps = [_token_logps(x, rows.tokens, rows.loss_mask) for x in logits]
    return [*logps, token_kl(*logits, rows.loss_mask)]


def _add(
    sums: dict[str, np.ndarray], rows: Rows, plan: list[list[int]], arrays: dict[str, Array]
) -> None:
    """Adds a batch to the sums of its documents; waits for the devices."""
    places = [(at, k, i) for at, row in enumerate(plan) for k, i in enumerate(row)]
    at, k, documents = np.asarray(places).T
    for name, values in (arrays | {"tokens": rows.loss_mask}).items():
        sums[name][documents] = branch_sums(np.asarray(values), rows, int(k.max()) + 1)[at, k]


def branch_sums(values: np.ndarray, rows: Rows, n_documents: int) -> np.ndarray:
    """Sums of `B T` values over the documents of each row, by branch: `B K 3`, float64.

    Document k of a row is its segment k+1.
    """
    segments, branches = np.asarray(rows.segments), np.asarray(rows.branches)
    n_rows, size = len(values), n_documents + 1
    place = (np.arange(n_rows)[:, None] * size + segments) * 3 + branches
    sums = np.bincount(place.ravel(), values.ravel().astype(np.float64), n_rows * size * 3)
    return sums.reshape(n_rows, size, 3)[:, 1:]
