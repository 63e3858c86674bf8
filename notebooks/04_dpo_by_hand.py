# %% [markdown]
# # 4. DPO by hand
#
# Direct preference optimization, derived in five lines and then checked: its optimum against the
# closed form, its loss against `zj.dpo_loss`, its gradient against `jax.grad`, what beta does,
# and what overfitting looks like (Rafailov et al. 2023, arXiv:2305.18290).

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
import optax

import zephyr_jax as zj
from zephyr_jax.data.packing.packing import build_row, pair_document
from zephyr_jax.types import Rows

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

# %% [markdown]
# ## The derivation
#
# **1. Preferences.** Bradley and Terry: every answer $y$ to a prompt $x$ has a reward, and
#
# $$p(y_w \succ y_l) = \sigma\big(r(x, y_w) - r(x, y_l)\big).$$
#
# **2. The objective.** High reward, without leaving the reference $\pi_0$ (the SFT model) too
# far:
#
# $$\max_\pi \; \mathbb{E}_{y \sim \pi}\,[r(x, y)] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_0).$$
#
# **3. Its solution**, for a finite set of answers by one Lagrange multiplier:
#
# $$\pi^*(y) = \tfrac{1}{Z}\, \pi_0(y)\, e^{r(x, y) / \beta}.$$
#
# **4. Turned round**, the reward is a log-ratio of policies, but for a constant of the prompt:
#
# $$r(x, y) = \beta \log \frac{\pi^*(y)}{\pi_0(y)} + \beta \log Z(x).$$
#
# **5. Put into 1**, $Z$ cancels. What is left is a loss of log-probs, with no reward model and
# no sampling:
#
# $$L = -\log \sigma\Big(\beta \log \frac{\pi(y_w)}{\pi_0(y_w)}
# - \beta \log \frac{\pi(y_l)}{\pi_0(y_l)}\Big).$$
#
# $\beta \log \pi(y) / \pi_0(y)$ is called the *implicit reward* of an answer.
#
# ## Is it true? Six answers
#
# One prompt, six possible answers, a reference and a reward. The closed form is step 3. Next to
# it we minimize the DPO loss over all pairs, each seen as often as Bradley and Terry say, by
# plain gradient descent on six logits that begin at the reference.

# %%
answers = list("abcdef")
reference = jnp.log(jnp.array([0.35, 0.25, 0.18, 0.12, 0.07, 0.03]))  # log-probs
reward = jnp.array([0.0, 0.6, -0.4, 1.2, 0.9, 2.0])


def closed_form(beta):
    return jax.nn.softmax(reference + reward / beta)


def population_loss(logits, beta):
    """The DPO loss over all ordered pairs of answers, each weighted by how often it is seen."""
    logps = jax.nn.log_softmax(logits)
    wins = jax.nn.sigmoid(reward[:, None] - reward[None])  # how often the row beats the column
    ratio = beta * (logps - reference)
    return -(wins * jax.nn.log_sigmoid(ratio[:, None] - ratio[None])).sum() / 36


def minimized(beta):
    optimizer = optax.adam(0.05)

    def step(carry, _):
        logits, state = carry
        grads = jax.grad(population_loss)(logits, beta)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference)), length=3000)
    return jax.nn.softmax(logits)


# %%
betas = (3.0, 1.0, 0.3)
figure, axes = plt.subplots(1, 3, figsize=(9.2, 2.7), layout="constrained", sharey=True)
for here, beta in zip(axes, betas, strict=True):
    exact, found = closed_form(beta), jax.jit(minimized)(jnp.float32(beta))
    np.testing.assert_allclose(found, exact, atol=1e-3)
    at = np.arange(6)
    here.bar(at - 0.2, jnp.exp(reference), 0.4, color="#c8c8c8", label="reference")
    here.bar(at + 0.2, exact, 0.4, color=BLUE, label="closed form")
    here.plot(at + 0.2, found, "o", color=ORANGE, ms=5, label="found by the DPO loss")
    here.set_xticks(at, [f"{a}\n{r:+.1f}" for a, r in zip(answers, reward, strict=True)])
    here.set(title=f"beta = {beta:g}")
