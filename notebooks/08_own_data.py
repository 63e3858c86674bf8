# %% [markdown]
# # 8. My data, from JSONL to chat
#
# A file of dialogues becomes a model that answers them, and a file of pairs changes how it
# answers. The rows are made up here; put your own files in their place. The model is small and
# begins with random weights, so that all of it takes about a minute on a CPU. With `init` set to
# a Hugging Face folder the same calls go on from a real model.

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
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import zephyr_jax as zj
from zephyr_jax.data.prepare.prepare import prepare, read_split, set_folder
from zephyr_jax.demo.corpus import train_tokenizer
from zephyr_jax.evaluation.metrics_file import read_metrics

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8a8a"
root = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Dialogues
#
# A museum's guide: twelve things, each in a room, asked for in six ways. Two answers in five are
# sentences, the others are curt. One JSON object a line; the shapes that `prepare` reads
# (messages, ShareGPT, Alpaca, prompt and completion) are in `docs/data.md`.

# %%
ROOMS = {
    "clock": "two", "map": "three", "lute": "one", "ship": "four", "crown": "two", "globe": "five",
    "mask": "one", "sword": "four", "loom": "three", "coin": "five", "bell": "one", "lens": "two",
}  # fmt: skip
QUESTIONS = (
    "Where is the {}?", "In which room is the {}?", "I am looking for the {}.",
    "Please show me the {}.", "Which room has the {}?", "Can I see the {}?",
)  # fmt: skip


def answers(thing):
    return f"You find the {thing} in room {ROOMS[thing]}.", f"Room {ROOMS[thing]}."


def dialogue(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


asked = [(form.format(thing), thing) for thing in ROOMS for form in QUESTIONS]
with open(root / "dialogues.jsonl", "w") as file:
    for number, (question, thing) in enumerate(asked):
        sentence, curt = answers(thing)
        messages = dialogue(question, sentence if number % 5 in (0, 2) else curt)
        print(json.dumps({"messages": messages}), file=file)
print((root / "dialogues.jsonl").read_text().splitlines()[0])

# %% [markdown]
# ## Prepared
#
# One prompt in ten is held out, selected by a hash of the prompt, so that the split stays when
# rows are added. `report.json` counts what was left out, and why.

# %%
folder = prepare("messages", root / "dialogues.jsonl", root / "data", "museum")
report = json.loads((folder / "report.json").read_text())
print(report["rows"])
train, test = (read_split(folder, split) for split in ("train_sft", "test_sft"))
assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in test)

# %% [markdown]
# ## A tokenizer, a model, a run
#
# Words of your own deserve a vocabulary of their own only if the model begins at random, as here;
# a model that is there already brings its tokenizer. The run is the recipe of `make demo` with a
# smaller model and the new set. The dialogues fill fifteen rows of
# 128 tokens, two batches: a small set needs many epochs to have a few hundred steps.

