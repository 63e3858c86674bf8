"""Mistral: RMSNorm, rotary positions, grouped queries, a sliding window, SwiGLU, no biases.

The modules are Flax NNX; everywhere else parameters are the nested dict that `init_params` returns.
Layers are stacked on a leading axis and scanned. Jiang et al. 2023, arXiv:2310.06825.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from zephyr_jax.config import choose
from zephyr_jax.config.run import REMATS, SAVED, LoraConfig, MistralConfig
from zephyr_jax.models import cache as kv
from zephyr_jax.models.attention import attention_over, cached_attention
from zephyr_jax.models.head import TokenScores, head_scores
from zephyr_jax.models.layers import embed, embed_few, linear, rms_norm, rope, rope_tables
from zephyr_jax.models.lora import LoraContext, project
from zephyr_jax.models.masks import row_layout
from zephyr_jax.models.parameters import param_shapes, param_shardings
from zephyr_jax.sharding import reshard, token_axes, token_axes_of
from zephyr_jax.types import AnyArray, Params, Rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "dropout_key"],
    meta_fields=["remat", "reduce_dtype", "attention", "lora"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass is computed; the defaults are those of inference."""

    remat: str | tuple[str, ...] = "none"  # or "dots", "full", "offload", or the outputs to save
    reduce_dtype: str = "float32"  # of sums of weight gradients, also across devices
    attention: str = "auto"  # or "einsum", "tiled", "splash", "cudnn"
    adapters: Params | None = None  # as from `lora.init_adapters`
    lora: LoraConfig | None = None  # the adapters' rank, scale and dropout rate
    dropout_key: PRNGKeyArray | None = None  # of the adapters' dropout; None: no dropout


INFERENCE = ForwardOptions()
_LAYER_INPUT = "layer"  # the residual stream before a layer


def _remat_policy(remat: str | tuple[str, ...]) -> Any:
    """The policy for `jax.checkpoint` that `config.train.remat` names; not for "none"."""
    policies = jax.checkpoint_policies
    choose("remat", remat, REMATS if isinstance(remat, str) else SAVED)
    match remat:
        case "dots":
            return policies.dots_with_no_batch_dims_saveable
        case "full" | "auto":  # sizes that no device has decided
            return policies.nothing_saveable
        case "offload":
            names = {"names_which_can_be_saved": [], "names_which_can_be_offloaded": [_LAYER_INPUT]}
            spaces = {"offload_src": "device", "offload_dst": "pinned_host"}
            return policies.save_and_offload_only_these_names(**names, **spaces)
    return policies.save_only_these_names(*remat)


