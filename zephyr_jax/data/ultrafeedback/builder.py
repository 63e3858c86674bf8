"""The TFDS builder of UltraFeedback. Importing this module imports TFDS, and no TensorFlow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from zephyr_jax.data import staging
from zephyr_jax.data.sources import find_sources
from zephyr_jax.data.ultrafeedback.schemas import NAME, schemas


class UltraFeedback(tfds.core.ShardBasedBuilder):
    """Pairs for preference training: prompt, prompt_id, chosen, rejected, two scores, source.

    `plan` says what to read and by which rules; without one the builder reads the jsonl files of
    TFDS's `manual_dir` with the default rules.
    """

    name = NAME
    VERSION = tfds.core.Version(staging.VERSION)
    RELEASE_NOTES = {staging.VERSION: "First version."}  # noqa: RUF012 (TFDS declares it so)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS declares it so)
        tfds.core.BuilderConfig(name="raw", description="openbmb/UltraFeedback, made into pairs."),
        tfds.core.BuilderConfig(name="binarized", description="Published pairs, checked."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the jsonl files of the data set into manual_dir."

    def __init__(self, *, plan: staging.Plan | None = None, **kwargs):
        super().__init__(**kwargs)
        self._plan = plan

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="UltraFeedback as pairs of a chosen and a rejected answer.",
            homepage="https://github.com/OpenBMB/UltraFeedback",
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "prompt_id": tfds.features.Text(),
                    "chosen": tfds.features.Sequence(
                        {"role": tfds.features.Text(), "content": tfds.features.Text()}
                    ),
                    "rejected": tfds.features.Sequence(
                        {"role": tfds.features.Text(), "content": tfds.features.Text()}
                    ),
                    "score_chosen": tfds.features.Scalar(np.float32),
                    "score_rejected": tfds.features.Scalar(np.float32),
                    "source": tfds.features.Text(),
                }
            ),
        )

    def _shard_iterators_per_split(self, dl_manager) -> staging.ShardIterators:
        plan = self._plan
        if plan is None:
            config_name = str(self.builder_config_name)
            known = schemas()
            sources = find_sources(dl_manager.manual_dir, known[config_name], known)
            plan = staging.Plan(NAME, config_name, known[config_name], sources)
        return staging.stage(plan, Path(self.data_path))
