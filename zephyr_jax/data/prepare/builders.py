"""What the TFDS builders share. Importing this module imports TFDS, and no TensorFlow."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder
from tensorflow_datasets.core import splits as tfds_splits

from zephyr_jax.data.prepare import stages
from zephyr_jax.data.prepare.account import REPORT
from zephyr_jax.data.prepare.parallel import available_cores, run_tasks
from zephyr_jax.data.prepare.plan import VERSION, Plan
from zephyr_jax.data.raw.schema import Schema
from zephyr_jax.data.raw.sources import find_sources

_MESSAGES = {"role": tfds.features.Text(), "content": tfds.features.Text()}
DIALOGUE = {
    "prompt": tfds.features.Text(),
    "prompt_id": tfds.features.Text(),
    "messages": tfds.features.Sequence(_MESSAGES),
}
PAIR = {
    "prompt": tfds.features.Text(),
    "prompt_id": tfds.features.Text(),
    "chosen": tfds.features.Sequence(_MESSAGES),
    "rejected": tfds.features.Sequence(_MESSAGES),
    "score_chosen": tfds.features.Scalar(np.float32),
    "score_rejected": tfds.features.Scalar(np.float32),
    "source": tfds.features.Text(),
}


class PreparedSet(dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore
    """A set that is written by the stages of `zephyr_jax.data.prepare.stages`, in parallel.

    `plan` says what to read and by which rules; without one the builder reads the files of TFDS's
    `manual_dir` with the default rules. `work` is where unfinished work waits (default: beside
    the set), `run` does the tasks (default: a process for each core).
    """

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "First version."}  # noqa: RUF012 (TFDS's way)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the jsonl or parquet files of the set into manual_dir."

    def __init__(
        self,
        *,
        plan: Plan | None = None,
        work: Path | None = None,
        run: stages.Runner | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._plan, self._work = plan, work
        self._run = run or functools.partial(run_tasks, workers=available_cores())

    def schemas(self) -> dict[str, Schema]:
        """The schema of each configuration, with the default rules."""
        raise NotImplementedError

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        del download_config
        plan = self._plan
        if plan is None:
            known, config_name = self.schemas(), str(self.builder_config_name)
            sources = find_sources(dl_manager.manual_dir, known[config_name], known)
            plan = Plan(self.name, config_name, known[config_name], sources)
        folder = Path(self.data_path)
        work = self._work or folder / ".work"
        made = stages.make(plan, work, self._run)
        splits = []
        for split, shards in made.shards.items():
            template = self._get_filename_template(split_name=split)
            for number, (path, _) in enumerate(shards):
                name = template.sharded_filepath(shard_index=number, num_shards=len(shards)).name
                _place(path, folder / name)
            lengths, size = [s.rows for _, s in shards], sum(s.size for _, s in shards)
            splits.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
        _place(made.report, folder / REPORT)
        self.info.set_splits(tfds_splits.SplitDict(splits))
        if self._work is None:
            shutil.rmtree(work)


def _place(source: Path, target: Path) -> None:
    """One file under a second name; the first one stays, for a run that is killed right now."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
