# %% [markdown]
# # 1. The model from the inside
#
# One forward pass of a tiny Mistral, taken apart: which parameters there are, what each product
# does to which axes, what a head looks at, how far a sliding window reaches, and why generation
# may keep keys and values. At the end every hand-made number is held against the library's own.

# %%
# Installs the package where it is absent. It has no fixed address: say where your copy lies.
import importlib.util
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the models here are tiny
SOURCE = ""  # "git+https://...", or "file:///..." for a checkout
if importlib.util.find_spec("zephyr_jax") is None:
    assert SOURCE, "zephyr_jax is not installed: set SOURCE in this cell"
    wanted = f"zephyr_jax @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import zephyr_jax as zj
from zephyr_jax.models.cache import init_cache
from zephyr_jax.models.layers import rms_norm, rope, rope_tables
from zephyr_jax.models.masks import row_layout, visible
from zephyr_jax.models.mistral import forward_cached
from zephyr_jax.models.parameters import param_axes, param_shapes

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

# %% [markdown]
# ## The parameters
#
# A configuration has Hugging Face's field names. In the tiny one no two dimensions are alike, so
# a wrong axis cannot hide. We give it a window of 8 and larger weights, so that there is
# something to see. Parameters are a plain nested dict; all layers are stacked on a leading axis
# `L`.

# %%
cfg = dataclasses.replace(zj.MistralConfig.tiny(), sliding_window=8, initializer_range=0.25)
params = zj.init_params(cfg, jax.random.key(0))

shapes = param_shapes(cfg)
for path, axes in param_axes(cfg).items():
    print(f"{path:24} {axes:10} {shapes[path]!s:22} {np.prod(shapes[path]):7,}")
print(f"{'':58} {zj.count_params(cfg):7,}")

# %% [markdown]
# The logical axes mean the same everywhere in the codebase: `B` rows, `T` tokens (as queries), `S`
# tokens (as keys), `L` layers, `D` model, `F` feed-forward, `V` vocabulary, `K` key-value heads,
# `G` query heads that share one of them, `H` head dimension. Sharding and weight files follow
# from this table.

# %%
assert sum(int(np.prod(shape)) for shape in shapes.values()) == zj.count_params(cfg)
assert zj.count_params(zj.MistralConfig.mistral_7b()) == 7_241_732_096

# %% [markdown]
# ## One forward pass
#
# Tokens in, a score for every possible next token out, in float32.

# %%
tokens = jax.random.randint(jax.random.key(1), (1, 32), 0, cfg.vocab_size)
logits = zj.forward(cfg, params, tokens)
print(f"tokens {jax.typeof(tokens)}  ->  logits {jax.typeof(logits)}")

# %% [markdown]
# ## The same, by hand
#
# Three things are the same for all layers: the rotation of every position, the mask of what sees
# what, and the residual stream that the layers add to.

# %%
positions = jnp.arange(32)[None]
cos, sin = rope_tables(positions, cfg.head_dim, cfg.rope_theta)
layout = row_layout(jnp.ones_like(tokens), None, positions)  # one document, no branches
mask = visible(layout.queries, layout.keys, cfg.sliding_window)  # B T S
stream = params["embed"][tokens]  # B T D
print("cos", cos.shape, " mask", mask.shape, " stream", stream.shape)

# %% [markdown]
# Attention: each token asks (`q`), offers (`k`) and gives (`v`). The `G` query heads of a group
# share one key-value head, so keys and values have no `G` axis: that is all there is to grouped
# queries.


# %%
def attention(layer, x):
    """What the heads add to the stream `B T D`, and their weights `B K G T S`."""
    q = rope(jnp.einsum("BTD,DKGH->BKGTH", x, layer["q"]), cos, sin)
    k = rope(jnp.einsum("BTD,DKH->BKTH", x, layer["k"]), cos, sin)
    v = jnp.einsum("BTD,DKH->BKTH", x, layer["v"])
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k) / jnp.sqrt(cfg.head_dim)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
    return jnp.einsum("BKGTH,KGHD->BTD", mixed, layer["o"]), weights


# %% [markdown]
# The MLP works on each token alone: one projection opens or closes the other (SwiGLU).


# %%
def mlp(layer, x):
    gate = jnp.einsum("BTD,DF->BTF", x, layer["gate"])
    up = jnp.einsum("BTD,DF->BTF", x, layer["up"])
    return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, layer["down"])


# %% [markdown]
# A layer is both, each behind its norm, each added to the stream. After the last layer one more
# norm and the head.