axes[0].set_ylabel("probability")
axes[1].set_xlabel("answer, and its reward")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The dots lie on the bars. A large beta stays near the reference; a small one goes to the best
# answer, however unlikely it was.
#
# ## The loss, by hand
#
# All that it needs is four numbers a pair: summed log-probs of both answers under the policy and
# under the reference. `zj.dpo_loss` is the same function.

# %%
keys = jax.random.split(jax.random.key(0), 4)
chosen, rejected, ref_chosen, ref_rejected = (20 * jax.random.normal(k, (64,)) - 90 for k in keys)
beta = 0.1


def my_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return jnp.log1p(jnp.exp(-margin)).mean()  # -log sigmoid


theirs, info = zj.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
mine = my_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
print(f"by hand {mine:.6f}, zj.dpo_loss {theirs:.6f}")
np.testing.assert_allclose(mine, theirs, rtol=1e-6)
np.testing.assert_allclose(info.chosen_rewards, beta * (chosen - ref_chosen), rtol=1e-5)

# %% [markdown]
# **At step 0** the policy is the reference: every implicit reward is 0, the loss is ln 2, and
# the share of pairs "won" is 0 (ties do not count). A run whose first loss is not 0.693 has a
# bug.

# %%
start, info = zj.dpo_loss(chosen, rejected, chosen, rejected, beta=beta)
print(f"loss at step 0: {start:.6f}, ln 2 = {np.log(2):.6f}")
np.testing.assert_allclose(start, np.log(2), rtol=1e-6)
assert not (info.chosen_rewards > info.rejected_rewards).any()

# %% [markdown]
# ## The gradient, by hand
#
# With $\sigma' = \sigma (1 - \sigma)$,
#
# $$\nabla L = -\beta \; \sigma(\hat r_l - \hat r_w) \;
# \big[\nabla \log \pi(y_w) - \nabla \log \pi(y_l)\big].$$
#
# Up with the chosen answer, down with the rejected one, weighted by how wrong the implicit
# rewards still are: a pair that is won by far pulls no more.

# %%
reward_gap = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
by_hand = -beta * jax.nn.sigmoid(-reward_gap) / len(chosen)


def loss_of(chosen, rejected):
    return zj.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)[0]


by_jax = jax.grad(loss_of, argnums=(0, 1))(chosen, rejected)
np.testing.assert_allclose(by_jax[0], by_hand, rtol=1e-5, atol=1e-9)
np.testing.assert_allclose(by_jax[1], -by_hand, rtol=1e-5, atol=1e-9)
print("64 gradients of chosen, 64 of rejected: as derived")

# %% [markdown]
# ## What beta does
#
# To the same change of the log-ratio a larger beta answers with a larger reward: the loss falls
# sooner, and the pull ends sooner. So **beta is how far the policy may go**. The pull begins at
# one half; it is down to a tenth at a log-ratio of 22 nats with beta 0.1, and of 4.4 nats with
# beta 0.5.

# %%
ratio = jnp.linspace(-60, 60, 241)
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 2.9), layout="constrained")
for value, color in zip((0.01, 0.1, 0.5), (GREEN, BLUE, ORANGE), strict=True):
    pull = jax.nn.sigmoid(-value * ratio)
    left.plot(ratio, -jax.nn.log_sigmoid(value * ratio), color=color, label=f"beta = {value}")
    right.plot(ratio, pull, color=color)
left.axhline(np.log(2), color=GREY, lw=1, ls=":")
left.text(60, np.log(2) + 0.1, "ln 2", ha="right", color=GREY)
left.set(title="loss", xlabel="log-ratio of chosen less that of rejected, nats", ylim=(0, 6))
right.set(title="pull: the sigmoid in the gradient", xlabel=left.get_xlabel(), ylim=(0, 1))
left.legend(frameon=False)
plt.show()
tenth = {value: np.log(9) / value for value in (0.1, 0.5)}
print({value: f"{nats:.1f} nats" for value, nats in tenth.items()})
assert round(tenth[0.1]) == 22
assert round(tenth[0.5], 1) == 4.4

