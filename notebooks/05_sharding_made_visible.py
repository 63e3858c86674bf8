# %% [markdown]
# # 5. Sharding made visible
#
# One training step on eight devices, under three meshes: who holds what, what the types say,
# what travels between devices, and that the losses are those of one device. The devices are
# fake: XLA divides this CPU into eight, which all of the code believes.

# %%
# Installs the package where it is absent. It has no fixed address: say where your copy lies.
import importlib.util
import os
import subprocess
import sys

# Both before jax is imported; if it was, restart the kernel.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0"  # compiles sooner, and nothing here is timed
)
SOURCE = ""  # "git+https://...", or "file:///..." for a checkout
if importlib.util.find_spec("zephyr_jax") is None:
    assert SOURCE, "zephyr_jax is not installed: set SOURCE in this cell"
    wanted = f"zephyr_jax @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# %%
import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import zephyr_jax as zj
from zephyr_jax.sharding import ACTIVATION_RULES, WEIGHT_RULES, named_sharding, spec
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.steps import jitted_steps
from zephyr_jax.types import Rows, TrainState

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"
COLOURS = [to_hex(plt.get_cmap("tab10")(number)) for number in range(8)]
print(jax.device_count(), "devices:", jax.devices()[0], "...", jax.devices()[-1])
assert jax.device_count() == 8

# %% [markdown]
# ## One table
#
# The mesh has three axes, `data`, `fsdp` and `tensor`, any of which may have size 1. Two short
# tables say which logical axis is sharded over which of them; the parameter table (notebook 1)
# says which logical axes each parameter has. All sharding of the codebase follows from that.

# %%
print("activations:", ACTIVATION_RULES)
print("weights:    ", WEIGHT_RULES)
meshes = {"1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "8x1x1": (8, 1, 1)}

# %% [markdown]
# A small run: the demo's recipe with sizes that eight devices divide, and a batch of sixteen
# rows.

# %%
config = zj.load_config("demo_sft")
config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_hidden_layers=2, num_key_value_heads=4),
    data=dataclasses.replace(config.data, seq_len=64),
)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 768, (16, 64)).astype(np.int32)
ones = np.ones_like(tokens)
positions = np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape)
batch = Rows(tokens, ones, positions, 0 * ones, positions > 20)

# %% [markdown]
# ## Who holds what
#
# Under a mesh `init_params` gives parameters that are created sharded; a batch is sharded by its
# logical axes. The picture: one weight matrix, the gate of the first layer (`D` down, `F` across),
# and the batch (`B` down, `T` across), each place in the color of the device that holds it.
# Where several devices hold the same, the colors are stripes.


# %%
def shards(array):
    """Which devices hold each rectangle (left, top, width, height) of an array's last two axes."""
    held = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(index[-2:], array.shape[-2:], strict=True)
        )
        held.setdefault((left, top, right - left, bottom - top), []).append(device.id)
    return held


def draw(here, array, title):
    """The shards of an array; one that several devices hold has a stripe for each of them."""
    for (left, top, width, height), devices in shards(array).items():
        for number, device in enumerate(sorted(devices)):
            part = width / len(devices)
            corner = (left + number * part, top)
            here.add_patch(Rectangle(corner, part, height, color=COLOURS[device], lw=0))
            middle = (corner[0] + part / 2, top + height / 2)
            here.text(*middle, device, ha="center", va="center", color="white", fontsize=8)
        here.add_patch(Rectangle((left, top), width, height, fill=False, ec="white", lw=2))
    rows, columns = array.shape[-2:]
    here.set(xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns], yticks=[0, rows])
    here.set_title(title, fontsize=8.5)


# %%
figure, axes = plt.subplots(2, 3, figsize=(9.2, 4.6), layout="constrained")
types = {}
for (name, sizes), (top, bottom) in zip(meshes.items(), axes.T, strict=True):
    with jax.set_mesh(zj.make_mesh(*sizes)):
        gate = zj.init_params(config.model, jax.random.key(0))["layers"]["mlp"]["gate"]
        placed = jax.device_put(tokens, named_sharding(spec("BT")))
    draw(top, gate, f"{name}: gate, a piece {gate.addressable_shards[0].data.shape[1:]}")
    draw(bottom, placed, f"{name}: batch, a piece {placed.addressable_shards[0].data.shape}")
    types[name] = (jax.typeof(gate), jax.typeof(placed))
axes[0, 0].set_ylabel("D")
axes[1, 0].set_ylabel("rows B")
for here in axes[0]:
    here.set_xlabel("F")
for here in axes[1]:
    here.set_xlabel("tokens T")
plt.show()

# %% [markdown]
# `1x8x1` divides every parameter eightfold: no device holds a whole one. `8x1x1` gives everybody
# everything. `2x2x2` divides both axes of the matrix, and two devices hold each piece. Rows of
# the batch go over `data` and `fsdp` together, so that under `2x2x2` two devices (of one
# `tensor` pair) hold the same rows.
#
# ## It is in the types
#
# The mesh is explicit: how an array is sharded is part of its type, and is known while a
# function is traced. `128@fsdp` reads: an axis of 128, sharded over `fsdp`.

# %%
for name, (weight, rows) in types.items():
    print(f"{name}   gate {weight!s:34}  batch {rows}")