def _param(cfg: MistralConfig, rngs: nnx.Rngs, path: str) -> nnx.Param:
    """One parameter: norm scales are ones, matrices normal with sd `initializer_range`."""
    shape = param_shapes(cfg)[path]
    if "norm" in path:
        return nnx.Param(jnp.ones(shape, jnp.float32))
    return nnx.Param(cfg.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


class LayerContext(NamedTuple):
    """The values that all layers of one forward pass share."""

    rotation: tuple[Array, Array]  # cosines and sines, B T H2
    attend: Callable[..., Array]  # Attend, or `cached_attention`
    reduce_dtype: str
    token_axes: tuple[str, str]  # logical axes of tokens: in the residual stream, in projections


Stream = Float[Array, "B T D"]  # the residual stream


class Attention(nnx.Module):
    """Grouped-query self-attention."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.q = _param(cfg, rngs, "layers/attention/q")
        self.k = _param(cfg, rngs, "layers/attention/k")
        self.v = _param(cfg, rngs, "layers/attention/v")
        self.o = _param(cfg, rngs, "layers/attention/o")

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Stream,
        context: LayerContext,
        lora: LoraContext | None,
        cached: kv.KeysValues | None,
    ) -> tuple[Stream, kv.KeysValues]:
        """The output, and the new keys and values."""
        (outer, inner), dtype = context.token_axes, context.reduce_dtype
        q = project("q", f"B{outer}D,DKGH->BKG{inner}H", x, self.q[...], dtype, lora)
        k = project("k", f"B{outer}D,DKH->BK{inner}H", x, self.k[...], dtype, lora)
        v = project("v", f"B{outer}D,DKH->BK{inner}H", x, self.v[...], dtype, lora)
        q, k = rope(q, *context.rotation), rope(k, *context.rotation)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        out = context.attend(q, k, v) if cached is None else context.attend(q, k, v, *cached)
        out = project("o", f"BKG{inner}H,KGHD->B{outer}D", out, self.o[...], dtype, lora)
        return checkpoint_name(out, "o"), (k, v)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.gate = _param(cfg, rngs, "layers/mlp/gate")
        self.up = _param(cfg, rngs, "layers/mlp/up")
        self.down = _param(cfg, rngs, "layers/mlp/down")

    @jax.named_scope("mlp")
    def __call__(self, x: Stream, context: LayerContext, lora: LoraContext | None) -> Stream:
        """The output."""
        (outer, inner), dtype = context.token_axes, context.reduce_dtype
        widen, narrow = f"B{outer}D,DF->B{inner}F", f"B{inner}F,FD->B{outer}D"
        gate = checkpoint_name(project("gate", widen, x, self.gate[...], dtype, lora), "gate")
        up = checkpoint_name(project("up", widen, x, self.up[...], dtype, lora), "up")
        x = jax.nn.silu(gate) * up
        return checkpoint_name(project("down", narrow, x, self.down[...], dtype, lora), "down")


class Block(nnx.Module):
    """One layer, or all of them stacked: attention and MLP, each behind its norm, each added."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.norm_eps = cfg.rms_norm_eps
        self.attention_norm = _param(cfg, rngs, "layers/attention_norm")
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = _param(cfg, rngs, "layers/mlp_norm")
        self.mlp = Mlp(cfg, rngs=rngs)

    def __call__(
        self,
        x: Stream,
        context: LayerContext,
        lora: LoraContext | None = None,
        cached: kv.KeysValues | None = None,
    ) -> tuple[Stream, kv.KeysValues]:
        """The residual stream after this layer, and its new keys and values."""
        x = checkpoint_name(x, _LAYER_INPUT)
        normed = rms_norm(x, self.attention_norm[...], self.norm_eps)
        out, new = self.attention(normed, context, lora, cached)
        x = x + out
        normed = rms_norm(x, self.mlp_norm[...], self.norm_eps)
        return x + self.mlp(normed, context, lora), new


class Mistral(nnx.Module):
    """The whole model; `layers` is one Block with the parameters of all layers."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = _param(cfg, rngs, "embed")
        self.layers = Block(cfg, rngs=rngs)
        self.final_norm = _param(cfg, rngs, "final_norm")
        if not cfg.tie_word_embeddings:
            self.head = _param(cfg, rngs, "head")

    def hidden(
        self,
        tokens: Int[AnyArray, "B T"],
        segments: Int[AnyArray, "B T"] | None = None,
        branches: Int[AnyArray, "B T"] | None = None,
        positions: Int[AnyArray, "B T"] | None = None,
        options: ForwardOptions = INFERENCE,
    ) -> Float[Array, "B T D"]:
        """The normed last hidden states of packed rows, in cfg.dtype; arguments as of `forward`."""
        tokens = jnp.asarray(tokens)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
        branches = None if branches is None else jnp.asarray(branches)
        positions = segment_positions(segments) if positions is None else jnp.asarray(positions)
        layout = row_layout(segments, branches, positions)
        outer, inner = token_axes(tokens.shape[1])
        rotation = self._rotation(reshard(positions, f"B{inner}"))
        cfg, kernel = self.cfg, options.attention
        attend = attention_over(layout, cfg.sliding_window, kernel, cfg.head_dim, cfg.dtype)
        context = LayerContext(rotation, attend, options.reduce_dtype, (outer, inner))

        def layer(x: Array, inputs: tuple[Block, LoraContext | None]) -> tuple[Array, None]:
            block, lora = inputs
            return block(x, context, lora)[0], None

        if options.remat != "none":
            layer = jax.checkpoint(layer, policy=_remat_policy(options.remat), prevent_cse=False)
        x: Any = embed(self.embed[...], tokens, cfg.dtype, options.reduce_dtype, f"B{outer}D")
        lora, keys = None, options.dropout_key
        if options.adapters is not None and options.lora is not None:
            keys = None if keys is None else jax.random.split(keys, cfg.num_hidden_layers)
            lora = LoraContext(options.adapters["layers"], keys, options.lora)
        x, _ = jax.lax.scan(layer, x, (self.layers, lora))
        return self._normed(x)

    def logits(self, hidden: Array, reduce_dtype: str = "float32") -> Array:
        """Logits `B T V`, float32: factors in cfg.dtype, products accumulated in float32."""
        outer, inner = token_axes_of(hidden)
        tied = self.cfg.tie_word_embeddings
        axes, weight = ("VD", self.embed) if tied else ("DV", self.head)
        equation = f"B{outer}D,{axes}->B{inner}V"
        return reshard(linear(equation, hidden, weight[...], reduce_dtype, "float32"), "BTV")

    def _rotation(self, positions: Array) -> tuple[Array, Array]:
        return rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)

    def _normed(self, x: Array) -> Array:
        return rms_norm(x, self.final_norm[...], self.cfg.rms_norm_eps)


@functools.cache
def _graphdef(cfg: MistralConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Mistral(cfg, rngs=nnx.Rngs(0))))[0]


def as_module(cfg: MistralConfig, params: Params) -> Mistral:
    """The NNX module that holds these parameters."""
    return nnx.merge(_graphdef(cfg), nnx.State(params))


def init_params(cfg: MistralConfig, key: PRNGKeyArray) -> Params:
    """Random float32 parameters, sharded on the ambient mesh; values depend on the key alone."""

    def init(key):
        # XLA's own generator compiles twenty times faster; meshes differ in the last bit.
        bits = jax.random.bits(key, (4,), jnp.uint32)
        rngs = nnx.Rngs(jax.random.wrap_key_data(bits, impl="rbg"))
        return nnx.to_pure_dict(nnx.state(Mistral(cfg, rngs=rngs)))

    return jax.jit(init, out_shardings=param_shardings(cfg))(key)


def segment_positions(segments: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 at each segment: `[1,1,2,2,2]` -> `[0,1,0,1,2]`."""
    index = jnp.arange(segments.shape[1])[None]
    before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start = jnp.where(segments != before, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def forward(
    cfg: MistralConfig,
    params: Params,
    tokens: Int[AnyArray, "B T"],
    segments: Int[AnyArray, "B T"] | None = None,
    branches: Int[AnyArray, "B T"] | None = None,
    positions: Int[AnyArray, "B T"] | None = None,
    options: ForwardOptions = INFERENCE,
) -> Float[Array, "B T V"]:
    """Logits of packed rows (`zephyr_jax.types.Rows`), float32; computed in `cfg.dtype`.

    Without `segments` a row is one document. `positions` restart at each segment (the default) and
    grow with the index within it, and a segment has no padding inside: splash counts by index.
    """
    model = as_module(cfg, params)
    hidden = model.hidden(tokens, segments, branches, positions, options)
    return model.logits(hidden, options.reduce_dtype)


def forward_cached(
    cfg: MistralConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: kv.KVCache,
    empty: bool = False,
) -> tuple[Float[Array, "B V"], kv.KVCache]:
    """Logits after the last token of every row, float32, and the cache with these tokens in it.

    Prompts may be longer than the window, and come in chunks; left padding has position -1. `empty`
    promises that the cache holds nothing yet, so that no token looks there.
    """
    model = as_module(cfg, params)
    attend = cached_attention(positions, None if empty else cache.positions, cfg)
    context = LayerContext(model._rotation(positions), attend, "float32", ("T", "T"))

    def layer(x: Array, inputs: tuple[Block, kv.KeysValues]) -> tuple[Array, kv.KeysValues]:
        block, cached = inputs
        return block(x, context, cached=cached)

    # The loop only reads the cache: a layer that is written in it would be copied out of the stack.
    x = embed_few(model.embed[...], tokens, cfg.dtype)
    x, new = jax.lax.scan(layer, x, (model.layers, (cache.k, cache.v)))
    logits = model.logits(model._normed(x[:, -1:]))[:, 0]
    return logits, kv.written(cache, new, positions)


def token_scores(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    options: ForwardOptions = INFERENCE,
    *,
    branched: bool = True,
    squares: bool = False,
) -> TokenScores:
    """Scores of the targets of packed rows, from the same hidden states as `forward`'s logits.

    `branched=False` promises that no row has branches, which lets attention skip work.
    """
    model, tied = as_module(cfg, params), cfg.tie_word_embeddings
    branches = rows.branches if branched else None
    hidden = model.hidden(rows.tokens, rows.segments, branches, rows.positions, options)
    weight, dtype = (model.embed if tied else model.head)[...], options.reduce_dtype
    targets = rows.tokens, rows.loss_mask
    return head_scores(hidden, weight, *targets, tied=tied, squares=squares, reduce_dtype=dtype)
