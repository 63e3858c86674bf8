# %% [markdown]
# # 2. Masks and packing
#
# From dialogues to the rows that the model is trained on: token ids and targets, many documents
# in one row, the attention mask that separates them, and a preference pair as one document
# that holds its prompt once. The test of all of it is one sentence: **every log-prob is that of
# the sequence alone.**

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
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import zephyr_jax as zj
from zephyr_jax.data.packing.packing import best_fit, build_row, dialogue_document, pair_document
from zephyr_jax.data.text.chat import render_pair
from zephyr_jax.demo import corpus
from zephyr_jax.models.masks import row_layout, visible
from zephyr_jax.reports.inspect import row_cards
from zephyr_jax.reports.page import print_cards
from zephyr_jax.types import Rows

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

# %% [markdown]
# A small tokenizer, trained on the package's synthetic corpus: SentencePiece with 380 tokens and
# the rules of Mistral's. For a real one: `zj.Tokenizer.from_folder(folder)`.

# %%
folder = Path(tempfile.mkdtemp())
corpus.write_ultrachat(folder / "raw", 60, seed=0)
corpus.train_tokenizer(corpus.tokenizer_lines(folder / "raw"), folder / "t.model", 380)
tok = zj.Tokenizer.from_file(folder / "t.model")

# %% [markdown]
# ## A dialogue becomes ids and targets
#
# One template in one place (`zj.render_chat`). The mask is 1 on what the assistant says and on
# the `</s>` that ends it: those tokens are learnt. Headers and the user's turns are only read.

# %%
dialogues = [
    [
        {"role": "user", "content": "What is two plus three?"},
        {"role": "assistant", "content": "Five."},
        {"role": "user", "content": "And ten less?"},
        {"role": "assistant", "content": "Minus five."},
    ],
    [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello!"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sea blue?"},
        {"role": "assistant", "content": "It is deep."},
    ],
]
rendered = [zj.render_chat(tok, dialogue) for dialogue in dialogues]
ids, targets = rendered[1]
print(zj.render_text(dialogues[1]))
print("ids     ", ids)
print("targets ", targets)
assert tok.decode([i for i, target in zip(ids, targets, strict=True) if target]) == "Hello!"
assert targets[ids.index(tok.eos_id, targets.index(1))] == 1  # the </s> of the answer is learnt

# %% [markdown]
# ## Documents share a row
#
# A row has a fixed number of places, here 128. Dialogues of 20 to 80 tokens would leave most of
# it empty, so each row takes several: best-fit decreasing, every document where it leaves the
# least room. `build_row` lays them down.

# %%
T = 128
documents = [dialogue_document(*both, max_length=T) for both in rendered]
lengths = [len(document.tokens) for document in documents]
bins = best_fit(lengths, T)
print(f"lengths {lengths} -> rows {bins}")
row = build_row([documents[i] for i in bins[0]], T, pairs=0)
print_cards(row_cards(row, tok), sys.stdout, color=True)

# %% [markdown]
# Colored is what carries loss. Besides the tokens a row has four arrays of the
# same length: `segments` (which document, 0 is padding), `positions` (restart in every
# document), `branches` (0 here; pairs use them) and `loss_mask`. That is
# `zephyr_jax.types.Rows`, the one layout of every stage.


# %%
def rows_of(*stored):
    """`Rows` of one or several stored rows, `B T`."""
    stacked = np.stack(stored)
    return Rows(*(stacked[name].astype(np.int32) for name in Rows._fields))


rows = rows_of(row)
starts = np.flatnonzero(np.diff(rows.segments[0], prepend=0) > 0)
assert (rows.positions[0, starts] == 0).all()  # every document begins at 0
assert not rows.loss_mask[0, starts].any()  # and nothing predicts its first token
assert not rows.loss_mask[rows.segments == 0].any()

# %% [markdown]
# ## The mask of a packed row
#
# One rule: a query sees a key if both are of the same document, the key is not later, the key is
# in the shared prefix or in the query's own branch, and it lies inside the window *by position*.
# Above the mask its arrays; each color is a document.