# %%
def by_hand(stream):
    """Logits `B T V`, the stream after every layer, and every layer's attention weights."""
    streams, maps = [], []
    for number in range(cfg.num_hidden_layers):
        layer = jax.tree.map(lambda stack, i=number: stack[i], params["layers"])
        normed = rms_norm(stream, layer["attention_norm"], cfg.rms_norm_eps)
        added, weights = attention(layer["attention"], normed)
        stream = stream + added
        normed = rms_norm(stream, layer["mlp_norm"], cfg.rms_norm_eps)
        stream = stream + mlp(layer["mlp"], normed)
        streams.append(stream)
        maps.append(weights)
    last = rms_norm(stream, params["final_norm"], cfg.rms_norm_eps)
    return jnp.einsum("BTD,DV->BTV", last, params["head"]), streams, maps


mine, streams, maps = by_hand(stream)
difference = float(jnp.abs(mine - logits).max())
print(f"largest difference from zj.forward: {difference:.1e}, of logits up to {logits.max():.1f}")
assert difference < 1e-4

# %% [markdown]
# That is the whole model. The library's own differs in what does not change the numbers: it
# scans over the layers, divides every product over devices, and picks an attention kernel for
# the machine.
#
# ## What the heads look at
#
# Every small square is one head: a row of it is one token's attention over the tokens before it,
# and sums to 1. Grey is what the mask forbids: later tokens, and those outside the window of 8.

# %%
heads = cfg.num_attention_heads
figure, axes = plt.subplots(cfg.num_hidden_layers, heads, figsize=(9.2, 3.6), layout="constrained")
colors = plt.get_cmap("magma_r").with_extremes(bad="#dcdcdc")
for number, weights in enumerate(maps):
    flat = np.where(mask[0], weights[0].reshape(heads, 32, 32), np.nan)
    for head in range(heads):
        here = axes[number, head]
        image = here.imshow(flat[head], cmap=colors, vmin=0, vmax=1)
        here.set(xticks=[], yticks=[])
        if number == 0:
            group = cfg.num_attention_heads // cfg.num_key_value_heads
            here.set_title(f"kv {head // group}, q {head % group}", fontsize=8)
    axes[number, 0].set_ylabel(f"layer {number}")
figure.colorbar(image, ax=axes, label="attention weight", fraction=0.015)
plt.show()

# %% [markdown]
# The statements, as checks: rows sum to 1, no token sees more than 8, itself included.

# %%
for weights in maps:
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert int((weights > 0).sum(-1).max()) <= cfg.sliding_window
print("keys seen by tokens 0..9:", np.asarray(mask[0, :10].sum(-1)))

# %% [markdown]
# ## How far the window reaches
#
# A token sees 7 tokens back. But what it reads there has itself seen 7 tokens back: after `n`
# layers information comes from up to `7 n` tokens away. Mistral-7B's window of 4,096 over 32
# layers spans 131,040 tokens that way. Below: how much the stream at token `t` changes with the
# embedding of token `s`, by the exact Jacobian.

# %%
jacobian = jax.jit(jax.jacrev(lambda x: jnp.stack(by_hand(x)[1])[:, 0]))(stream)[..., 0, :, :]
print("L T D S D:", jacobian.shape)
figure, axes = plt.subplots(1, 3, figsize=(9.2, 3.1), layout="constrained", sharey=True)
for number, here in enumerate(axes):
    influence = np.asarray(jnp.linalg.norm(jacobian[number], axis=(1, 3)))
    reach = (number + 1) * (cfg.sliding_window - 1)
    distance = np.subtract.outer(np.arange(32), np.arange(32))
    assert ((influence > 0) == ((distance >= 0) & (distance <= reach))).all()
    shown = np.where(influence > 0, np.log10(influence, where=influence > 0), np.nan)
    image = here.imshow(shown, cmap=plt.get_cmap("viridis").with_extremes(bad="#dcdcdc"))
    here.plot([-0.5, 30.5 - reach], [reach + 0.5, 31.5], color=ORANGE, lw=1.5)
    here.set(title=f"after layer {number}: {reach} tokens back", xlabel="embedding of token s")
axes[0].set_ylabel("stream at token t")
figure.colorbar(image, ax=axes, label="log10 of the influence", fraction=0.02)
plt.show()

# %% [markdown]
# ## Rotary positions
#
# RoPE turns each pair of entries of a query or key by an angle that grows with the position. A
# product of two turned vectors depends on the difference of the angles alone, so a score knows
# distances and no absolute positions. With Mistral-7B's head of 128 entries:

# %%
ones = jnp.ones((1, 256, 128)) / jnp.sqrt(128.0)
scores = {}
for start in (0, 1_000, 20_000):
    turned = rope(ones, *rope_tables(start + jnp.arange(256)[None], 128, 10_000.0))
    scores[start] = np.asarray(jnp.einsum("TH,H->T", turned[0], turned[0, 0]))
