"""Everything that decides what a prepared set holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from zephyr_jax.data.raw.filters import Filters, load_contaminants
from zephyr_jax.data.raw.near_duplicates import METHOD
from zephyr_jax.data.raw.schema import Schema
from zephyr_jax.data.raw.sources import Sources

# Of what is written. Raise it when the same input comes out different.
VERSION = "1.0.0"
DUPLICATES = ("keep", "exact", "near")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which records of a set are used, and for what; by prompt, whatever the order of the rows.

    `seed` decides the lots. `holdout` is the share of the prompts kept for evaluation where no
    published split says otherwise, `sample` the share of all prompts that is used. `rows` gives
    the sizes of the two splits instead of both shares. `duplicates` drops rows whose prompt is
    that of an earlier row ("exact"), or whose prompt is nearly that of one ("near", an estimated
    Jaccard similarity of at least `near_threshold`). A prompt in both published splits is an
    error, unless `drop_straddling` takes it out of the training split.
    """

    seed: int = 0
    holdout: float = 0.1
    sample: float = 1.0
    rows: tuple[int, int] | None = None
    duplicates: str = "keep"
    near_threshold: float = 0.8
    drop_straddling: bool = False

    def __post_init__(self):
        for name, value, ok in (
            ("holdout", self.holdout, 0.0 <= self.holdout < 1.0),
            ("sample", self.sample, 0.0 < self.sample <= 1.0),
            ("near_threshold", self.near_threshold, 0.0 < self.near_threshold <= 1.0),
        ):
            if not ok:
                raise ValueError(f"{name}={value} is no share: give a number between 0 and 1")
        if self.rows is not None and (self.rows[0] <= 0 or self.rows[1] < 0):
            raise ValueError(f"rows={self.rows}: give TRAINING,HELD_OUT, such as 207865,23110")
        if self.rows is not None and self.sample < 1.0:
            raise ValueError(f"sample={self.sample} beside rows={self.rows}: give one of them")
        if self.duplicates not in DUPLICATES:
            raise ValueError(
                f"duplicates={self.duplicates!r} is unknown: choose one of {', '.join(DUPLICATES)}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read, by which rules. More than `max_bad_fraction` of unfit rows is an error."""

    dataset: str
    config_name: str
    schema: Schema
    sources: Sources
    selection: Selection = dataclasses.field(default_factory=Selection)
    filters: Filters = dataclasses.field(default_factory=Filters)
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(
                f"max_bad_fraction={self.max_bad_fraction} is no share: give a number between 0 "
                f"and 1"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the content, as JSON holds it: equal identities give equal sets."""
        filters = dataclasses.asdict(self.filters)
        filters["decontaminate"] = self.contaminants.identity()
        said = {
            "dataset": self.dataset,
            "config_name": self.config_name,
            "version": VERSION,
            "selection": dataclasses.asdict(self.selection),
            "filters": filters,
            "rules": dict(self.schema.rules),
            "sources": {source.name: source.sha256 for source in self.sources.files},
        }
        if self.selection.duplicates == "near":
            said["near_duplicates"] = METHOD
        return json.loads(json.dumps(said))

    @property
    def digest(self) -> str:
        """The identity in 16 hex digits."""
        said = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def contaminants(self) -> Any:
        """The prompts of the benchmarks that the filters name; read once in each process."""
        return load_contaminants(self.filters.decontaminate, self.filters.ngram)
