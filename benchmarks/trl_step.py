"""A DPO step of TRL's trainer on ids, for benchmarks; needs torch, transformers and TRL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from trl import DPOConfig, DPOTrainer

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_COLUMNS = (*_IDS, "ref_chosen_logps", "ref_rejected_logps")


class _Tokenized(DPOTrainer):
    """The trainer on columns of ids, which its own preparation would not take."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def word_tokenizer(vocab: int) -> Any:
    """A tokenizer of `vocab` words, which the trainer asks for and ids do not need."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t2", bos_token="t1"
    )


def dpo_step(
    model: Any, tokenizer: Any, pairs: Sequence[Sequence[list[int]]], **arguments: Any
) -> Callable[[slice], float]:
    """The step over a part of the pairs (prompt, chosen, rejected), which returns its loss.

    `arguments` are those of TRL's DPOConfig.
    """
    data = Dataset.from_list([dict(zip(_IDS, pair, strict=True)) for pair in pairs])
    config = DPOConfig(max_length=None, report_to=[], **arguments)
    trainer = _Tokenized(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what `train` would set
    stored: Any = trainer.train_dataset
    rows = [{name: row[name] for name in _COLUMNS if name in row} for row in stored]

    def run(part: slice) -> float:
        loss = trainer.training_step(model, trainer.data_collator(rows[part]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return run
