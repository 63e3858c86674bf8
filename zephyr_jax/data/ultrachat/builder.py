"""The TFDS builder of UltraChat. Importing this module imports TFDS, and no TensorFlow."""

from __future__ import annotations

import tensorflow_datasets as tfds

from zephyr_jax.data.prepare.builders import DIALOGUE, PreparedSet
from zephyr_jax.data.raw.schema import Schema
from zephyr_jax.data.raw.ultrachat import NAME, schemas


class UltraChat(PreparedSet):
    """Dialogues for supervised fine-tuning: prompt, prompt_id, messages."""

    name = NAME
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS declares it so)
        tfds.core.BuilderConfig(name="raw", description="stingning/ultrachat, cleaned here."),
        tfds.core.BuilderConfig(name="200k", description="HuggingFaceH4/ultrachat_200k as it is."),
    ]

    def schemas(self) -> dict[str, Schema]:
        """The schema of each configuration, with the default rules."""
        return schemas()

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(DIALOGUE)
        return self.dataset_info_from_configs(
            features=features, homepage="https://github.com/thunlp/UltraChat"
        )
