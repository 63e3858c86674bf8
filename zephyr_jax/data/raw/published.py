"""The published sets that the data station knows: which files to take and how many rows they hold.

Numbers are those of the revision that stands beside them. Where that is "main" the set may have
grown or shrunk since they were written down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class PublishedSet:
    """A set on the Hugging Face hub and what the data station makes of it.

    `files` are patterns of the paths to take, relative to the set. `rows` counts the rows of each
    split at `revision`, `other_rows` at other revisions; a split of unknown size is left out.
    """

    name: str
    aliases: tuple[str, ...]
    dataset: str
    config_name: str
    files: tuple[str, ...]
    rows: Mapping[str, int]
    revision: str
    license: str
    other_rows: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)


# What the hub's automatic conversion of raw UltraChat to parquet stopped at.
PARTIAL_ULTRACHAT = 773_913
# The revision of HuggingFaceH4/ultrafeedback_binarized that the Zephyr paper trained on.
PAPER_REVISION = "292c16329d921287c4166934cac1a6ad1e13a6c5"
_PREFS = ("data/train_prefs-*.parquet", "data/test_prefs-*.parquet")

PUBLISHED = (
    PublishedSet(
        name="stingning/ultrachat",
        aliases=("openbmb/UltraChat",),
        dataset="ultrachat",
        config_name="raw",
        files=tuple(f"train_{number}.jsonl" for number in range(10)),
        rows={"train": 1_468_348},
        revision="f220fe796ce3ed62fbe1681b45ce6cbc9c6cabe0",
        license="MIT",
    ),
    PublishedSet(
        name="HuggingFaceH4/ultrachat_200k",
        aliases=(),
        dataset="ultrachat",
        config_name="200k",
        files=("data/train_sft-*.parquet", "data/test_sft-*.parquet"),
        rows={"train_sft": 207_865, "test_sft": 23_110},
        revision="main",
        license="MIT",
    ),
    PublishedSet(
        name="openbmb/UltraFeedback",
        aliases=(),
        dataset="ultrafeedback",
        config_name="raw",
        files=tuple(
            f"{source}.jsonl"
            for source in (
                "evol_instruct",
                "false_qa",
                "flan",
                "sharegpt",
                "truthful_qa",
                "ultrachat",
            )
        ),
        rows={"train": 63_967},
        revision="main",
        license="MIT",
    ),
    PublishedSet(
        name="HuggingFaceH4/ultrafeedback_binarized",
        aliases=(),
        dataset="ultrafeedback",
        config_name="binarized",
        files=_PREFS,
        rows={"train_prefs": 61_135, "test_prefs": 2_000},
        revision="main",
        license="MIT",
        other_rows={PAPER_REVISION: {"train_prefs": 61_966, "test_prefs": 2_000}},
    ),
    PublishedSet(
        name="trl-lib/ultrafeedback_binarized",
        aliases=(),
        dataset="ultrafeedback",
        config_name="binarized",
        files=("data/train-*.parquet", "data/test-*.parquet"),
        rows={"train": 62_135, "test": 1_000},
        revision="main",
        license="not stated; made of MIT data",
    ),
    PublishedSet(
        name="argilla/ultrafeedback-binarized-preferences",
        aliases=(),
        dataset="ultrafeedback",
        config_name="binarized",
        files=("data/train-*.parquet",),
        rows={"train": 63_619},
        revision="main",
        license="MIT",
    ),
    PublishedSet(
        name="argilla/ultrafeedback-binarized-preferences-cleaned",
        aliases=(),
        dataset="ultrafeedback",
        config_name="binarized",
        files=("data/train-*.parquet",),
        rows={"train": 60_917},
        revision="main",
        license="MIT",
    ),
    PublishedSet(
        name="allenai/ultrafeedback_binarized_cleaned",
        aliases=(),
        dataset="ultrafeedback",
        config_name="binarized",
        files=_PREFS,
        rows={"train_prefs": 60_829},
        revision="main",
        license="MIT",
    ),
)


def published(hub_id: str) -> PublishedSet | None:
    """The set that goes by a name on the hub, upper and lower case alike; None for others.

    >>> published("openbmb/ultrachat").files[-1]
    'train_9.jsonl'
    >>> published("somebody/else") is None
    True
    """
    wanted = hub_id.lower()
    known = (entry for entry in PUBLISHED if wanted in map(str.lower, (entry.name, *entry.aliases)))
    return next(known, None)


def check_rows(entry: PublishedSet, revision: str, counts: Mapping[str, int]) -> str | None:
    """What is odd about the number of rows read of a published set, in one line, or None.

    Nothing is odd about a revision or a split whose number is not known, but for the 773,913 rows
    of raw UltraChat that the hub hands out as converted parquet: half of the set.

    Args:
        entry: the set.
        revision: what was read, a commit or a branch.
        counts: the rows read of each split, those that did not fit included.

    >>> ultrachat = published("stingning/ultrachat")
    >>> check_rows(ultrachat, ultrachat.revision, {"train": 1_468_348}) is None
    True
    >>> print(check_rows(ultrachat, "main", {"train": 773_913}))
    stingning/ultrachat: 773,913 rows are the hub's partial conversion to parquet, not the 1,468,348 of the set: take train_0.jsonl to train_9.jsonl
    """  # noqa: E501 (the message is one line)
    if (entry.dataset, entry.config_name) == ("ultrachat", "raw") and sum(
        counts.values()
    ) == PARTIAL_ULTRACHAT:
        return (
            f"{entry.name}: {PARTIAL_ULTRACHAT:,} rows are the hub's partial conversion to "
            f"parquet, not the {entry.rows['train']:,} of the set: take {entry.files[0]} to "
            f"{entry.files[-1]}"
        )
    known = entry.rows if revision == entry.revision else entry.other_rows.get(revision, {})
    differing = [
        f"{counts[split]:,} rows in {split} instead of {rows:,}"
        for split, rows in known.items()
        if counts.get(split, rows) != rows
    ]
    if not differing:
        return None
    why = (
        "download it again"
        if revision != "main"
        else "the set has changed since, or the download is not whole"
    )
    return f"{entry.name} at {revision}: {', '.join(differing)}: {why}"