# %%
def draw(rows, window, colors, labels, code):
    """The mask of the first row, colored by `code` (T, of the keys), above it the row's arrays."""
    queries, keys, _ = row_layout(
        *(np.asarray(x) for x in (rows.segments, rows.branches)), rows.positions
    )
    mask = np.asarray(visible(queries, keys, window))[0]
    height = [1, 1, 1, 14]
    _, axes = plt.subplots(
        4, 1, figsize=(5.6, 6.4), layout="constrained", height_ratios=height, sharex=True
    )
    palette = ListedColormap(["#f4f4f4", *colors])
    strips = (
        code,
        np.where(code > 0, rows.positions[0], np.nan),
        np.where(rows.loss_mask[0] > 0, code, 0),
    )
    names = ("part", "position", "targets")
    for here, strip, name in zip(axes, strips, names, strict=False):
        kind = (
            {"cmap": plt.get_cmap("cividis").with_extremes(bad="#f4f4f4")}
            if name == "position"
            else {"cmap": palette, "vmin": 0}
        )
        top = {} if name == "position" else {"vmax": len(colors)}
        here.imshow(strip[None], aspect="auto", interpolation="nearest", **kind, **top)
        here.set(yticks=[])
        here.set_ylabel(name, rotation=0, ha="right", va="center")
    axes[3].imshow(
        np.where(mask, code[None], 0), cmap=palette, vmin=0, vmax=len(colors), aspect="auto"
    )
    axes[3].set(xlabel="key", ylabel="query")
    patches = [Patch(color=color, label=label) for color, label in zip(colors, labels, strict=True)]
    axes[3].legend(handles=patches, loc="upper right", frameon=False)
    plt.show()
    return mask


names = [f"document {number}" for number in range(1, len(bins[0]) + 1)]
mask = draw(rows, None, (BLUE, ORANGE, GREEN)[: len(names)], names, rows.segments[0])

# %% [markdown]
# Each document is a causal triangle of its own; nothing crosses, and padding sees nothing.

# %%
segments = rows.segments[0]
same = segments[:, None] == segments[None]
assert not mask[~same].any()
assert not mask[segments == 0].any()
assert np.array_equal(
    mask[same & (segments > 0)[:, None]], np.tril(same)[same & (segments > 0)[:, None]]
)

# %% [markdown]
# ## A preference pair is one document
#
# Two sequences would be `prompt + chosen` and `prompt + rejected`. Instead the prompt is there
# once (the *shared prefix*), then both answers (the *branches*), each of which sees the prefix and
# itself. The prefix ends one token early and each branch begins with its own copy of the prompt's
# last token, at that token's position and never a target: so each answer's first token stands
# right behind its predictor. On numbers:

# %%
small = pair_document(prompt=[1, 7], chosen=[8, 2], rejected=[9, 2], pair_id=1)
for name in ("tokens", "positions", "branches", "loss_mask"):
    print(f"{name:10}", getattr(small, name).astype(int))
assert small.tokens.tolist() == [1, 7, 8, 2, 7, 9, 2]
assert small.positions.tolist() == [0, 1, 2, 3, 1, 2, 3]

# %% [markdown]
# Two real pairs in one row, with a window of 32, shorter than the documents.

# %%
asked = [
    ("What is two plus three?", "Two plus three is five.", "It is six, or so they say."),
    ("Name a color.", "Blue.", "I will not name any color at all today."),
]
options = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}
pairs = [
    render_pair(tok, [{"role": "user", "content": question}], chosen, rejected, **options)
    for question, chosen, rejected in asked
]
packed = [pair_document(*pair, pair_id=number) for number, pair in enumerate(pairs, 1)]
T = 144
row = build_row(packed, T, pairs=2)
rows = rows_of(row)
print_cards(row_cards(row, tok), sys.stdout, color=True)

# %%
cfg = dataclasses.replace(
    zj.MistralConfig.tiny(), vocab_size=tok.vocab_size, sliding_window=32, initializer_range=0.15
)
code = np.where(rows.segments[0] > 0, rows.branches[0] + 1, 0)
colors, labels = (GREY, BLUE, ORANGE), ("shared prefix", "chosen", "rejected")
mask = draw(rows, cfg.sliding_window, colors, labels, code)

# %% [markdown]
# Read it by rows. A query of a rejected answer (lower part of each block) sees orange, itself,
# and gray, the shared prefix. Between them is the blank of the chosen answer, which it must not
# see. The window cuts the gray by position: the rejected answer stands far from its prefix in the
# row but right behind it by position, so it sees as much of it as the chosen one does.

# %%
branches, positions = rows.branches[0], rows.positions[0]
assert not mask[np.ix_(branches == 2, branches == 1)].any()
assert not mask[np.ix_(branches == 1, branches == 2)].any()
for document in (1, 2):
    seen = {}
    for branch in (1, 2):
        queries = (segments := rows.segments[0]) == document
        first = np.flatnonzero(queries & (branches == branch))[0]
        seen[branch] = np.flatnonzero(mask[first] & (branches == 0)).tolist()
    assert seen[1] == seen[2]  # both answers begin with the same view of the prompt

