# %% [markdown]
# # 7. Planning a pod run
#
# What a slice of TPUs is good for, before there is one. Three questions of rising cost: how many
# bytes every chip must hold (arithmetic), whether the 7B training step fits together on 256
# chips (types, no memory), and what the TPU's own compiler makes of a program (libtpu, which
# needs no TPU either). No TPU has run this code; the last section says which numbers are whose.

# %%
# Installs the package where it is absent. It has no fixed address: say where your copy lies.
import importlib.util
import os
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed
SOURCE = ""  # "git+https://...", or "file:///..." for a checkout
if importlib.util.find_spec("zephyr_jax") is None:
    assert SOURCE, "zephyr_jax is not installed: set SOURCE in this cell"
    wanted = f"zephyr_jax @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# %%
from zephyr_jax.planning.compiling import ENVIRONMENT, parse_topology

os.environ |= ENVIRONMENT  # libtpu then looks for no TPU; must be set before jax is imported

# %%
import dataclasses
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import zephyr_jax as zj
from zephyr_jax.chips import CHIPS
from zephyr_jax.config.run import MeshConfig
from zephyr_jax.models.parameters import abstract_params, model_flops_per_token
from zephyr_jax.planning.compiling import make_case
from zephyr_jax.planning.plans import PlanOptions, plan_of, step_count, table
from zephyr_jax.sharding import AXES, spec
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.steps import loss_sums, train_step
from zephyr_jax.types import Rows, TrainState

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

# %% [markdown]
# ## The run
#
# The 7B recipe, as it would be trained.

# %%
config = zj.load_config("zephyr_7b_sft")
cfg = config.model
print(
    f"{zj.count_params(cfg):,} parameters, {step_count(config):,} steps of "
    f"{config.train.batch_size} rows of {config.data.seq_len} tokens"
)

# %% [markdown]
# ## Bytes, by arithmetic
#
# A training step holds float32 parameters, two moments and gradients, all divided alike: 16
# bytes a parameter over `fsdp x tensor` chips. We take the shapes from the same table that a run
# uses, on a mesh of devices that do not exist.


# %%
def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)