# %%
lines = [text for question, thing in asked for text in (question, *answers(thing))]
roles = ["<|user|>", "<|assistant|>", "<|system|>"]
train_tokenizer(lines + roles * 20, root / "tokenizer" / "tokenizer.model", 384)
recipe = zj.load_config("demo_sft")
config = dataclasses.replace(
    recipe,
    name="museum_sft",
    model=dataclasses.replace(
        recipe.model, vocab_size=384, hidden_size=96, intermediate_size=256, num_hidden_layers=2
    ),
    data=dataclasses.replace(
        recipe.data,
        data_dir=str(root / "data"),
        dataset="messages/museum",
        tokenizer=str(root / "tokenizer"),
    ),
    train=dataclasses.replace(recipe.train, epochs=100, eval_every=50, log_every=10, batch_size=8),
)
sft = zj.fit(config, root / "sft", samples=0)
metrics = read_metrics(root / "sft" / "metrics.jsonl")
losses = [row["eval_loss"] for row in metrics if row["split"] == "eval"]
print(f"{int(sft.step)} steps; held-out loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < 0.2 * losses[0]

# %% [markdown]
# ## What it answers
#
# To the questions of the held-out split, which no training dialogue asks in these words.

# %%
heldout = sorted({row["messages"][0]["content"] for row in test})
things = [next(thing for thing in ROOMS if thing in question) for question in heldout]


def replies(model):
    prompts = [[{"role": "user", "content": question}] for question in heldout]
    return zj.generate(model.cfg, model.params, model.tokenizer, prompts, max_new_tokens=24)


def count(texts):
    """How many replies are right sentences, right but curt, and wrong."""
    whole, curt = zip(*map(answers, things), strict=True)
    kinds = (
        [text.strip() == a for text, a in zip(texts, whole, strict=True)],
        [text.strip() == b for text, b in zip(texts, curt, strict=True)],
    )
    return sum(kinds[0]), sum(kinds[1]), len(texts) - sum(kinds[0]) - sum(kinds[1])


after_sft = replies(zj.load_model(root / "sft"))
for question, reply in list(zip(heldout, after_sft, strict=True))[:4]:
    print(f"you:   {question}\nmodel: {reply}")
print("sentences, curt, wrong:", count(after_sft))

# %% [markdown]
# ## Pairs
#
# Which of two answers is better is a matter of pairs: the same prompt, one answer chosen, one
# rejected. Here the sentence is chosen, and the curt answer rejected.

# %%
with open(root / "pairs.jsonl", "w") as file:
    for question, thing in asked:
        chosen, rejected = answers(thing)
        row = {"prompt": question, "chosen": chosen, "rejected": rejected}
        print(json.dumps(row), file=file)
prepare("preferences", root / "pairs.jsonl", root / "data", "museum")
pairs = read_split(set_folder(root / "data", "preferences/museum"), "train_prefs")
print(len(pairs), "pairs; the first is rejected for:", pairs[0]["rejected"][-1]["content"])

# %% [markdown]
# ## DPO
#
# The same `fit`, with the model above as `init`, which brings its tokenizer. Its log-probs of the
# pairs are computed once and stored.

# %%
recipe = zj.load_config("demo_dpo")
aligned = dataclasses.replace(
    recipe,
    name="museum_dpo",
    init=str(root / "sft"),
    model=config.model,
    data=dataclasses.replace(
        recipe.data, data_dir=str(root / "data"), dataset="preferences/museum"
    ),
    optim=dataclasses.replace(recipe.optim, peak_lr=1e-4),
    train=dataclasses.replace(recipe.train, epochs=4, batch_size=8, eval_every=10, log_every=2),
)
dpo = zj.fit(aligned, root / "dpo", samples=0)
after_dpo = replies(zj.load_model(root / "dpo"))
print("before DPO: sentences, curt, wrong:", count(after_sft))
print("after DPO:  sentences, curt, wrong:", count(after_dpo))
assert count(after_dpo)[0] > count(after_sft)[0]

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.2, 2.8), layout="constrained")
for here, run, name, title in (
    (left, "sft", "loss", "SFT: loss, nats a token"),
    (middle, "dpo", "rewards/accuracies", "DPO: reward accuracy"),
):
    rows = read_metrics(root / run / "metrics.jsonl")
    points = [(row["step"], row[name]) for row in rows if row["split"] == "train"]
    here.plot(*np.array(points).T, color=BLUE, label="training")
    points = [(row["step"], row[f"eval_{name}"]) for row in rows if row["split"] == "eval"]
    here.plot(*np.array(points).T, "o--", color=ORANGE, ms=4, label="held out")
    here.set(xlabel="step", title=title, ylim=(0, None))
left.legend(frameon=False)
for shift, texts, color, label in ((-0.2, after_sft, GREY, "SFT"), (0.2, after_dpo, BLUE, "DPO")):
    right.bar(np.arange(3) + shift, count(texts), 0.4, color=color, label=label)
right.set_xticks(range(3), ("sentence", "curt", "wrong"))
right.set(title=f"replies to {len(heldout)} held-out questions")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Chat, and out
#
# A chat is a list of messages; `python -m zephyr_jax generate --model=FOLDER --chat` is the same
# in a terminal. The folder that `export_hf` writes loads in transformers, vLLM and llama.cpp's
# converter.

# %%
model = zj.load_model(root / "dpo")
chat = [{"role": "user", "content": "Can I see the crown?"}]
(reply,) = zj.generate(model.cfg, model.params, model.tokenizer, [chat], max_new_tokens=24)
print("you:  ", chat[0]["content"])
print("model:", reply)
zj.export_hf(model.cfg, model.params, model.tokenizer, root / "museum", dtype="float32")
print(sorted(path.name for path in (root / "museum").iterdir()))

# %% [markdown]
# **Where this is in the code**: `cli/prepare_data.py`, `cli/train.py` and `cli/generate.py` do the
# same from the command line; `data/raw/dialogues.py` has the shapes that rows may have. Every
# run also left a `report.html` in its folder.
