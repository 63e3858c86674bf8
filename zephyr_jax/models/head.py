"""Log-probs of targets from hidden states, a block of tokens and of the vocabulary at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zephyr_jax import sharding
from zephyr_jax.sharding import per_device, platform, reshard, spec, token_axes_of, weight_spec

VOCAB_AT_ONCE = 4096  # of one device; with 1,024 tokens 16 MB of logits in float32
KEPT_LOGITS = 1 << 27  # 512 MB; as many wait on a CPU for the backward pass
_NO_TARGET, _SEEN = -1, -2  # in place of ids
_OFF = -1e30  # less than any logarithm that occurs; its differences are finite
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)  # 0 beyond the end


class TokenScores(NamedTuple):
    """Scores of every target token of packed rows; 0 elsewhere."""

    logps: Float[Array, "B T"]
    squares: Float[Array, "B T"] | None  # log sum_v p(v)^2 where the token is predicted


class _Head(NamedTuple):
    weight_axes: str  # "DV", or "VD" if the head is tied to the embedding
    squares: bool
    reduce_dtype: str
    token_axes: tuple[str, str]  # logical axes: of the hidden states, of products and scores
    keeps: bool  # the logits, which the backward pass would compute again


@jax.named_scope("head")
def head_scores(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"] | Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    tied: bool = False,
    squares: bool = False,
    reduce_dtype: str = "float32",
) -> TokenScores:
    """Entry t is log p(token t | the tokens before it in the row), float32; 0 where masked.

    The result is that of `losses.token_logps` on the logits `hidden weight` (`hidden` is normed),
    whose factors have the dtype of `hidden` and whose products are added in float32. A vocabulary
    that is sharded over `tensor` stays so. `squares` adds log sum_v p(v)^2, without a gradient. The
    weight's gradient is added in `reduce_dtype`, also across devices. Of small models on CPU the
    head is most of a step, so that few logits are kept; elsewhere memory is worth more.
    """
    targets = jnp.where(loss_mask, tokens, _NO_TARGET)
    targets = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)), constant_values=_NO_TARGET)
    keeps = platform() == "cpu" and tokens.size * max(weight.shape) <= KEPT_LOGITS
    head = _Head("VD" if tied else "DV", squares, reduce_dtype, token_axes_of(hidden), keeps)
    targets = reshard(targets, f"B{head.token_axes[1]}")
    scores: Any = _scores(head, hidden, weight, targets)
    logps, others = (jnp.pad(reshard(x, "BT")[:, :-1], ((0, 0), (1, 0))) for x in scores[:2])
    return TokenScores(logps, jax.lax.stop_gradient(others) if squares else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(head: _Head, hidden: Array, weight: Array, targets: Array) -> Any:
    """Log-probs, squares and log-sum-exps where the targets are predicted."""
    return _forward(head._replace(keeps=False), hidden, weight, targets)[0]


def _forward(head: _Head, hidden: Array, weight: Array, targets: Array):
    tokens = f"B{head.token_axes[1]}"
    out = (spec(tokens),) * 3
    if head.keeps:
        out += (spec(f"{tokens}.V"),)
    results: Any = _per_device(head, _local_forward, out, hidden, weight, targets)
    return results[:3], (hidden, weight, targets, *results[2:])


def _backward(head: _Head, saved: tuple[Array, ...], grads: tuple[Array, ...]):
    out = spec(f"B{head.token_axes[0]}D"), weight_spec(head.weight_axes)
    hidden, weight, *rows = saved
    dx, dw = _per_device(head, _local_backward, out, hidden, weight, grads[0], *rows)
    return dx, dw.astype(weight.dtype), None


_scores.defvjp(_forward, _backward)


def _per_device(
    head: _Head, function: Callable[..., Any], out: Any, hidden: Array, weight: Array, *rows: Array
) -> Any:
    """`function` of each device's rows and vocabulary entries; `out` partitions the results."""
    tokens = f"B{head.token_axes[1]}"
    axes = f"{tokens}D", head.weight_axes, *(tokens if x.ndim == 2 else f"{tokens}.V" for x in rows)
    if spec("") is not None:  # else each cut of the weight is cast when it is used
        hidden, weight = reshard(hidden, axes[0]), reshard(weight.astype(hidden.dtype), axes[1])
    return per_device(functools.partial(function, head), axes, out)(hidden, weight, *rows)