# %% [markdown]
# And on the six answers: every beta is a point of the best trade between reward and divergence.

# %%
grid = jnp.geomspace(0.1, 30, 60)
policies = jax.vmap(closed_form)(grid)
gains = policies @ reward
divergence = (policies * (jnp.log(policies) - reference)).sum(-1)
figure, here = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
here.plot(divergence, gains, color=BLUE)
for value in (3.0, 1.0, 0.3, 0.1):
    policy = closed_form(value)
    spent, gained = (policy * (jnp.log(policy) - reference)).sum(), policy @ reward
    here.plot(spent, gained, "o", color=ORANGE, ms=5)
    here.annotate(f"beta {value:g}", (spent, gained), xytext=(6, -9), textcoords="offset points")
here.set(xlabel="KL to the reference, nats", ylabel="expected reward")
plt.show()
assert (jnp.diff(divergence) < 0).all()
assert (jnp.diff(gains) < 0).all()  # the grid goes from small beta to large

# %% [markdown]
# ## The same on a model: pairs whose truth we know
#
# Prompts and answers are random tokens. Every token has a hidden worth; an answer's true reward
# is the sum over its tokens, and Bradley and Terry draw which of two answers wins: so about a
# quarter of the labels are against the true reward. 128 pairs to train on, 256 held out. Four
# pairs share a row, each a document that holds its prompt once (notebook 2).

# %%
cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=14, initializer_range=0.1)
rng = np.random.default_rng(0)
worth = 0.6 * rng.normal(size=cfg.vocab_size)


def draw(n):
    """`n` pairs in rows of four, and the true reward of the chosen less that of the rejected."""
    documents, gaps = [], []
    for number in range(n):
        prompt, one, two = (rng.integers(3, cfg.vocab_size, k).tolist() for k in (4, 6, 6))
        gap = worth[one].sum() - worth[two].sum()
        if rng.random() > 1 / (1 + np.exp(-gap)):
            one, two, gap = two, one, -gap
        documents.append(pair_document(prompt, one, two, pair_id=number + 1))
        gaps.append(gap)
    stored = np.stack([build_row(documents[at : at + 4], 72, 4) for at in range(0, n, 4)])
    return Rows(*(stored[name].astype(np.int32) for name in Rows._fields)), np.array(gaps)


train, _ = draw(128)
heldout, gaps = draw(256)
best = np.log1p(np.exp(-gaps)).mean()
print(f"held-out loss of the true reward: {best:.3f}; it orders {100 * (gaps > 0).mean():.0f}%")

# %% [markdown]
# The reference is the model at the start; its log-probs are computed once. Policy and loss are a
# few lines of public functions.


# %%
@jax.jit
def log_probs(params, rows):
    """Of the chosen and the rejected answer of every pair, `B K 2`."""
    logits = zj.forward(cfg, params, rows.tokens, rows.segments, rows.branches, rows.positions)
    logps = zj.token_logps(logits, rows.tokens, rows.loss_mask)
    return zj.pair_logps(logps, rows.segments, rows.branches, 4)


start = zj.init_params(cfg, jax.random.key(0))
before = {"train": log_probs(start, train), "heldout": log_probs(start, heldout)}


def dpo(params, rows, ref):
    now = log_probs(params, rows)
    loss, info = zj.dpo_loss(now[..., 0], now[..., 1], ref[..., 0], ref[..., 1], beta=0.1)
    drift = (now - ref).mean((0, 1))  # chosen, rejected
    return loss, jnp.stack([(info.chosen_rewards > info.rejected_rewards).mean(), *drift])


# %% [markdown]
# First the gradient of step 0 through the whole model. There every weight is one half, so it
# must be minus beta / 2 times the mean of $\nabla \log \pi(y_w) - \nabla \log \pi(y_l)$: for
# every one of the parameters.