assert "128@fsdp" in str(types["1x8x1"][0])
assert "400@tensor" in str(types["2x2x2"][0])

# %% [markdown]
# A product whose result is not clear is an error where it is traced, not a slow program. The
# gradient of a weight sums over rows that are sharded over `fsdp`. Should every device get all
# of the sum, or its piece? The library always says which (`out_sharding`); without that JAX
# refuses:

# %%
with jax.set_mesh(zj.make_mesh(fsdp=8)):
    x = jax.device_put(np.ones((16, 64, 128), np.float32), named_sharding(spec("BTD")))
    grad = jax.device_put(np.ones((16, 64, 400), np.float32), named_sharding(spec("BTF")))
    try:
        jnp.einsum("BTD,BTF->DF", x, grad)
        refused = ""
    except Exception as error:  # the class is internal to JAX
        refused = f"{type(error).__name__}: {error}"
    print(refused[:400])
    said = jnp.einsum("BTD,BTF->DF", x, grad, out_sharding=spec("DF", WEIGHT_RULES))
    print("\nwith out_sharding:", jax.typeof(said))
assert "ShardingTypeError" in refused
assert "128@fsdp" in str(jax.typeof(said))

# %% [markdown]
# ## The same step under every mesh
#
# Three steps of SFT on this batch: on one device without a mesh, then under each of the three. The
# code is the same; the step is compiled once for each mesh.


# %%
def train(n_steps=3):
    """Losses of the first steps on the ambient mesh, bytes of a device, and collectives."""
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 20))
    params = zj.init_params(config.model, jax.random.key(0))
    zero = jax.device_put(jnp.int32(0), named_sharding(spec("")))
    state = TrainState(zero, params, jax.jit(optimizer.init)(params))
    rows = Rows(*(jax.device_put(array, named_sharding(spec("BT"))) for array in batch))
    step = jitted_steps(config, optimizer)[0].lower(state, rows).compile()
    losses = []
    for _ in range(n_steps):
        state, sums = step(state, rows)
        losses.append(float(sums["loss"] / sums["weight"]))
    held = {
        name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for name, tree in (("parameters", state.params), ("moments", state.opt_state))
    }
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return losses, held, Counter(re.findall(rf" ({kinds})(?:-start)?\(", step.as_text()))


# %%
results = {"one device": train()}
for name, sizes in meshes.items():
    with jax.set_mesh(zj.make_mesh(*sizes)):
        results[name] = train()
for name, (losses, _, _) in results.items():
    print(f"{name:11}", "  ".join(f"{loss:.7f}" for loss in losses))

# %% [markdown]
# The losses are those of one device, to the order in which float32 sums are added:

# %%
single = np.array(results["one device"][0])
for name in meshes:
    difference = np.abs(np.array(results[name][0]) / single - 1).max()
    print(f"{name}: {difference:.1e} of the loss")
    assert difference < 1e-5

# %% [markdown]
# ## What a mesh costs, and what it saves
#
# Memory of one device, and the transfers that the compiled step holds (each once, also where it
# is in a loop over layers; as XLA's CPU compiler writes them).

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 2.9), layout="constrained")
at, bottom = np.arange(len(results)), np.zeros(len(results))
for kind, color in (("parameters", BLUE), ("moments", "#7db7dd")):
    sizes = np.array([held[kind] for _, held, _ in results.values()]) / 2**20
    left.bar(at, sizes, 0.6, bottom=bottom, color=color, label=kind)
    bottom += sizes
left.set_xticks(at, list(results))
left.set(ylabel="MiB on one device")
left.legend(frameon=False)
kinds = sorted({kind for _, _, counts in results.values() for kind in counts})
for number, (kind, color) in enumerate(
    zip(kinds, (BLUE, ORANGE, GREEN, GREY, "black"), strict=False)
):
    counted = [counts[kind] for _, _, counts in results.values()]
    width = 0.8 / len(kinds)
    bars = right.bar(at + width * (number - (len(kinds) - 1) / 2), counted, width, color=color)
    right.bar_label(bars, fontsize=7)
    bars.set_label(kind)
right.set_xticks(at, list(results))
right.set(ylabel="transfers in the program")
right.legend(frameon=False, fontsize=8, loc="upper right")
plt.show()

# %%
held = {name: sum(held.values()) for name, (_, held, _) in results.items()}
counts = {name: counts for name, (_, _, counts) in results.items()}
assert not counts["one device"]  # no other device
assert counts["1x8x1"]["all-gather"] > counts["8x1x1"]["all-gather"]
assert held["8x1x1"] == held["one device"]
assert 7 < held["one device"] / held["1x8x1"] <= 8
print({name: f"{size / 2**20:.2f} MiB" for name, size in held.items()})

# %% [markdown]
# `8x1x1` (data parallelism) does little but add up gradients, and saves no memory. `1x8x1`
# (FSDP) holds an eighth and gathers each weight when it is needed. `2x2x2` does some of each,
# and its `tensor` axis adds sums of activations inside every layer. Which is best for a slice of
# real chips, `plan.py` asks the TPU compiler: notebook 7.
#
# **Where this is in the code**: `sharding.py` (both tables), `models/parameters.py` (axes of
# parameters), `training/steps.py` (the step). Every process of a real pod runs this same code.
# Next: real weights.
