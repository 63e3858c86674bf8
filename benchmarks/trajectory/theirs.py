"""Their side: TRL's SFTTrainer and DPOTrainer on transformers' MistralForCausalLM, float32, CPU.

Padded batches through their own collators, no packing, every pair as two whole sequences, the
reference model run live at every step; their loss, clipping, AdamW and schedules. Of theirs two
things are replaced: the order of the batches, which is ours, and the preparation of a preference
set, which takes texts and here is given ids. The curves are what the trainers log, read from
`log_history`; transformers 5 rounds nothing there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import curves
import datasets
import ours
import torch
import transformers
import trl

import zephyr_jax as zj
from zephyr_jax.config.run import RunConfig


class _OurOrder:
    """A trainer whose batches are given, as lists of positions in the data set."""

    steps: list[list[int]]

    def get_train_dataloader(self: Any) -> Any:
        """Their collator on the documents of each step."""
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=self.steps, collate_fn=self.data_collator
            )
        )


class _Sft(_OurOrder, trl.SFTTrainer):
    pass


class _Dpo(_OurOrder, trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def train(root: Path) -> curves.Curves:
    """The curves of both stages, after `ours.train` in the same folder.

    Each stage begins with the parameters that ours began with, exported, and is fed the same
    documents.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are slower in several
    try:
        return {stage: _stage(stage, root) for stage in curves.NAMES}
    finally:
        torch.set_num_threads(threads)


def _stage(stage: str, root: Path) -> dict[str, list[float]]:
    config, folder = ours.config_of(stage, root), root / f"{stage}_hf"
    tok = zj.Tokenizer.from_file(config.data.tokenizer)
    zj.export_hf(config.model, ours.initial(stage, root), tok, folder)
    batches = ours.batches(stage, root)
    make = _sft_trainer if stage == "sft" else _dpo_trainer
    with tempfile.TemporaryDirectory() as out:
        settings = _arguments(config, len(batches)) | {"output_dir": out}
        trainer = make(
            config, folder, settings, [document for batch in batches for document in batch]
        )
        numbers = iter(range(len(trainer.train_dataset)))
        trainer.steps = [[next(numbers) for _ in batch] for batch in batches]
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, len(batches) + 1))
    return {name: [float(row[name]) for row in logged] for name in curves.NAMES[stage]}


def _arguments(config: RunConfig, steps: int) -> dict[str, Any]:
    """The fields of TrainingArguments; both libraries have the schedules by the same names."""
    optim = config.optim
    assert optim.name == "adamw"
    return {
        "learning_rate": optim.peak_lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup_ratio,  # below 1 it is a share of all steps
        "optim": "adamw_torch",
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "max_steps": steps,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tokenizer(folder: Path) -> Any:
    """Only its padding token is used."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    return tokenizer


def _sft_trainer(_: RunConfig, folder: Path, settings: dict[str, Any], documents: list[Any]) -> Any:
    rows = [{"input_ids": ids, "completion_mask": list(map(int, mask))} for ids, mask in documents]
    return _Sft(
        model=_model(folder),
        args=trl.SFTConfig(**settings, packing=False, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(folder),
    )


def _dpo_trainer(
    config: RunConfig, folder: Path, settings: dict[str, Any], documents: list[Any]
) -> Any:
    assert config.dpo is not None
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, document, strict=True)) for document in documents]
    return _Dpo(
        model=_model(folder),
        ref_model=_model(folder),
        args=trl.DPOConfig(**settings, beta=config.dpo.beta, precompute_ref_log_probs=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(folder),
    )
