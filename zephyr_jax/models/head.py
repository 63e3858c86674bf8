"""Log-probs of target tokens from hidden states, without the logits of a whole batch.

The logits of `T` tokens over `V` pieces in float32 are the largest array of a training step. Here
only targets get logits at all, some of them against some of the vocabulary at a time; the backward
pass computes these again instead of keeping them. Prompts and padding cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zephyr_jax.sharding import WEIGHT_RULES, axes_of, reshard, spec, token_axes_of, weight_spec

TOKENS_AT_ONCE, PIECES_AT_ONCE = 512, 4096  # of one device: 8 MB of logits in float32
_OFF = -1e30  # less than any logarithm that occurs; its differences are finite


class TokenScores(NamedTuple):
    """What is known of every target token of packed rows; 0 elsewhere."""

    logps: Float[Array, "B T"]
    squares: Float[Array, "B T"] | None  # log sum_v p(v)^2 where the token is predicted


class _Head(NamedTuple):
    """What does not change from call to call; the weight is `V D` where it is tied."""

    tied: bool
    squares: bool
    reduce_dtype: str
    letters: tuple[str, str]  # of tokens: in the hidden states, and in products and scores

    @property
    def axes(self) -> str:
        return "VD" if self.tied else "DV"

    @property
    def rows(self) -> Any:
        return spec(f"B{self.letters[1]}")


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

    What `losses.token_logps` makes of the logits `hidden weight`, whose factors are in the dtype
    of `hidden` and whose products are added in float32. A vocabulary that is divided over `tensor`
    stays so: its devices exchange a number for every token, and the hidden states where those are
    divided over it too. No gradient comes from `squares`.

    Args:
        hidden: the normed last hidden states; entry t-1 predicts token t.
        weight: of the head, or with `tied` of the embedding.
        tokens: of the rows.
        loss_mask: which of them are targets; the first of a row never is.
        tied: whether `weight` is `V D`.
        squares: whether log sum_v p(v)^2 is wanted too (`preference_inputs.log_sum_squares`).
        reduce_dtype: in which the weight's gradient is added, also across devices.
    """
    targets = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    wanted = jnp.concatenate([loss_mask[:, 1:], loss_mask[:, :1]], axis=1)
    wanted &= jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1
    head = _Head(tied, squares, reduce_dtype, token_axes_of(hidden))
    # A single row may come undivided.
    targets, wanted = (reshard(x, f"B{head.letters[1]}") for x in (targets, wanted))
    found = cast(tuple[Array, Array], _scores(hidden, weight, targets, wanted, head))
    out = (reshard(x, "BT") for x in found)
    logps, others = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in out)
    return TokenScores(logps, jax.lax.stop_gradient(others) if squares else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(
    hidden: Array, weight: Array, targets: Array, wanted: Array, head: _Head
) -> tuple[Array, Array]:
    return _forward(hidden, weight, targets, wanted, head)[:2]


def _scores_forward(hidden: Array, weight: Array, targets: Array, wanted: Array, head: _Head):
    logps, squares, total = _forward(hidden, weight, targets, wanted, head)
    return (logps, squares), (hidden, weight, targets, wanted, total)


def _scores_backward(head: _Head, saved: tuple[Array, ...], grads: tuple[Array, Array]):
    hidden, weight, targets, wanted, total = saved
    local = functools.partial(_local_backward, head)
    (z, c), rows, weights = head.letters, head.rows, spec(head.axes)
    call = _on_each_device(
        local,
        (spec(f"B{c}D"), weights, rows, rows, rows, rows),
        (spec(f"B{z}D"), weight_spec(head.axes)),
    )
    hidden, weight_here = reshard(hidden, f"B{c}D"), _whole(weight, hidden, head)
    dx, dw = call(hidden, weight_here, targets, wanted, total, grads[0])
    return dx, dw.astype(weight.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _forward(hidden: Array, weight: Array, targets: Array, wanted: Array, head: _Head):
    rows, letters = head.rows, f"B{head.letters[1]}D"
    call = _on_each_device(
        functools.partial(_local_forward, head),
        (spec(letters), spec(head.axes), rows, rows),
        (rows, rows, rows),
    )
    return call(reshard(hidden, letters), _whole(weight, hidden, head), targets, wanted)


def _whole(weight: Array, hidden: Array, head: _Head) -> Array:
    """The weight gathered but for the vocabulary, cast before it travels.

    Where nothing travels, each cut is cast when it is used: a cast copy would be as large as the
    weight.
    """
    partition = spec(head.axes)
    if partition is None:
        return weight
    return jax.reshard(weight.astype(hidden.dtype), partition)


def _on_each_device(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    if spec("") is None:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Blocks(NamedTuple):
    """Places of targets, those first that are any, in blocks of one size."""

    order: Int[Array, " N"]  # beyond the last token: no place
    size: int
    filled: Int[Array, ""]  # how many blocks have a target

    def at(self, i: Array) -> Array:
        """The places in block `i`."""
        return jax.lax.dynamic_slice(self.order, (i * self.size,), (self.size,))


def _blocks(wanted: Array) -> _Blocks:
    n = wanted.size
    size = min(TOKENS_AT_ONCE, n)
    order = jnp.argsort(~wanted.reshape(-1), stable=True)
    order = jnp.where(jnp.arange(n) < wanted.sum(), order, n)  # nothing else fills a block up
    order = jnp.pad(order, (0, -n % size), constant_values=n)
    return _Blocks(order, size, (wanted.sum() + size - 1) // size)


def _take(array: Array, at: Array) -> Array:
    """The entries at these places; 0 at no place."""
    return array.at[at].get(mode="fill", fill_value=0)


class _Columns(NamedTuple):
    """The part of the vocabulary that this device holds, and how it is cut."""

    weight: Array
    axis: int  # of the vocabulary
    first: Array | int  # the id of the first piece here

    @property
    def held(self) -> int:
        return self.weight.shape[self.axis]

    def over(self, body: Callable[[Array | int, int, Any], Any], carry: Any) -> Any:
        """`body(start, size, carry)` for every cut; equal ones in a loop, then what is left.

        Equal cuts are whole tiles of 128 lanes: others take a TPU twice the memory.
        """
        size = next(
            (k for k in range(PIECES_AT_ONCE, PIECES_AT_ONCE // 2, -128) if self.held % k == 0),
            min(PIECES_AT_ONCE, self.held),
        )
        whole, left = divmod(self.held, size)
        if whole == 1:
            carry = body(0, size, carry)
        else:
            carry = jax.lax.fori_loop(0, whole, lambda j, c: body(j * size, size, c), carry)
        return body(whole * size, left, carry) if left else carry

    def cut(self, start: Array | int, size: int, dtype: Any) -> Array:
        """The weight of some pieces."""
        return jax.lax.dynamic_slice_in_dim(self.weight, start, size, self.axis).astype(dtype)


def _columns(weight: Array, head: _Head) -> _Columns:
    axis = head.axes.index("V")
    here = 0 if spec("") is None else jax.lax.axis_index("tensor") * weight.shape[axis]
    return _Columns(weight, axis, here)


def _product(rows: Array, part: Array, head: _Head) -> Array:
    """Logits, float32."""
    axes = head.axes.lower()
    return jnp.einsum(f"cd,{axes}->cv", rows, part, preferred_element_type=jnp.float32)


def _local_forward(head: _Head, hidden: Array, weight: Array, targets: Array, wanted: Array):
    """Log-probs, squares and log-sum-exps of this device's rows."""
    n, columns, blocks = wanted.size, _columns(weight, head), _blocks(wanted)
    flat, own = hidden.reshape(n, -1), targets.reshape(-1) - columns.first

    def block(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        at = blocks.at(i)
        rows, target = _take(flat, at), _take(own, at)

        def cut(start: Array | int, size: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            picked, total, *twice = carry
            logits = _product(rows, columns.cut(start, size, hidden.dtype), head)
            inside = (target >= start) & (target < start + size)
            place = jnp.where(inside, target - start, 0)[:, None]
            value = jnp.take_along_axis(logits, place, axis=1)[:, 0]
            picked = jnp.where(inside, value, picked)
            total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1))
            if head.squares:
                twice = [jnp.logaddexp(twice[0], jax.nn.logsumexp(2 * logits, axis=1))]
            return picked, total, *twice

        none = jnp.full(blocks.size, _OFF)
        new = columns.over(cut, (jnp.zeros(blocks.size), none, *[none] * head.squares))
        return tuple(x.at[at].set(y, mode="drop") for x, y in zip(found, new, strict=True))

    empty = jnp.zeros(n), *[jnp.full(n, _OFF)] * (1 + head.squares)
    picked, total, *twice = jax.lax.fori_loop(0, blocks.filled, block, empty)
    if spec("") is not None:
        picked = jax.lax.psum(picked, "tensor")
        total, *twice = (_log_of_sums(x) for x in (total, *twice))
    here = wanted.reshape(-1)
    logps = jnp.where(here, picked - total, 0.0)
    squares = jnp.where(here, twice[0] - 2 * total, 0.0) if head.squares else jnp.zeros_like(logps)
    return tuple(x.reshape(wanted.shape) for x in (logps, squares, total))


def _log_of_sums(logs: Array) -> Array:
    """Log sum exp over the devices that hold parts of the vocabulary."""
    largest = jax.lax.pmax(logs, "tensor")
    return largest + jnp.log(jax.lax.psum(jnp.exp(logs - largest), "tensor"))


def _local_backward(
    head: _Head,
    hidden: Array,
    weight: Array,
    targets: Array,
    wanted: Array,
    total: Array,
    grads: Array,
):
    """Gradients of this device's hidden states and of its part of the weight."""
    n, dtype, axes = wanted.size, hidden.dtype, head.axes.lower()
    columns, blocks = _columns(weight, head), _blocks(wanted)
    flat, own = hidden.reshape(n, -1), targets.reshape(-1) - columns.first
    total, grads = total.reshape(-1), jnp.where(wanted, grads, 0.0).reshape(-1)
    wide = {"preferred_element_type": jnp.float32}

    def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dw = carry
        at = blocks.at(i)
        rows, target = _take(flat, at), _take(own, at)[:, None]
        outer, logs = _take(grads, at)[:, None], _take(total, at)[:, None]

        def cut(start: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, dw = carry
            part = columns.cut(start, size, hidden.dtype)
            is_target = target == start + jnp.arange(size)[None]
            probs = jnp.exp(_product(rows, part, head) - logs)
            dlogits = (outer * (is_target - probs)).astype(dtype)
            dx += jnp.einsum(f"cv,{axes}->cd", dlogits, part, **wide)
            old = jax.lax.dynamic_slice_in_dim(dw, start, size, columns.axis)
            new = old + jnp.einsum(f"cd,cv->{axes}", rows, dlogits, **wide)
            return dx, jax.lax.dynamic_update_slice_in_dim(dw, new, start, columns.axis)

        own_dx, dw = columns.over(cut, (jnp.zeros(rows.shape, jnp.float32), dw))
        return dx.at[at].set(own_dx.astype(dtype), mode="drop"), dw

    empty = jnp.zeros_like(flat), jnp.zeros(weight.shape, jnp.float32)
    dx, dw = jax.lax.fori_loop(0, blocks.filled, block, empty)
    dx, dw = dx.reshape(hidden.shape), dw.astype(head.reduce_dtype)
    if spec("") is not None:
        over, dw = axes_of("D", WEIGHT_RULES), jax.lax.psum(dw, "data")
        dw = jax.lax.psum_scatter(dw, over, scatter_dimension=1 - columns.axis, tiled=True)
        if head.letters[0] != "Z":
            return jax.lax.psum(dx, "tensor"), dw
        dx = jax.lax.psum_scatter(dx, "tensor", scatter_dimension=1, tiled=True)
    return dx, dw
