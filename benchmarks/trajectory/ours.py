"""Our side: 50 steps of SFT and 50 of DPO by `fit`, packed, prompts shared, reference stored."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import curves
import jax
import numpy as np
import sets

import zephyr_jax as zj
from zephyr_jax.config import run as parts
from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.data.packing.batches import make_plan, read_batches
from zephyr_jax.evaluation.metrics_file import read_metrics
from zephyr_jax.training.loop import fit
from zephyr_jax.training.setup import pack
from zephyr_jax.types import Params

DIALOGUES, PAIRS = 360, 210
MODEL = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=264, initializer_range=0.08)


class Dialogue(NamedTuple):
    """Token ids, and which of them are targets."""

    ids: list[int]
    targets: list[bool]


class Pair(NamedTuple):
    """Token ids of a prompt and of its two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def config_of(stage: str, root: Path) -> parts.RunConfig:
    """The run of a stage, "sft" or "dpo", on the sets in `root`."""
    sft = stage == "sft"
    dpo = DpoConfig(beta=0.1, reference="precomputed", max_length=200, max_prompt_length=120)
    split = "sft" if sft else "prefs"
    return parts.RunConfig(
        name=f"trajectory_{stage}",
        seed=0,
        init="" if sft else str(root / "sft"),
        model=MODEL,
        chat=parts.ChatConfig(
            bos=True,
            append_eos=False,
            empty_system=False,
            parse_special=False,
            loss_on="assistant",
            score_header=False,
        ),
        data=parts.DataConfig(
            data_dir=str(root / "data"),
            dataset="messages/own" if sft else "preferences/own",
            splits=(f"train_{split}", f"test_{split}"),
            tokenizer=str(root / "tokenizer.model"),
            seq_len=256,
            packing="best_fit",
        ),
        optim=parts.OptimConfig(
            name="adamw",
            peak_lr=4e-3 if sft else 5e-4,
            schedule="cosine" if sft else "linear",
            warmup_ratio=0.07,  # of 50 steps 3.5: one more than a rounding down would give
            warmup_from_zero=True,
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.1 if sft else 0.01,
            max_grad_norm=1.0,
        ),
        train=parts.TrainConfig(
            epochs=2,
            max_steps=curves.STEPS,
            batch_size=4 if sft else 8,
            micro_batches=2,
            eval_every=0,
            checkpoint_every=0,
            keep_checkpoints=1,
            log_every=1,
            remat="none",
            reduce_dtype="float32",
            attention="auto",
        ),
        mesh=parts.MeshConfig(1, 1, 1),
        dpo=None if sft else dpo,
    )


def on_one_device() -> contextlib.AbstractContextManager:
    """A mesh of the first device, where there may be several."""
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    names = ("data", "fsdp", "tensor")
    return jax.set_mesh(jax.sharding.Mesh(devices, names, axis_types=explicit))


def train(root: Path, stages: tuple[str, ...] = ("sft", "dpo")) -> curves.Curves:
    """Prepares the sets in an empty folder, trains there, and returns the logged curves.

    The second stage begins where the first one ended.
    """
    sets.make(root, DIALOGUES, PAIRS)
    found: curves.Curves = {}
    with on_one_device():
        for stage in stages:
            fit(config_of(stage, root), root / stage)
            rows = [
                r for r in read_metrics(root / stage / "metrics.jsonl") if r["split"] == "train"
            ]
            assert [row["step"] for row in rows] == list(range(1, curves.STEPS + 1))
            found[stage] = {name: [row[name] for row in rows] for name in curves.NAMES[stage]}
    return found


def initial(stage: str, root: Path) -> Params:
    """The parameters that a stage began with."""
    config = config_of(stage, root)
    if not config.init:
        return zj.init_params(config.model, jax.random.key(config.seed))
    with on_one_device():
        return zj.load_model(config.init, config.data.tokenizer).params


def batches(stage: str, root: Path) -> list[list[Dialogue]] | list[list[Pair]]:
    """The documents of every step, taken apart again from the rows that the run was fed."""
    config = config_of(stage, root)
    packed, part = pack(config), config.train
    plan = make_plan(packed, part.batch_size, part.epochs, part.max_steps)
    apart = _dialogue if stage == "sft" else _pair
    found = []
    for batch in read_batches(packed, plan, "train", 0, plan.train_steps, config.seed):
        documents = []
        for row in zip(*batch.rows, strict=True):
            tokens, segments, _, branches, mask = (np.asarray(x) for x in row)
            for number in range(1, segments.max() + 1):
                here = segments == number
                documents.append(apart(tokens[here], branches[here], mask[here]))
        found.append(documents)
    return found


def _dialogue(tokens: np.ndarray, _: np.ndarray, mask: np.ndarray) -> Dialogue:
    return Dialogue(tokens.tolist(), mask.tolist())


def _pair(tokens: np.ndarray, branches: np.ndarray, _: np.ndarray) -> Pair:
    """Each branch begins with a copy of the prompt's last token."""
    prompt, chosen, rejected = (tokens[branches == b].tolist() for b in (0, 1, 2))
    assert chosen[0] == rejected[0]
    return Pair([*prompt, chosen[0]], chosen[1:], rejected[1:])
