"""SFT on a few of your own dialogues, from the demo's model: 100 steps on a CPU, or more."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import demo_sft as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "own_small_sft"
    config.init = "demo_run/sft"
    config.data.dataset = "messages/own"
    config.data.tokenizer = ""
    config.data.seq_len = 256
    config.optim.peak_lr = 1e-3
    config.train.epochs = 0
    config.train.batch_size = 4
    config.train.eval_every = 20
    return config
