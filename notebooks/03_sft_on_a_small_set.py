# %% [markdown]
# # 3. Supervised fine-tuning on a small set
#
# The whole pipeline, small: raw records in UltraChat's schema, cleaning, a tokenizer, packed rows,
# `zj.fit`, a loss curve, checkpoints, and replies before and after. The set is synthetic: a
# small world that the package generates, in which small models can learn something in seconds.
# With another source and another config the same calls train Mistral-7B.

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
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import zephyr_jax as zj
from zephyr_jax.data.prepare.prepare import prepare, read_split
from zephyr_jax.demo import corpus
from zephyr_jax.evaluation.metrics_file import read_metrics

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

# %% [markdown]
# ## Raw records
#
# 1,500 dialogues, as UltraChat publishes its own: one JSON object a line, the turns in a list. A
# few are spoilt on purpose in the ways in which the real ones are.

# %%
root = Path(tempfile.mkdtemp())
corpus.write_ultrachat(root / "raw", 1500, seed=0)
for line in (root / "raw" / "train_0.jsonl").read_text().splitlines()[:2]:
    print(line)

# %% [markdown]
# ## Prepared
#
# `prepare` is what `scripts/prepare_data.py` calls: cleaning, splits, ArrayRecord files that
# `tensorflow_datasets` reads (without TensorFlow), and a report of what every rule did.

# %%
prepared = prepare("ultrachat", root / "raw", root / "data", "raw")
train, test = (read_split(prepared, name) for name in ("train_sft", "test_sft"))
print(f"{len(train)} dialogues to train on, {len(test)} held out")
for turn in train[0]["messages"]:
    print(f"{turn['role']:>9}: {turn['content']}")

# %% [markdown]
# ## The tokenizer
#
# SentencePiece with 768 tokens, trained on the raw records under the rules of Mistral's.

# %%
(root / "tokenizer").mkdir()
lines = corpus.tokenizer_lines(root / "raw")
corpus.train_tokenizer(lines, root / "tokenizer" / "tokenizer.model", 768)
tok = zj.Tokenizer.from_folder(root / "tokenizer")
ids, targets = zj.render_chat(tok, train[0]["messages"])
print([tok.decode([i]) for i, target in zip(ids, targets, strict=True) if target])

# %% [markdown]
# ## A run is its configuration
#
# We take the recipe of `make demo` and change what differs. Every field is checked; an unknown
# one is an error.

# %%
config = zj.load_config("demo_sft")
config = dataclasses.replace(
    config,
    name="notebook_sft",
    data=dataclasses.replace(
        config.data, data_dir=str(root / "data"), tokenizer=str(root / "tokenizer")
    ),
    train=dataclasses.replace(config.train, max_steps=120, eval_every=20, log_every=5),
)
model = config.model
print(f"{zj.count_params(model):,} parameters in {model.num_hidden_layers} layers")
print(f"{config.train.batch_size} rows of {config.data.seq_len} tokens a step, {config.optim}")

# %% [markdown]
# ## Before
#
# The same random parameters with which the run will begin. The questions are held out: no
# training dialogue asks them.

# %%
questions = corpus.heldout_questions(seed=0)
asked = [next(q for q in questions if q["kind"] == kind) for kind in ("fact", "sum", "reverse")]
base = zj.init_params(model, jax.random.key(config.seed))


def ask(params):
    prompts = [question["messages"] for question in asked]
    return zj.generate(model, params, tok, prompts, max_new_tokens=32)


before = ask(base)
for question, reply in zip(asked, before, strict=True):
    print(f"{question['messages'][-1]['content']}\n    {reply!r}")

# %% [markdown]
# ## The run
#
# `fit` packs the set first (once; later runs find it), trains, evaluates, saves. A run that was
# stopped goes on from its last checkpoint when the cell is started again.

# %%
workdir = root / "run"
state = zj.fit(config, workdir)
print("step", int(state.step), sorted(path.name for path in workdir.iterdir()))
assert int(state.step) == 120

