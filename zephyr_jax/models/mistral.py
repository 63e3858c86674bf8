"""Mistral: RMSNorm, rotary positions, grouped queries, a sliding window, SwiGLU, no biases.

The modules are Flax NNX; everywhere else parameters are the plain nested dict that `init_params`
returns. Layers are stacked on a leading axis and scanned. Jiang et al. 2023, arXiv:2310.06825.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from zephyr_jax.config.run import LoraConfig, MistralConfig
from zephyr_jax.models import cache as kv
from zephyr_jax.models.attention import Attend, attention_over
from zephyr_jax.models.layers import embed, embed_few, linear, rms_norm, rope, rope_tables
from zephyr_jax.models.lora import Adapter, layer_adapter, project
from zephyr_jax.models.masks import Layout, cache_layout, row_layout
from zephyr_jax.models.parameters import param_shapes, param_shardings
from zephyr_jax.models.remat import LAYER_INPUT, remat_policy
from zephyr_jax.sharding import reshard, token_axes, token_axes_of
from zephyr_jax.types import AnyArray, Params

KeysValues = tuple[Any, Any]  # all layers', stacked or apart


def _param(cfg: MistralConfig, rngs: nnx.Rngs, path: str) -> nnx.Param:
    """One parameter: norm scales are ones, matrices normal with sd `initializer_range`."""
    shape = param_shapes(cfg)[path]
    if "norm" in path:
        return nnx.Param(jnp.ones(shape, jnp.float32))
    return nnx.Param(cfg.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


class Shared(NamedTuple):
    """What every layer of one forward pass needs alike."""

    rotation: tuple[Array, Array]  # cosines and sines, B T H2
    attend: Attend
    place: kv.Place | None  # where the cache takes the new keys; None without a cache
    reduce_dtype: str
    letters: tuple[str, str]  # of tokens: in the residual stream, and in projections
    lora: LoraConfig | None = None  # of the adapters, if there are any


class Beside(NamedTuple):
    """Adapters, and what their dropout is drawn from: of all layers, stacked, or of one."""

    adapters: Params | None = None
    key: PRNGKeyArray | None = None

    def of(self, shared: Shared, name: str) -> Adapter | None:
        """The adapter of one projection of one layer."""
        return layer_adapter(self.adapters, shared.lora, self.key, name)


_NONE_BESIDE = Beside()


class Attention(nnx.Module):
    """Grouped-query self-attention."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.q = _param(cfg, rngs, "layers/attention/q")
        self.k = _param(cfg, rngs, "layers/attention/k")
        self.v = _param(cfg, rngs, "layers/attention/v")
        self.o = _param(cfg, rngs, "layers/attention/o")

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B T D"], shared: Shared, cached: kv.LayerCache | None, beside: Beside
    ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None]:
        """The attended values, and the cache with the new keys and values in it."""
        (z, c), dtype = shared.letters, shared.reduce_dtype
        of = functools.partial(beside.of, shared)
        q = project(f"B{z}D,DKGH->B{c}KGH", x, self.q[...], dtype, of("q"))
        k = project(f"B{z}D,DKH->B{c}KH", x, self.k[...], dtype, of("k"))
        v = project(f"B{z}D,DKH->B{c}KH", x, self.v[...], dtype, of("v"))
        q, k = rope(q, *shared.rotation), rope(k, *shared.rotation)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cached is not None and shared.place is not None:
            k, v, cached = kv.extend(cached, k, v, shared.place)
        out = checkpoint_name(shared.attend(q, k, v), "attention")
        out = project(f"B{c}KGH,KGHD->B{z}D", out, self.o[...], dtype, of("o"))
        return checkpoint_name(out, "o"), cached


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.gate = _param(cfg, rngs, "layers/mlp/gate")
        self.up = _param(cfg, rngs, "layers/mlp/up")
        self.down = _param(cfg, rngs, "layers/mlp/down")

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "B T D"], shared: Shared, beside: Beside
    ) -> Float[Array, "B T D"]:
        """The transformed activations."""
        (z, c), dtype = shared.letters, shared.reduce_dtype
        of = functools.partial(beside.of, shared)
        gate = project(f"B{z}D,DF->B{c}F", x, self.gate[...], dtype, of("gate"))
        up = project(f"B{z}D,DF->B{c}F", x, self.up[...], dtype, of("up"))
        x = jax.nn.silu(checkpoint_name(gate, "gate")) * checkpoint_name(up, "up")
        down = project(f"B{c}F,FD->B{z}D", x, self.down[...], dtype, of("down"))
        return checkpoint_name(down, "down")