# %%
def mean_ratio(params):
    both = log_probs(params, train)
    return (both[..., 0] - both[..., 1]).mean()


through_loss, _ = jax.jit(jax.grad(dpo, has_aux=True))(start, train, before["train"])
plain = jax.jit(jax.grad(mean_ratio))(start)
for a, b in zip(jax.tree.leaves(through_loss), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, -0.1 / 2 * b, atol=1e-5)
print(f"{zj.count_params(cfg):,} gradients: as derived")

# %% [markdown]
# ## What overfitting looks like
#
# A hundred steps of Adam on all 128 pairs.

# %%
optimizer = optax.adam(3e-4)


@jax.jit
def step(params, state):
    grads, _ = jax.grad(dpo, has_aux=True)(params, train, before["train"])
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state


judge = jax.jit(dpo)
params, state, seen = start, optimizer.init(start), []
for number in range(101):
    if number % 4 == 0:
        both = [judge(params, train, before["train"]), judge(params, heldout, before["heldout"])]
        seen.append([number, *(float(x) for loss, rest in both for x in (loss, *rest))])
    params, state = step(params, state)
steps, *columns = np.array(seen).T
train_loss, train_wins, _, _, held_loss, held_wins, held_chosen, held_rejected = columns

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.1), layout="constrained")
axes[0].plot(steps, train_loss, color=BLUE, label="training")
axes[0].plot(steps, held_loss, "--", color=ORANGE, label="held out")
axes[0].axhline(best, color=GREEN, lw=1, ls=":")
axes[0].text(100, best - 0.008, "true reward", color=GREEN, ha="right", va="top", fontsize=8)
axes[0].axvline(steps[held_loss.argmin()], color=GREY, lw=0.8)
axes[0].set(title="loss", xlabel="step", ylim=(0, None))
axes[1].plot(steps, train_wins, color=BLUE)
axes[1].plot(steps, held_wins, "--", color=ORANGE)
axes[1].axhline((gaps > 0).mean(), color=GREEN, lw=1, ls=":")
axes[1].set(title="share of pairs won", xlabel="step", ylim=(0, 1.03))
axes[2].plot(steps, held_chosen, color=BLUE, label="chosen")
axes[2].plot(steps, held_rejected, color=ORANGE, label="rejected")
axes[2].set(title="held out: change of log-probs, nats", xlabel="step")
for here in (axes[0], axes[2]):
    here.legend(frameon=False, loc="center right" if here is axes[0] else "lower left")
plt.show()
turn = int(held_loss.argmin())
print(
    f"held-out loss {held_loss[0]:.3f}, least {held_loss[turn]:.3f} at step {steps[turn]:.0f}, "
    f"then {held_loss[-1]:.3f}; training {train_loss[-1]:.3f}"
)

# %% [markdown]
# Three signs. The training loss goes to 0 while the held-out loss turns: the model learns the
# accidents of 128 labels, a quarter of which are wrong. Training pairs are all won, held-out
# pairs less often than at the turn. And held-out answers become less likely, **the chosen ones
# too**: the loss asks for a difference, and nothing holds the level. In a real run watch the
# held-out loss, and `drift/chosen`.

# %%
np.testing.assert_allclose([train_loss[0], held_loss[0]], np.log(2), rtol=1e-4)
assert held_loss[turn] < held_loss[0] - 0.01
assert held_loss[-1] > held_loss[turn] + 0.02
assert train_loss[-1] < 0.3
assert train_wins[-1] > 0.98
assert held_wins[-1] < held_wins[turn]
assert held_chosen[-1] < -1

# %% [markdown]
# **Where this is in the code**: `losses/tokens.py` (`dpo_loss`), `losses/preference.py` (some
# fifteen others, each with its equation), `training/reference.py` (the reference's log-probs,
# computed once and kept in a file). From the command line: `python -m zephyr_jax train
# --config=demo_dpo`; `docs/preferences.md` shows the same three signs on a real model. Next: many
# devices.