# %% [markdown]
# ## The curve
#
# `metrics.jsonl` has a line for every five steps and every evaluation. A uniform guess over 768
# tokens costs ln 768 = 6.65 nats. The held-out loss is over the whole held-out set, exact.

# %%
metrics = read_metrics(workdir / "metrics.jsonl")
curve = {
    split: np.array([(m["step"], m[name]) for m in metrics if m["split"] == split])
    for split, name in (("train", "loss"), ("eval", "eval_loss"))
}
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.2, 3.0), layout="constrained", width_ratios=(3, 2)
)
left.axhline(np.log(768), color=GREY, ls=":", lw=1)
left.text(120, np.log(768) - 0.08, "uniform guess", ha="right", va="top", color=GREY)
left.plot(*curve["train"].T, color=BLUE, label="training, mean of 5 steps")
left.plot(*curve["eval"].T, "o--", color=ORANGE, ms=4, label="held out")
left.set(xlabel="step", ylabel="nats a token", ylim=(0, 7.2), title="loss")
left.legend(frameon=False)
rates = np.array([(m["step"], m["learning_rate"]) for m in metrics if m["split"] == "train"])
right.plot(*rates.T, color=GREEN)
right.set(xlabel="step", title="learning rate", ylim=(0, None))
plt.show()
first, last = curve["eval"][0, 1], curve["eval"][-1, 1]
print(f"held-out loss {first:.2f} -> {last:.2f} nats a token")
assert last < 0.35 * first

# %% [markdown]
# ## After
#
# `load_model` takes a workdir, a checkpoint, a Hugging Face folder or a GGUF file. After 120
# steps the model has the form: it restates the question, answers, ends its turn. What it says is
# mostly still wrong; `make demo` trains about seven times as long, then on preferences, and
# counts exact answers.

# %%
trained = zj.load_model(workdir)
after = ask(trained.params)
for question, old, new in zip(asked, before, after, strict=True):
    print(f"you:    {question['messages'][-1]['content']}")
    print(f"before: {old[:60]!r}\nafter:  {new}\nexact:  {question['answers'][0]}\n")

# %% [markdown]
# What was loaded is what was trained, to the bit; and a reply now ends where it should.

# %%
for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(trained.params), strict=True):
    np.testing.assert_array_equal(a, b)
assert max(map(len, after)) < max(map(len, before))

# %% [markdown]
# ## How sure it is, token by token
#
# The log-prob of every token of one held-out dialogue, before and after. Targets are what the
# assistant says.

# %%
ids, targets = zj.render_chat(tok, test[0]["messages"][:2])
tokens, everything = np.array([ids]), np.ones((1, len(ids)), bool)
said = {
    name: np.asarray(zj.token_logps(zj.forward(model, params, tokens), tokens, everything))[0]
    for name, params in (("before", base), ("after", trained.params))
}
shown = [i for i, target in enumerate(targets) if target][:26]
figure, here = plt.subplots(figsize=(9.2, 2.9), layout="constrained")
here.bar(np.arange(len(shown)) - 0.2, -said["before"][shown], 0.4, color=GREY, label="before")
here.bar(np.arange(len(shown)) + 0.2, -said["after"][shown], 0.4, color=BLUE, label="after")
labels = [tok.decode([ids[i]], continuation=True) or "</s>" for i in shown]
here.set_xticks(range(len(shown)), labels, rotation=60)
here.set(ylabel="-log p, nats")
here.legend(frameon=False)
plt.show()
assert said["after"][shown].mean() > said["before"][shown].mean()

# %% [markdown]
# ## What a run leaves
#
# The checkpoint carries digests and says what it was made from: data, tokenizer, template,
# config, and the models before it.

# %%
print(*trained.lineage["lineage"], sep="\n")
print("begun with parameters of digest", trained.lineage["init_digest"][:16])

# %% [markdown]
# **Where this is in the code**: `training/setup.py` (what a run needs), `training/loop.py` (the
# only loop), `training/steps.py` (one pure step), `data/packing/packed.py`,
# `weights/checkpoint.py`. From the command line: `python -m zephyr_jax train --config=demo_sft`.
# Next: preferences.