class Block(nnx.Module):
    """One layer: attention and MLP, each behind its norm, each added to the residual stream.

    Made with the parameters of all layers, stacked; applied once it holds those of one.
    """

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _param(cfg, rngs, "layers/attention_norm")
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = _param(cfg, rngs, "layers/mlp_norm")
        self.mlp = Mlp(cfg, rngs=rngs)

    def __call__(
        self,
        cfg: MistralConfig,
        x: Float[Array, "B T D"],
        shared: Shared,
        cached: kv.LayerCache | None,
        beside: Beside = _NONE_BESIDE,
    ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None]:
        """The residual stream after this layer, and the cache."""
        x = checkpoint_name(x, LAYER_INPUT)
        normed = rms_norm(x, self.attention_norm[...], cfg.rms_norm_eps)
        out, cached = self.attention(normed, shared, cached, beside)
        x = x + out
        normed = rms_norm(x, self.mlp_norm[...], cfg.rms_norm_eps)
        return x + self.mlp(normed, shared, beside), cached


class Mistral(nnx.Module):
    """The whole model; `layers` is one Block with the parameters of all layers."""

    def __init__(self, cfg: MistralConfig, *, rngs: nnx.Rngs):
        self.embed = _param(cfg, rngs, "embed")
        self.layers = Block(cfg, rngs=rngs)
        self.final_norm = _param(cfg, rngs, "final_norm")
        if not cfg.tie_word_embeddings:
            self.head = _param(cfg, rngs, "head")

    def hidden(
        self,
        cfg: MistralConfig,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        layout: Layout,
        *,
        attention: str = "auto",
        cache: kv.KVCache | None = None,
        place: kv.Place | None = None,
        apart: tuple[Params, ...] | None = None,
        remat: str = "none",
        reduce_dtype: str = "float32",
        beside: Beside = _NONE_BESIDE,
        lora: LoraConfig | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
        """The normed last hidden states in cfg.dtype, and all layers' cached keys and values.

        `apart` has every layer's own parameters where they and the cache are not stacked.
        """
        letters = ("T", "T") if cache is not None else token_axes(tokens.shape[1])
        if cache is None:
            x = embed(self.embed[...], tokens, cfg.dtype, reduce_dtype, f"B{letters[0]}D")
            positions = reshard(positions, f"B{letters[1]}")
        else:
            x = embed_few(self.embed[...], tokens, cfg.dtype)
        rotation = rope_tables(positions, cfg.head_dim, cfg.rope_theta)
        attend = attention_over(layout, cfg.sliding_window, attention, cfg.head_dim, cfg.dtype)
        shared = Shared(rotation, attend, place, reduce_dtype, letters, lora)
        graphdef, stacked = nnx.split(self.layers)

        def layer(carry: Any, own: Any) -> Any:
            (x, cached), (params, beside) = carry, own
            return nnx.merge(graphdef, params)(cfg, x, shared, cached, beside), None

        if remat != "none":
            layer = jax.checkpoint(layer, policy=remat_policy(remat), prevent_cse=False)
        if cache is not None and apart is not None:
            each = []
            for params, k, v in zip(apart, cache.k, cache.v, strict=True):
                own = nnx.State(params), beside
                (x, own), _ = layer((x, kv.LayerCache(k, v, None)), own)
                each.append(own)
            kept = tuple(own.k for own in each), tuple(own.v for own in each)
        else:
            first = None if cache is None else kv.LayerCache(cache.k, cache.v, jnp.int32(0))
            (x, last), _ = jax.lax.scan(layer, (x, first), (stacked, beside))
            kept = None if last is None else (last.k, last.v)
        return rms_norm(x, self.final_norm[...], cfg.rms_norm_eps), kept

    def logits(self, cfg: MistralConfig, hidden: Array, reduce_dtype: str) -> Array:
        """Logits `B T V`, float32: both factors in cfg.dtype, accumulated in float32."""
        z, c = token_axes_of(hidden)
        axes, weight = ("VD", self.embed) if cfg.tie_word_embeddings else ("DV", self.head)
        out = linear(f"B{z}D,{axes}->B{c}V", hidden, weight[...], reduce_dtype, "float32")
        return reshard(out, "BTV")


@functools.cache
def _graphdef(cfg: MistralConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Mistral(cfg, rngs=nnx.Rngs(0))))[0]


def as_module(cfg: MistralConfig, params: Params) -> Mistral:
    """The NNX module that holds these parameters."""
    return nnx.merge(_graphdef(cfg), nnx.State(params))


def init_params(cfg: MistralConfig, key: PRNGKeyArray) -> Params:
    """Random float32 parameters, born with their sharding on the ambient mesh.

    On one kind of device the values depend on the key alone (to the last bit but one), whatever
    the mesh. The bits come from XLA's own generator, whose programs compile twenty times faster.
    """

    def init(key):
        bits = jax.random.bits(key, (4,), jnp.uint32)
        rngs = nnx.Rngs(jax.random.wrap_key_data(bits, impl="rbg"))
        return nnx.to_pure_dict(nnx.state(Mistral(cfg, rngs=rngs)))

    return jax.jit(init, out_shardings=param_shardings(cfg))(key)


