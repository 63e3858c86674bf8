"""DPO on a few of your own pairs, from the model of own_small_sft: 100 steps or more."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import demo_dpo as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "own_small_dpo"
    config.init = "runs/own_small_sft"
    config.data.dataset = "preferences/own"
    config.data.seq_len = 512
    config.dpo.max_length = 256
    config.dpo.max_prompt_length = 128
    config.optim.peak_lr = 2e-5
    config.train.epochs = 0
    config.train.batch_size = 4
    config.train.eval_every = 20
    return config
