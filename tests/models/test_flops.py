"""Counted FLOPs against the dots of the compiled-to-be program, layers unrolled."""

import dataclasses
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import pytest

import zephyr_jax as zj
from zephyr_jax.models import attention
from zephyr_jax.models.parameters import abstract_params, count_params, model_flops_per_token

TIED = {"num_key_value_heads": 8, "tie_word_embeddings": True}
ODD = {"head_dim": 14, "hidden_size": 37, "num_key_value_heads": 1, "vocab_size": 101}
SIZES = [
    pytest.param({}, id="tiny"),
    pytest.param(TIED, id="tied", marks=pytest.mark.slow),
    pytest.param(ODD, id="odd sizes", marks=pytest.mark.slow),
]
B, T = 2, 24


def dot_flops(hlo: str) -> int:
    """2 M N K of every dot in the text of an HLO module, called computations as often as called."""
    own, calls = {}, {}
    for head, body in re.findall(r"^(\S[^\n]*?) \{\n(.*?)^\}", hlo, re.M | re.S):
        name = head.removeprefix("ENTRY ").split()[0].lstrip("%")
        line = re.compile(r"%?(\S+) = \w+\[([\d,]*)\]\S* (\w+)\(%?([^,)]*)(.*)")
        shapes, own[name] = {}, 0
        for out, dims, op, first, rest in line.findall(body):
            shapes[out] = [int(n) for n in dims.split(",") if n]
            if op == "dot":
                summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1).split(",")
                size = math.prod(shapes[first][int(axis)] for axis in summed)
                own[name] += 2 * math.prod(shapes[out]) * size
        calls[name] = re.findall(r"to_apply=%?([\w.\-]+)", body)

    def total(name):
        return own[name] + sum(map(total, calls[name]))

    return total(re.search(r"^ENTRY %?(\S+)", hlo, re.M).group(1))


def forward_flops(cfg) -> float:
    """One forward pass as it is written down: all T x T pairs, where the convention counts half."""
    half = B * T**2 * 2 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
    return (
        B * T * model_flops_per_token(dataclasses.replace(cfg, sliding_window=None), T) / 3 + half
    )


def program(function, *args) -> str:
    # A function of its own, or JAX would take what it traced before.
    text = jax.jit(lambda *args: function(*args)).lower(*args).as_text(dialect="hlo")
    assert " while(" not in text  # a loop's body would be counted once
    return text


@pytest.fixture
def unrolled(monkeypatch):
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *args, **kw: scan(*args, **kw | {"unroll": True}))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_dots_of_the_unrolled_program_are_ours(unrolled, monkeypatch, sizes):  # pitfall 50
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), **sizes)
    forward = functools.partial(zj.forward, cfg, options=zj.ForwardOptions(attention="einsum"))
    step = jax.value_and_grad(lambda params, tokens: forward(params, tokens).sum())
    args = abstract_params(cfg), jax.ShapeDtypeStruct((B, T), jnp.int32)
    ours = forward_flops(cfg)
    assert dot_flops(program(forward, *args)) == ours
    # The backward pass recomputes the scores: one product of the attention's two.
    heads = cfg.num_hidden_layers * cfg.num_attention_heads
    recomputed = 2 * B * T * T * heads * cfg.head_dim
    assert dot_flops(program(step, *args)) == 3 * ours + recomputed
    monkeypatch.setattr(attention, "attend", inspect.unwrap(attention.attend))
    assert dot_flops(program(step, *args)) == 3 * ours


def test_the_convention_halves_attention_and_stops_at_the_window():
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), sliding_window=None)
    weights = 6 * (count_params(cfg) - cfg.vocab_size * cfg.hidden_size)  # the lookup is no product
    norms = 6 * (2 * cfg.num_hidden_layers + 1) * cfg.hidden_size
    pairs = 12 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
    for window, seen in ((None, 32), (64, 32), (1000, 32), (16, 14), (1, 1 - 1 / 128)):
        windowed = dataclasses.replace(cfg, sliding_window=window)
        assert model_flops_per_token(windowed, 64) == weights - norms + pairs * seen