def segment_positions(segments: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 where a row's segment changes: `[1,1,2,2,2]` -> `[0,1,0,1,2]`."""
    index = jnp.arange(segments.shape[1])[None]
    before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start = jnp.where(segments != before, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def hidden_states(
    cfg: MistralConfig,
    params: Params,
    tokens: Int[AnyArray, "B T"],
    segments: Int[AnyArray, "B T"] | None = None,
    branches: Int[AnyArray, "B T"] | None = None,
    positions: Int[AnyArray, "B T"] | None = None,
    *,
    remat: str = "none",
    reduce_dtype: str = "float32",
    attention: str = "auto",
    adapters: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T D"]:
    """The normed last hidden states of every row, in cfg.dtype; arguments are those of `forward`.

    `dropout_key` draws the dropout of what adapters read, the same on every mesh; None: none.
    """
    tokens = jnp.asarray(tokens)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    branches = None if branches is None else jnp.asarray(branches)
    positions = segment_positions(segments) if positions is None else jnp.asarray(positions)
    layout = row_layout(segments, branches, positions)
    keys = None
    if adapters is not None and dropout_key is not None:
        keys = jax.random.split(dropout_key, cfg.num_hidden_layers)
    beside = Beside(None if adapters is None else adapters["layers"], keys)
    hidden, _ = as_module(cfg, params).hidden(
        *(cfg, tokens, positions, layout),
        attention=attention,
        remat=remat,
        reduce_dtype=reduce_dtype,
        beside=beside,
        lora=lora,
    )
    return hidden


def forward(
    cfg: MistralConfig,
    params: Params,
    tokens: Int[AnyArray, "B T"],
    segments: Int[AnyArray, "B T"] | None = None,
    branches: Int[AnyArray, "B T"] | None = None,
    positions: Int[AnyArray, "B T"] | None = None,
    *,
    remat: str = "none",
    reduce_dtype: str = "float32",
    attention: str = "auto",
    adapters: Params | None = None,
    lora: LoraConfig | None = None,
) -> Float[Array, "B T V"]:
    """Logits of every row, float32.

    Args:
        cfg: the architecture; `cfg.dtype` is the dtype of the computation.
        params: as from `init_params`.
        tokens: packed rows.
        segments: 0 padding, k the k-th document of the row; None: one document a row.
        branches: 0 trunk, 1 chosen, 2 rejected; None: all trunk.
        positions: None: restart at each segment. They must grow with the index within a segment,
            and where a window is shorter than the row, padding must not lie inside one: splash
            counts the window by index.
        remat: "none", "dots", "full", "offload", or the outputs to keep (zephyr_jax.models.remat).
        reduce_dtype: dtype in which weight gradients are summed, also across devices.
        attention: "auto", "einsum", "lean", "splash" or "cudnn" (zephyr_jax.models.attention).
        adapters: low-rank adapters beside the parameters (zephyr_jax.models.lora); None: none.
        lora: what they are.
    """
    hidden = hidden_states(
        *(cfg, params, tokens, segments, branches, positions),
        remat=remat,
        reduce_dtype=reduce_dtype,
        attention=attention,
        adapters=adapters,
        lora=lora,
    )
    return as_module(cfg, params).logits(cfg, hidden, reduce_dtype)


def forward_cached(
    cfg: MistralConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: kv.KVCache,
) -> tuple[Float[Array, "B V"], kv.KVCache]:
    """Logits after the last token of every row, float32, and the cache with these tokens in it.

    The prompt may be longer than the window, and come whole or in pieces. Padding, on the left of
    shorter prompts, has position -1. `params["layers"]` may be a tuple of each layer's own
    parameters beside a cache that is apart too: then the layers are written out, not scanned.
    """
    n_new, n_slots = tokens.shape[1], cache.positions.shape[1]
    place = kv.place_of(cache.columns, n_new, n_slots, cfg.sliding_window)
    seen, written = kv.extend_positions(cache.positions, positions, place)
    apart = params["layers"] if isinstance(params["layers"], tuple) else None
    model = as_module(cfg, params if apart is None else params | {"layers": apart[0]})
    layout = cache_layout(positions, seen)
    hidden, kept = model.hidden(
        *(cfg, tokens, positions, layout), cache=cache, place=place, apart=apart
    )
    assert kept is not None
    logits = model.logits(cfg, hidden[:, -1:], "float32")[:, 0]
    return logits, kv.KVCache(*kept, written, cache.columns + n_new)