# %% [markdown]
# ## The log-probs are those of the sequences alone
#
# A model with random weights, large enough that every mistake shows. Once the packed row, once
# each of the four sequences by itself.

# %%
params = zj.init_params(cfg, jax.random.key(0))


def score(rows, n_pairs=2):
    """Summed log-probs of every pair's chosen and rejected answer, nats: `B K 2`."""
    logits = zj.forward(cfg, params, rows.tokens, rows.segments, rows.branches, rows.positions)
    logps = zj.token_logps(logits, rows.tokens, rows.loss_mask)
    return zj.pair_logps(logps, rows.segments, rows.branches, n_pairs)


def alone(prompt, answer):
    """The summed log-probs of an answer behind its prompt, a sequence by itself."""
    tokens = np.array([prompt + answer])
    targets = np.arange(tokens.shape[1])[None] >= len(prompt)
    return zj.token_logps(zj.forward(cfg, params, tokens), tokens, targets).sum()


together = np.asarray(score(rows))[0]
separate = np.array(
    [[alone(pair.prompt, pair.chosen), alone(pair.prompt, pair.rejected)] for pair in pairs]
)
for number, (a, b) in enumerate(zip(together, separate, strict=True), 1):
    print(f"pair {number}   packed {a[0]:9.4f} {a[1]:9.4f}   alone {b[0]:9.4f} {b[1]:9.4f} nats")
print(f"largest difference {np.abs(together - separate).max():.1e}")
np.testing.assert_allclose(together, separate, rtol=2e-6)

# %% [markdown]
# ## What each array is for
#
# Leave one out and the numbers are others. This is what such mistakes cost, and why a test
# guards each of them.

# %%
plain = np.arange(T, dtype=np.int32)[None]
mistakes = {
    "nothing wrong": rows,
    "branches forgotten": rows._replace(branches=np.zeros_like(rows.branches)),
    "documents forgotten": rows._replace(segments=(rows.segments > 0).astype(np.int32)),
    "positions by index": rows._replace(positions=plain),
}
wrong = {}
for name, given in mistakes.items():
    logits = zj.forward(cfg, params, given.tokens, given.segments, given.branches, given.positions)
    logps = zj.token_logps(logits, rows.tokens, rows.loss_mask)
    sums = zj.pair_logps(logps, rows.segments, rows.branches, 2)[0]
    wrong[name] = np.abs(np.asarray(sums) - separate).ravel()

# %%
figure, here = plt.subplots(figsize=(7.4, 2.9), layout="constrained")
answers = ("pair 1 chosen", "pair 1 rejected", "pair 2 chosen", "pair 2 rejected")
for number, (answer, color) in enumerate(
    zip(answers, (BLUE, ORANGE, "#7db7dd", "#f0a47a"), strict=True)
):
    at = np.arange(len(wrong)) + 0.2 * (number - 1.5)
    here.bar(
        at,
        [max(values[number], 1e-6) for values in wrong.values()],
        0.2,
        color=color,
        label=answer,
    )
here.set(yscale="log", ylabel="error of the log-prob, nats", ylim=(1e-6, 100))
here.set_xticks(range(len(wrong)), list(wrong))
here.legend(frameon=False, ncols=2, fontsize=8, loc="upper left")
plt.show()
assert wrong["nothing wrong"].max() < 1e-3
for name in ("branches forgotten", "documents forgotten", "positions by index"):
    assert wrong[name].max() > 0.1
    assert wrong[name][0] < 1e-3

# %% [markdown]
# The first pair's chosen answer is right whatever is forgotten: it stands first in the row, and
# everything before it is its own. Such an error hides in the first document; look at the last.
#
# ## What it saves
#
# Here, and for real UltraFeedback pairs in `benchmarks/preferences.py` (0.36 of the tokens of
# padding both sequences to 1,024).

# %%
longest = max(len(p.prompt) + len(answer) for p in pairs for answer in (p.chosen, p.rejected))
padded, ours = 2 * len(pairs) * longest, sum(len(document.tokens) for document in packed)
print(f"four sequences padded to the longest: {padded} tokens; two packed pairs: {ours}")
assert ours < padded

# %% [markdown]
# **Where this is in the code**: `data/text/chat.py` (the template), `data/packing/packing.py`
# (documents, rows, batches), `models/masks.py` (the rule), `losses/tokens.py` (log-probs). `python
# -m zephyr_jax inspect_data packed` shows any packed set like this. Next: training on such rows.