def sharded(sizes):
    """The shapes of all parameters, and their shardings on a mesh of these sizes."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(*sizes)):
        return abstract_params(cfg)


def state_gib(sizes):
    """GiB a chip of float32 parameters."""
    leaves = jax.tree.leaves(sharded(sizes))
    return 4 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves) / 2**30


meshes = [(1, 4, 1), (1, 8, 1), (1, 16, 1), (1, 8, 2), (2, 16, 1), (4, 16, 4)]
for sizes in meshes:
    chips = math.prod(sizes)
    print(f"{'x'.join(map(str, sizes)):7} {chips:4} chips  {4 * state_gib(sizes):6.2f} GiB a chip")

# %%
figure, here = plt.subplots(figsize=(9.2, 3.3), layout="constrained")
names = [f"{'x'.join(map(str, sizes))}\n{math.prod(sizes)} chips" for sizes in meshes]
one = np.array([state_gib(sizes) for sizes in meshes])
bottom = np.zeros(len(meshes))
for kind, times, color in (
    ("parameters", 1, BLUE),
    ("moments", 2, "#7db7dd"),
    ("gradients", 1, GREY),
):
    here.bar(names, times * one, 0.55, bottom=bottom, color=color, label=kind)
    bottom += times * one
usable = CHIPS["v5e"].usable_gib
here.axhline(usable, color=ORANGE, lw=1.2, ls="--")
here.text(5.4, usable + 0.3, f"v5e: {usable:g} GiB usable", color=ORANGE, ha="right", va="bottom")
here.set(ylabel="GiB a chip", title="data x fsdp x tensor")
here.legend(frameon=False, loc="upper center")
plt.show()

# %% [markdown]
# What stands above the dashed line cannot train; what is below still needs room for activations.
# Two more statements of the figure: `data` saves no memory, and dividing over `tensor` saves as
# much as over `fsdp`, but for the norms, which are not sharded over `tensor`.

# %%
assert 4 * state_gib((1, 8, 1)) < usable < 4 * state_gib((1, 4, 1))
assert state_gib((2, 16, 1)) == state_gib((1, 16, 1))
np.testing.assert_allclose(state_gib((1, 8, 2)), state_gib((1, 16, 1)), rtol=1e-3)
np.testing.assert_allclose(16 * state_gib((1, 16, 1)) * 2**30, 4 * zj.count_params(cfg), rtol=1e-3)

# %% [markdown]
# A mesh that does not fit the model is refused before anything else:

# %%
try:
    sharded((1, 16, 16))
    refused = ""
except ValueError as error:
    refused = str(error)
print(refused)
assert "K=8" in refused

# %% [markdown]
# ## The whole 7B step, by its types
#
# Sharding is in the types, so `jax.eval_shape` checks the step for 256 chips on a laptop: every
# product, the loss, the gradients and AdamW. Nothing is allocated and nothing is compiled.

# %%
sizes = (2, 16, 8)


def whole_step(sizes, rows):
    """The step, and its state and batch by shape, dtype and sharding on a mesh of these sizes."""
    params = sharded(sizes)
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 100))
    mesh = abstract_mesh(*sizes)
    zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, spec("")))
    state = TrainState(zero, params, jax.eval_shape(optimizer.init, params))
    where = NamedSharding(mesh, spec("BT"))
    shape = (rows, config.data.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=where)
    step = train_step(loss_sums(config), optimizer, config.train.micro_batches)
    return step, state, Rows(ids, ids, ids, ids, mask)


with jax.sharding.use_abstract_mesh(abstract_mesh(*sizes)):
    after, sums = jax.eval_shape(*whole_step(sizes, rows=512))
for path, leaf in traverse_util.flatten_dict(after.params, sep="/").items():
    print(f"{path:24} {leaf.dtype}{list(leaf.shape)!s:24} {leaf.sharding.spec}")
assert after.params["layers"]["mlp"]["up"].sharding.spec == jax.P(None, "fsdp", "tensor")
assert sums["loss"].dtype == jnp.float32

# %% [markdown]
# ## Hours, on the back of an envelope
#
# FLOPs of a step (6 a parameter and token, and causal attention) over the published peak of a
# slice, at two shares of it that one may hope for. An estimate, not a measurement.

# %%
per_step = model_flops_per_token(cfg, config.data.seq_len)
per_step *= config.train.batch_size * config.data.seq_len
print(f"{per_step:.2e} FLOPs a step")
for name in ("v5e:4x4", "v5p:2x2x4", "v6e:8x8"):
    slice_ = parse_topology(name)
    peak = slice_.devices * slice_.chip.peak_flops
    hours = [step_count(config) * per_step / (share * peak) / 3600 for share in (0.3, 0.5)]
    print(f"{name:10} {slice_.chips:3} chips  {hours[0]:5.1f} h at 30%  {hours[1]:5.1f} h at 50%")

# %% [markdown]
# ## What the compiler says
#
# libtpu, the compiler that TPUs run, compiles a step for a slice that is not there, and says
# what it needs: memory to the byte, transfers, and its own estimate of cycles. `plan.py` does it
# for 7B in minutes. Here a very small model on four v5e chips, which still took 99 and 193 s on
# two busy cores: so the cell shows the report of libtpu 0.0.42.1, and compiles again where
# you say so and libtpu is installed (`pip install libtpu`, Linux; it is the extra `plan`).

# %%
COMPILE = False

small = dataclasses.replace(
    config,
    name="small",
    mesh=MeshConfig(2, 2, 1),
    model=dataclasses.replace(
        cfg,
        vocab_size=1152,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=128,
        sliding_window=None,
    ),
    data=dataclasses.replace(config.data, seq_len=512),
    train=dataclasses.replace(config.train, batch_size=16, micro_batches=2, attention="splash"),
)
case = make_case(small, parse_topology("v5e:2x2"))
recorded = {
    "config": "small",
    "topology": "v5e:2x2",
    "mesh": {"data": 2, "fsdp": 2, "tensor": 1},
    "fits": True,
    "gib": {"needed": 0.05157661437988281, "usable": 15.75},
    "gib_by_kind": {
        "parameters": 0.006781578063964844,
        "moments": 0.013563163578510284,
        "batch": 3.24249267578125e-05,
        "kept for the backward pass": 0.00146484375,
        "other temporaries": 0.02391195297241211,
    },
    "seconds": {
        "step": 0.0031822462725279188,
        "compute": 0.0022546806666666665,
        "kernels": 0.0002697980725279188,
        "hidden_transfers": 0.0002271914666666667,
        "exposed_transfers": 0.0006577675333333332,
    },
    "mfu": 0.08863601277946448,
    "calibration": 1.11,
}

# %%
plan = recorded
if COMPILE and importlib.util.find_spec("libtpu"):
    plan = plan_of(case, PlanOptions())
    print(f"compiled in {plan['compile_seconds']:.0f} s")
print(table([plan]))

# %%
figure, (left, right) = plt.subplots(2, 1, figsize=(9.2, 2.9), layout="constrained")
times = {kind: plan["seconds"][kind] for kind in ("compute", "kernels", "exposed_transfers")}
for here, parts, scale in ((left, plan["gib_by_kind"], 1024), (right, times, 1000)):
    end = 0.0
    for (kind, size), color in zip(
        parts.items(), (BLUE, "#7db7dd", GREEN, ORANGE, GREY), strict=False
    ):
        label = f"{kind.replace('_', ' ')} {scale * size:.2g}"
        here.barh([0], [scale * size], 0.6, left=end, color=color, label=label)
        end += scale * size
    here.set(yticks=[])
    here.legend(frameon=False, fontsize=7.5, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
left.set(xlabel=f"MiB a chip, of {1024 * plan['gib']['usable']:,.0f} usable")
right.set(xlabel="milliseconds a step, by the compiler's estimate")
plt.show()

# %% [markdown]
# The first number can be checked against the arithmetic above, and agrees to the byte: float32
# parameters over two chips, but for the norms, which everybody holds.

# %%
norms = (2 * small.model.num_hidden_layers + 1) * small.model.hidden_size
by_hand = 4 * ((zj.count_params(small.model) - norms) / 2 + norms)
assert by_hand == round(plan["gib_by_kind"]["parameters"] * 2**30)
assert plan["fits"]
print(f"{by_hand:,.0f} bytes of parameters a chip")

# %% [markdown]
# **Whose numbers these are.** Memory and transfers are the compiler's, and exact. Time is its
# estimate of cycles at the clock at which full matrix products reach the published peak; waiting
# for data, checkpoints and compilation are left out. It has never been held against a TPU: use
# it to compare layouts (`docs/pods.md`).
#
# **Where this is in the code**: `planning/`; from the command line `python -m zephyr_jax plan
# --config=zephyr_7b_sft --topology=v5e:4x4,v5p:2x2x4 --auto`.
