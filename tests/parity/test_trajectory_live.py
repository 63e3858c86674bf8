"""SFT, DPO and KTO next to TRL's own trainers, live: the same ids, batches, mismatches, 1e-4."""

import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from conftest import with_fields
from raw_rows import write
from runs import ONE, mesh_of
from test_kto import answers_of, kto_config, labeled
from trajectory_modules import curves, ours

import zephyr_jax as zj
from zephyr_jax.data.packing.batches import make_plan, read_batches
from zephyr_jax.evaluation.metrics_file import read_metrics
from zephyr_jax.training.setup import pack

pytest.importorskip("torch", reason="`make parity` installs torch")
pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.parity
STEPS = 20
WEIGHTS = {"desirable_weight": 4.0, "undesirable_weight": 1.0}  # so that the estimate rises
NAMES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")
NAMES += ("logps/chosen", "logps/rejected", "kl")
__all__ = ["labeled", "write"]


def rotated(documents):
    """A batch in the order in which TRL's rotation by one gives each prompt its other answer."""
    before = {own: k for k, (_, own, _, _) in enumerate(documents)}
    assert len(before) == len(documents)
    order = [0]
    while len(order) < len(documents):
        behind = [k for k, d in enumerate(documents) if before[d[2]] == order[-1]]
        order += behind
        assert len(behind) == 1
    assert len(set(order)) == len(order), "a prompt is twice in a batch: TRL would not turn by two"
    assert before[documents[0][2]] == order[-1]
    return [documents[k] for k in order]


@pytest.fixture(scope="module")
def both(world, labeled, tmp_path_factory):
    """Metrics of every step, ours and theirs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is first imported
    root = tmp_path_factory.mktemp("kto")
    config = kto_config(world, labeled, WEIGHTS, max_steps=STEPS, epochs=4, micro_batches=1)
    optim = {"peak_lr": 1e-3, "weight_decay": 0.01, "warmup_ratio": 0.0}
    config = with_fields(config, optim=optim, model={"initializer_range": 0.08})
    with mesh_of(ONE):
        zj.fit(config, root / "ours")
        packed = pack(config)
        plan = make_plan(packed, 8, 4, STEPS)
        steps = [
            rotated(list(answers_of(batch.rows, batch.pair_ids)))
            for batch in read_batches(packed, plan, "train", 0, STEPS, config.seed)
        ]
        params = zj.init_params(config.model, jax.random.key(config.seed))
        tok = zj.Tokenizer.from_folder(world / "tokenizer")
        zj.export_hf(config.model, params, tok, root / "hf")
    logged = [
        row for row in read_metrics(root / "ours" / "metrics.jsonl") if row["split"] == "train"
    ]
    return logged, of_trl(config, root / "hf", steps)


def of_trl(config, folder, steps):
    """What TRL's trainer logs of these steps, its mismatched answers rotated by its own rule."""
    import datasets
    import theirs as trajectory
    import torch
    import transformers
    import trl

    class Kto(trajectory._OurOrder, trl.KTOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    rows = []
    for documents in steps:
        own = [list(answer) for _, answer, _, _ in documents]
        others = [own[-1], *own[:-1]]  # as TRL's add_kl_completion_ids
        assert others == [list(other) for _, _, other, _ in documents]
        for (prompt, *_, number), answer, other in zip(documents, own, others, strict=True):
            row = {"prompt_ids": list(prompt), "completion_ids": answer}
            rows.append(row | {"KL_completion_ids": other, "label": number > 0})
    with tempfile.TemporaryDirectory() as out:
        settings = trajectory._arguments(config, len(steps)) | {"output_dir": out}
        trainer = Kto(
            model=trajectory._model(folder),
            ref_model=trajectory._model(folder),
            args=trl.KTOConfig(
                **settings,
                beta=config.dpo.beta,
                **WEIGHTS,
                per_device_train_batch_size=8,
                train_sampling_strategy="sequential",
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=trajectory._tokenizer(folder),
        )
        numbers = iter(range(len(rows)))
        trainer.steps = [[next(numbers) for _ in documents] for documents in steps]
        trainer.remove_callback(transformers.PrinterCallback)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        trainer.train()
        torch.set_num_threads(threads)
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_kto_is_theirs(both, name):
    """Within 1e-4 of a curve's largest value; `kl` is cut to 0 there, as in the loss."""
    mine, other = both
    assert len(mine) == len(other) == STEPS
    present = [k for k in range(STEPS) if name in mine[k]]
    assert present == [k for k in range(STEPS) if name in other[k]]
    one, two = (np.array([rows[k][name] for k in present]) for rows in both)
    if name == "kl":
        assert (one > 0.5).sum() > 5
        one = np.maximum(one, 0)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * np.abs(two).max(), err_msg=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is first imported
    import theirs

    root = tmp_path_factory.mktemp("trajectory")
    return ours.train(root), theirs.train(root)


@pytest.mark.parametrize("stage", curves.NAMES)
def test_every_curve_is_theirs(trained, stage):
    one, other = trained
    for gap in curves.gaps({stage: one[stage]}, other):
        assert gap.share <= curves.BOUND, gap


def test_their_loss_falls_too(trained):
    assert min(curves.falls(trained[1]).values()) >= curves.FALL