def block_size(tokens: int) -> int:
    """Tokens of a device scored at once; each block adds to the weight's whole gradient."""
    return min(max(tokens // 1024 * 128, 512), 1024, tokens)


def _blocks(targets: Array) -> tuple[Int[Array, "N C"], Array]:
    """The indices of tokens with a target, in blocks filled up by n, and how many are not empty."""
    wanted, n = targets.reshape(-1) != _NO_TARGET, targets.size
    size = block_size(n)
    order = jnp.where(jnp.arange(n) < wanted.sum(), jnp.argsort(~wanted, stable=True), n)
    order = jnp.pad(order, (0, -n % size), constant_values=n)
    return order.reshape(-1, size), (wanted.sum() + size - 1) // size


def _over_vocab(weight: Array, axis: int, body: Callable[..., Any], carry: Any) -> Any:
    """`body(part, ids, start, carry)` for cuts of the vocabulary; ids of a cut before are _SEEN."""
    held = weight.shape[axis]
    equal = (k for k in range(VOCAB_AT_ONCE, VOCAB_AT_ONCE // 2, -128) if held % k == 0)
    size = next(equal, min(VOCAB_AT_ONCE, held))  # others make the last two cuts overlap
    first = 0 if spec("") is None else jax.lax.axis_index("tensor") * held

    def cut(j: Array, carry: Any) -> Any:
        start = jnp.minimum(j * size, held - size)
        local = start + jnp.arange(size)[None]
        ids = jnp.where(local >= j * size, first + local, _SEEN)
        return body(jax.lax.dynamic_slice_in_dim(weight, start, size, axis), ids, start, carry)

    return jax.lax.fori_loop(0, -(-held // size), cut, carry)


def _local_forward(head: _Head, hidden: Array, weight: Array, targets: Array):
    """Log-probs, squares and log-sum-exps of this device's rows, and kept logits, by block."""
    axes, (blocks, filled), n = head.weight_axes.lower(), _blocks(targets), targets.size
    flat, powers = hidden.reshape(n, -1), (1, 2) if head.squares else (1,)

    def block(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        (out, kept), rows = carry, _take(flat, blocks[i])
        target = _take(targets.reshape(-1), blocks[i])[:, None]

        def cut(part: Array, ids: Array, start: Array, carry: tuple[Any, Any]):
            (picked, *totals), kept = carry
            logits = _product(f"cd,{axes}->cv", rows, part.astype(rows.dtype))
            if kept is not None:
                kept = jax.lax.dynamic_update_slice(kept, logits, (i * len(rows), start))
            place = jnp.clip(target - ids[:, -1:] + ids.size - 1, 0, ids.size - 1)
            value = jnp.take_along_axis(logits, place, axis=1)
            picked += jnp.where(ids[0, place] == target, value, 0.0)[:, 0]
            logits = jnp.where(ids != _SEEN, logits, _OFF)
            sums = (jax.nn.logsumexp(power * logits, axis=1) for power in powers)
            return (picked, *map(jnp.logaddexp, totals, sums)), kept

        empty = jnp.zeros(len(rows)), *(jnp.full(len(rows), _OFF) for _ in powers)
        new, kept = _over_vocab(weight, axes.index("v"), cut, (empty, kept))
        new = (x.at[blocks[i]].set(y, mode="drop") for x, y in zip(out, new, strict=True))
        return tuple(new), kept

    empty = jnp.zeros(n), *(jnp.full(n, _OFF) for _ in powers)
    kept = jnp.zeros((blocks.size, weight.shape[axes.index("v")])) if head.keeps else None
    (picked, *totals), kept = jax.lax.fori_loop(0, filled, block, (empty, kept))
    if spec("") is not None:
        picked = jax.lax.psum(picked, "tensor")
        for i, logs in enumerate(totals):
            top = jax.lax.pmax(logs, "tensor")
            totals[i] = top + jnp.log(jax.lax.psum(jnp.exp(logs - top), "tensor"))
    here, total = targets.reshape(-1) != _NO_TARGET, totals[0]
    logps = jnp.where(here, picked - total, 0.0)
    squares = jnp.where(here, totals[-1] - 2 * total, 0.0)  # of no meaning without `squares`
    results = tuple(x.reshape(targets.shape) for x in (logps, squares, total))
    return results if kept is None else (*results, kept[None, None])


def _local_backward(head: _Head, hidden: Array, weight: Array, grads: Array, *saved: Array):
    """Gradients of this device's hidden states and of its part of the weight."""
    targets, total, *kept = saved
    axes, (blocks, filled), dtype = head.weight_axes.lower(), _blocks(targets), hidden.dtype
    flat, axis = hidden.reshape(targets.size, -1), axes.index("v")
    by_token = [x.reshape(-1) for x in (targets, grads, total)]

    def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = _take(flat, blocks[i])
        target, grad, logs = (_take(x, blocks[i])[:, None] for x in by_token)

        def cut(part: Array, ids: Array, start: Array, carry: tuple[Array, Array]):
            (dx, dw), part = carry, part.astype(dtype)
            if kept:
                at = 0, 0, i * len(rows), start
                logits = jax.lax.dynamic_slice(kept[0], at, (1, 1, len(rows), ids.size))[0, 0]
            else:
                logits = _product(f"cd,{axes}->cv", rows, part)
            probs = jnp.exp(logits - logs)
            dlogits = jnp.where(ids != _SEEN, grad * ((ids == target) - probs), 0.0).astype(dtype)
            dx += _product(f"cv,{axes}->cd", dlogits, part)
            old = jax.lax.dynamic_slice_in_dim(dw, start, ids.size, axis)
            new = old + _product(f"cd,cv->{axes}", rows, dlogits)
            return dx, jax.lax.dynamic_update_slice_in_dim(dw, new, start, axis)

        dx, dw = carry
        own, dw = _over_vocab(weight, axis, cut, (jnp.zeros(rows.shape, jnp.float32), dw))
        return dx.at[blocks[i]].set(own.astype(dtype), mode="drop"), dw

    empty = jnp.zeros_like(flat), jnp.zeros(weight.shape, jnp.float32)
    dx, dw = jax.lax.fori_loop(0, filled, block, empty)
    dx, dw = dx.reshape(hidden.shape), dw.astype(head.reduce_dtype)
    if spec("") is None:
        return dx, dw
    over, dw = sharding.axes_of("D", sharding.WEIGHT_RULES), jax.lax.psum(dw, "data")
    dw = jax.lax.psum_scatter(dw, over, scatter_dimension=1 - axis, tiled=True)
    if head.token_axes[0] == "Z":
        return jax.lax.psum_scatter(dx, "tensor", scatter_dimension=1, tiled=True), dw
    return jax.lax.psum(dx, "tensor"), dw
