"""The TFDS builder of the user's own preferences. Importing this imports TFDS, no TensorFlow."""

from __future__ import annotations

import tensorflow_datasets as tfds

from zephyr_jax.data.prepare.builders import PAIR, PreparedSet
from zephyr_jax.data.raw.own_pairs import NAME, schemas
from zephyr_jax.data.raw.schema import Schema


class Preferences(PreparedSet):
    """Anybody's pairs, in the columns of ultrafeedback_binarized."""

    name = NAME
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS declares it so)
        tfds.core.BuilderConfig(name="own", description="As they were given."),
    ]

    def schemas(self) -> dict[str, Schema]:
        """The schema of each configuration, with the default rules."""
        return schemas()

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(PAIR)
        return self.dataset_info_from_configs(features=features)
