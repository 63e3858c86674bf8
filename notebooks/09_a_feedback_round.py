# %% [markdown]
# # 9. A feedback round
#
# The second half of Zephyr's recipe on a model's own samples: it answers prompts several times, a
# judge rates the answers, the best and the worst become a pair, and DPO learns from the pairs. The
# model is the demo's, smaller; the judge is a function, so that everything here takes seconds and
# its taste is known. With another judge the same calls ask a model behind an endpoint.

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
import json
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import zephyr_jax as zj
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.demo import corpus
from zephyr_jax.evaluation.endpoints import Spending
from zephyr_jax.feedback.collect import collect
from zephyr_jax.feedback.config import (
    ContestantConfig,
    FeedbackConfig,
    JudgeConfig,
    PromptsConfig,
)
from zephyr_jax.feedback.quality import judge_quality

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8a8a"

# %% [markdown]
# ## The policy
#
# A model of two layers that has seen the little world's dialogues for a moment: it writes
# sentences of the right form, and mostly about the wrong things.

# %%
root = Path(tempfile.mkdtemp())
corpus.write_ultrachat(root / "raw", 1000, seed=0)
lines = corpus.tokenizer_lines(root / "raw")
corpus.train_tokenizer(lines, root / "tokenizer" / "tokenizer.model", 512)
prepare("ultrachat", root / "raw", root / "data", "raw")
small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
small |= {"head_dim": 16}


def load(recipe, **fields):
    fields |= {f"model.{name}": value for name, value in small.items()}
    fields |= {"train.checkpoint_every": 0, "train.eval_every": 0}
    return zj.load_config(recipe, [f"--config.{name}={value}" for name, value in fields.items()])


sft = {"data.data_dir": root / "data", "data.tokenizer": root / "tokenizer"}
sft |= {"data.splits": ("train_sft", "")}
zj.fit(load("demo_sft", **sft, **{"train.max_steps": 120}), root / "sft", samples=0)

# %% [markdown]
# ## The judge
#
# A judge with a fault: of two answers it likes the shorter one, whatever they say. Ten points, and
# one less for each word.


# %%
def rate(_, answer):
    return {"overall_score": float(max(1, 10 - len(answer.split())))}


print(rate("What does the dorn eat?", "The dorn wears blue. The dorn eats rice."))

# %% [markdown]
# ## The round
#
# 192 questions; four samples of one model with four seeds are four contestants. The folder has the
# rows in UltraFeedback's schema, an account, and every answer by its key: a second call would ask
# nothing.

# %%
questions = list(corpus.feedback_tasks(256, 0, ()))
asked, unseen = questions[:192], questions[192:]
prompts = root / "prompts.jsonl"
prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
sample = {"model": str(root / "sft"), "temperature": 1.0, "top_p": 1.0, "max_tokens": 24}
config = FeedbackConfig(
    name="notebook_round",
    seed=0,
    prompts=PromptsConfig(source=str(prompts)),
    contestants={f"sample_{seed}": ContestantConfig(**sample, seed=seed) for seed in range(4)},
    judge=JudgeConfig(kind="function", aspects=()),
    batch_size=96,
)
rows = collect(config, root / "round", Spending(), rate)
account = json.loads((root / "round" / "account.json").read_text())
print({name: account[name] for name in ("rows", "answers", "judgements")})
first = json.loads(rows.read_text().splitlines()[0])
print(first["instruction"])
for completion in first["completions"]:
    print(f"  {completion['overall_score']:5.2f}  {completion['response']}")

# %% [markdown]
# How the four scores of a question lie tells whether there is something to learn: where all four
# are equal there is no pair. What is measured of the judge says what will be learned besides; a
# judge without a taste for length would let the longer answer win about as often as it is better.

# %%
scores = np.sort(
    [[x["overall_score"] for x in json.loads(line)["completions"]] for line in rows.open()]
)
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
bins = np.linspace(1, 10, 19)
axes[0].hist(scores[:, 0], bins, alpha=0.6, color=ORANGE, label="worst of four")
axes[0].hist(scores[:, -1], bins, alpha=0.6, color=BLUE, label="best of four")
axes[0].set(xlabel="score", ylabel="questions")
axes[0].legend(frameon=False)
measured = judge_quality(root / "round")[0]["forms"]["overall"]
shown = [name for name in ("ties", "longer_wins") if name in measured]
for at, name in enumerate(shown):
    one = measured[name]
    axes[1].plot([one["low"], one["high"]], [at, at], color=GREY, linewidth=3)
    axes[1].plot(one["value"], at, "o", color=BLUE)
axes[1].set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown])
axes[1].set(xlim=(0, 1), ylim=(-0.6, len(shown) - 0.4), xlabel="share, 95% interval")
plt.show()
assert (scores[:, -1] > scores[:, 0]).mean() > 0.5
assert measured["longer_wins"]["high"] < 0.5  # the fault is exposed before anything is trained

# %% [markdown]
# ## Pairs and DPO
#
# The best against the worst, equal scores dropped; then the recipe of the demo.

# %%
rules = BinarizationRules(pairing="best_vs_worst", ties="drop")
prepare("ultrafeedback", rows, root / "data", "raw", rules=rules)
dpo = {"data.data_dir": root / "data", "init": root / "sft", "data.splits": ("train_prefs", "")}
dpo |= {"train.epochs": 3, "train.batch_size": 16, "optim.peak_lr": 5e-4}
zj.fit(load("demo_dpo", **dpo), root / "dpo", samples=0)

# %% [markdown]
# ## Before and after
#
# Samples for questions that the round didn't ask, judged by the same function. That the mean rises
# shows that the round works, not that the answers are better: a policy learns what its judge
# rewards, faults included. So look at the judge first.

# %%
means, chosen = {}, random.Random(0).sample(unseen, 2)
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for name, color in (("sft", GREY), ("dpo", BLUE)):
    model = zj.load_model(root / name)
    replies = zj.generate(*model[:3], unseen, max_new_tokens=24, temperature=1.0, top_p=1.0, seed=9)
    values = [rate(*both)["overall_score"] for both in zip(unseen, replies, strict=True)]
    means[name] = float(np.mean(values))
    label = f"{name.upper()}, mean {means[name]:.2f}"
    axis.hist(values, bins, alpha=0.6, color=color, label=label)
    for question in chosen:
        print(f"{name}: {question}  {replies[unseen.index(question)]}")
axis.set(xlabel="score of samples for new questions", ylabel="questions")
axis.legend(frameon=False)
plt.show()
print(means)
assert means["dpo"] > means["sft"] + 0.3

# %% [markdown]
# Again: samples of `root / "dpo"` are the next round's contestants, and `dpo.reference_model` says
# what the next policy is held to; docs/howto/rounds.md has the commands.
