"""How many examples the published sets give, for the length of a run that nobody has packed yet."""

from __future__ import annotations

from zephyr_jax.config.run import RunConfig

# docs/recipes.md: rows of 2,048 tokens, and pairs, by the published runs' own counts
_ROWS, _ROW_TOKENS = {"ultrachat/200k": 139_000}, 2048
_PAIRS = {"ultrafeedback/binarized": 61_135}


def steps_of(config: RunConfig, examples: int | None = None) -> int | None:
    """The number of steps of a run; None where the number of examples is not known.

    Args:
        config: of the run.
        examples: rows of dialogues, or pairs; without it as published, if the set is.
    """
    train = config.train
    if train.max_steps:
        return train.max_steps
    if examples is None:
        known, dataset = _PAIRS if config.dpo else _ROWS, config.data.dataset
        examples = known.get(dataset) if isinstance(dataset, str) else None
        if examples and not config.dpo:
            examples = examples * _ROW_TOKENS // config.data.seq_len
    if examples is None:
        return None
    return train.epochs * max(1, examples // train.batch_size)