np.testing.assert_allclose(scores[20_000], scores[0], atol=5e-3)  # float32 angles of 20,000 radians

figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 2.9), layout="constrained")
image = left.imshow(
    rope_tables(jnp.arange(256)[None], 128, 10_000.0)[0][0].T, aspect="auto", cmap="RdBu", vmin=-1
)
left.set(xlabel="position", ylabel="pair of entries", title="cosine of the angle")
left.grid(visible=False)
figure.colorbar(image, ax=left)
for (start, line), (color, width, style) in zip(
    scores.items(), ((BLUE, 4, "-"), (ORANGE, 2, "-"), ("black", 1, ":")), strict=True
):
    right.plot(line, style, color=color, lw=width, label=f"from position {start:,}")
right.set(xlabel="distance in tokens", title="score of two equal vectors")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Fast pairs (top) tell neighbors apart, slow ones (bottom) far places. The three curves lie on
# each other: the same distance gives the same score wherever it begins.
#
# ## The cache: a ring of 8 slots
#
# A token's keys and values do not depend on later tokens, so generation keeps them. With a
# window of 8 nothing older than 8 tokens is ever read again, and column `c` goes to slot `c mod
# 8`. We feed our 32 tokens one at a time.

# %%
step = jax.jit(forward_cached, static_argnums=0)
cache = init_cache(cfg, batch=1, max_length=64)
held, one_by_one = [], []
for at in range(32):
    scores, cache = step(cfg, params, tokens[:, at : at + 1], positions[:, at : at + 1], cache)
    one_by_one.append(scores)
    held.append(np.asarray(cache.positions[0]))
difference = float(jnp.abs(jnp.stack(one_by_one, axis=1) - logits).max())
print(f"keys of all layers: {cache.k.shape} (L B K S H), whatever the length")
print(f"largest difference from the full forward pass: {difference:.1e}")
assert cache.k.shape[3] == cfg.sliding_window
assert difference < 1e-4

# %% [markdown]
# What the slots hold after each token; the newest is framed.

# %%
figure, here = plt.subplots(figsize=(9.2, 2.5), layout="constrained")
ring = np.stack(held, axis=1).astype(float)  # slots, steps
newest = ring.max(axis=0)
age = np.where(ring >= 0, newest - ring, np.nan)
image = here.imshow(age, cmap=plt.get_cmap("Blues_r", 8).with_extremes(bad="#f2f2f2"), vmin=-0.5)
image.set_clim(-0.5, 7.5)
for step_number in range(32):
    for slot in range(8):
        if ring[slot, step_number] >= 0:
            dark = age[slot, step_number] < 4
            text = f"{ring[slot, step_number]:.0f}"
            color = "white" if dark else "black"
            here.text(step_number, slot, text, ha="center", va="center", fontsize=6.5, color=color)
    corner = (step_number - 0.5, step_number % 8 - 0.5)
    here.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, lw=1.5))
here.set(xlabel="token fed", ylabel="slot", yticks=range(8))
figure.colorbar(image, label="age in tokens", ticks=range(8), fraction=0.02)
plt.show()

# %% [markdown]
# ## Greedy decoding
#
# Twenty-four tokens, each the likeliest after those before it: once with the cache, once with a
# full forward pass over everything for every token. They are the same tokens.


# %%
def greedy_cached(prompt, n):
    cache, ids = init_cache(cfg, 1, 64), list(prompt)
    fed, at = jnp.array([prompt]), jnp.arange(len(prompt))[None]
    for _ in range(n):
        scores, cache = step(cfg, params, fed, at, cache)
        ids.append(int(scores[0].argmax()))
        fed, at = jnp.array([ids[-1:]]), jnp.array([[len(ids) - 1]])
    return ids


def greedy_full(prompt, n):
    ids = list(prompt)
    full = jax.jit(zj.forward, static_argnums=0)
    for _ in range(n):
        row = jnp.array([ids + [0] * (32 - len(ids))])  # later tokens change nothing
        ids.append(int(full(cfg, params, row)[0, len(ids) - 1].argmax()))
    return ids


prompt = [1, 17, 42, 7, 99]
fast, slow = greedy_cached(prompt, 24), greedy_full(prompt, 24)
print(fast[5:])
assert fast == slow

# %% [markdown]
# **Where this is in the code**: `models/mistral.py` (the modules), `models/layers.py` (norm,
# rotation, projections), `models/masks.py` (the one rule of what sees what), `models/cache.py`
# (the ring), `inference/decoding.py` (the loop of `zj.generate`). Next: how documents share a row.
