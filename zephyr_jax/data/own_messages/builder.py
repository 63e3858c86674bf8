"""The TFDS builder of the user's own dialogues. Importing this imports TFDS, no TensorFlow."""

from __future__ import annotations

import tensorflow_datasets as tfds

from zephyr_jax.data.prepare.builders import DIALOGUE, PreparedSet
from zephyr_jax.data.raw.own_dialogues import NAME, schemas
from zephyr_jax.data.raw.schema import Schema


class Messages(PreparedSet):
    """Anybody's dialogues, in the columns of ultrachat_200k."""

    name = NAME
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS declares it so)
        tfds.core.BuilderConfig(name="own", description="As they were given."),
    ]

    def schemas(self) -> dict[str, Schema]:
        """The schema of each configuration, with the default rules."""
        return schemas()

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(DIALOGUE)
        return self.dataset_info_from_configs(features=features)
