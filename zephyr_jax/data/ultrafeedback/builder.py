"""The TFDS builder of UltraFeedback. Importing this module imports TFDS, and no TensorFlow."""

from __future__ import annotations

import tensorflow_datasets as tfds

from zephyr_jax.data.prepare.builders import PAIR, PreparedSet
from zephyr_jax.data.raw.schema import Schema
from zephyr_jax.data.raw.ultrafeedback import NAME, schemas


class UltraFeedback(PreparedSet):
    """Pairs for preference training: prompt, prompt_id, chosen, rejected, two scores, source."""

    name = NAME
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS declares it so)
        tfds.core.BuilderConfig(name="raw", description="openbmb/UltraFeedback, made into pairs."),
        tfds.core.BuilderConfig(name="binarized", description="Published pairs, checked."),
    ]

    def schemas(self) -> dict[str, Schema]:
        """The schema of each configuration, with the default rules."""
        return schemas()

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(PAIR)
        return self.dataset_info_from_configs(
            features=features, homepage="https://github.com/OpenBMB/UltraFeedback"
        )
