"""Rules that drop a cleaned record of any set: length, benchmark prompts, near-equal prompts.

A record is *contaminated* if one of its messages, of whatever role, shares 13 consecutive words
(or `ngram`) with a prompt of a benchmark (GPT-3, Brown et al. 2020, C). A shorter prompt counts
where all of its words occur in a row; one of fewer than four words ("Hi") only as a whole turn of
the user, or it would drop half of the corpus.

*Near duplicates*: two prompts are similar by the share of runs of five words that both have, which
their MinHash signatures estimate (Broder 1997; a standard error of at most 1/16 for 64 entries).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue]

from zephyr_jax.data.raw.readers import AS_LINES, SUFFIXES, numbered_rows, read_text
from zephyr_jax.storage import file_info

PROMPT_KEYS = ("turns", "instruction", "prompt", "question", "text")  # the first one present counts
NGRAM = 13  # words
MIN_WORDS = 4  # of a prompt that counts inside a message
_WORD = re.compile(r"[^\W_]+")
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
HASHES = 64
SHINGLE = 5  # words
SIMILARITY = 0.8  # of two prompts, from which the later one is a near duplicate
_BANDS = 16  # of 4 hashes: two prompts of that similarity share one but for 2 pairs in 10,000
_CROWD = 2000
# Signatures of one version of rensa are the same on every machine, so reports name it.
METHOD = f"rensa {metadata.version('rensa')}, {HASHES} hashes of {SHINGLE} words"


def words(text: str) -> list[str]:
    """The runs of letters and digits, in lower case and compatibility form (NFKC).

    A script without spaces has long words: a Chinese sentence is matched as a whole only.

    >>> words("Don’t  has_close(elements, 2)!")
    ['don', 't', 'has', 'close', 'elements', '2']
    """
    if text.isascii():  # the same words, three times as fast
        return text.translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class PromptFile(NamedTuple):
    """A file of benchmark prompts, with the SHA-256 of its bytes."""

    name: str
    sha256: str
    prompts: tuple[str, ...]


Contaminants = tuple[PromptFile, ...]
Run = tuple[str, ...]  # of words


def load_contaminants(paths: Sequence[str | Path]) -> Contaminants:
    """The prompts of benchmark files, in an order that does not depend on that of the paths.

    Rows have the prompt, or several, under one of `PROMPT_KEYS`; a `.txt` has one prompt a line. A
    ValueError names a file of another kind, damaged or empty, and a row without words.
    """
    files = []
    for path in map(Path, paths):
        if not path.name.lower().removesuffix(".gz").endswith((*SUFFIXES, ".txt")):
            raise ValueError(f"{path} must be one of {', '.join(SUFFIXES)}, .txt: {AS_LINES}")
        prompts = tuple(_prompts(path))
        if not prompts:
            raise ValueError(f"{path} holds no prompt: is it the right file?")
        files.append(PromptFile(path.name, file_info(path, "sha256")["sha256"], prompts))
    return tuple(sorted(files))


def _prompts(path: Path) -> Iterator[str]:
    rows: Any = numbered_rows(path)
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        lines = enumerate(read_text(path).splitlines(), 1)
        rows = ((number, {"text": line}) for number, line in lines if line.strip())
    for number, row in rows:
        fields = row if isinstance(row, dict) else {}
        value = next((fields[key] for key in PROMPT_KEYS if key in fields), None)
        turns: list[Any] = value if isinstance(value, list) else [value]
        if not turns or not all(isinstance(turn, str) and words(turn) for turn in turns):
            raise ValueError(
                f"{path}, row {number}: expected a text with letters or digits, or a list of them, "
                f"under one of {', '.join(PROMPT_KEYS)}; not {row!r:.80}"
            )
        yield from turns


def _keys(record: Mapping[str, Any]) -> tuple[str, ...]:
    # A published pair has `messages` too, which only repeats `chosen`.
    return ("chosen", "rejected") if "chosen" in record else ("messages",)


def length_fault(
    record: Mapping[str, Any], max_chars: int = 0, min_answer_chars: int = 0, max_turns: int = 0
) -> str | None:
    """The limit that a record, or a dialogue of a pair, breaks, as a rule; 0 is no limit."""
    dialogues = [record[key] for key in _keys(record)]
    if 0 < max_chars < max(sum(len(turn["content"]) for turn in turns) for turns in dialogues):
        return "too_long"
    answers = [turn for turns in dialogues for turn in turns if turn["role"] == "assistant"]
    if any(len(answer["content"].strip()) < min_answer_chars for answer in answers):
        return "too_short_answer"
    if 0 < max_turns < max(sum(turn["role"] != "system" for turn in turns) for turns in dialogues):
        return "too_many_turns"
    return None


def contamination(
    record: Mapping[str, Any], contaminants: Contaminants, ngram: int = NGRAM
) -> list[str]:
    """Where a record meets a benchmark: file, shared words, place; empty if it does not."""
    index = _index(contaminants, ngram)
    for key in _keys(record) if contaminants else ():
        for number, turn in enumerate(record[key]):
            if match := _match(words(turn["content"]), index, whole=turn["role"] == "user"):
                return [match[0], " ".join(match[1]), f"{key}[{number}] ({turn['role']})"]
    return []


@functools.lru_cache(maxsize=4)
def _index(contaminants: Contaminants, ngram: int) -> dict[Run, dict[Run, str]]:
    """Runs that contaminate, or all words of a shorter prompt: by the first four, with files."""
    index: dict[Run, dict[Run, str]] = {}
    for file in contaminants:
        for text in (tuple(words(prompt)) for prompt in file.prompts):
            for at in range(max(1, len(text) - ngram + 1)):
                run = text[at : at + ngram]
                index.setdefault(run[:MIN_WORDS], {}).setdefault(run, file.name)
    return index


def _match(
    text: list[str], index: dict[Run, dict[Run, str]], whole: bool
) -> tuple[str, Run] | None:
    """The first run of words that a text shares with a benchmark, after the benchmark's file."""
    short = tuple(text) if whole and len(text) < MIN_WORDS else ()
    heads = [*zip(*(text[at:] for at in range(MIN_WORDS)), strict=False), short]
    if index.keys().isdisjoint(heads):  # nearly every text
        return None
    for at, head in enumerate(heads):
        for run, file in index.get(head, {}).items():
            if tuple(text[at : at + len(run)]) == run:
                return file, run
    return None


def signature(prompt: str) -> RMinHash:
    """The MinHash signature of a prompt's shingles; without words ("???") the text is one."""
    text = words(prompt) or [prompt.strip()]
    sketch = RMinHash(num_perm=HASHES, seed=1)
    sketch.update([" ".join(text[at : at + SHINGLE]) for at in range(max(1, len(text) - 4))])
    return sketch


def near_duplicates(signatures: Sequence[RMinHash]) -> Int64[np.ndarray, " N"]:
    """For each prompt the first kept one before it that it nearly equals, or -1 if it stays.

    Prompts are decided in their order; one that is similar to dropped prompts only stays. One that
    shares bands with 2,000 kept ones is not compared to later ones: the prompts of one template
    would cost the square of their number.
    """
    index = RMinHashLSH(SIMILARITY, HASHES, _BANDS)
    repeated = np.full(len(signatures), -1, np.int64)
    for row, sketch in enumerate(signatures):
        candidates = sorted(index.query(sketch))
        similar = (at for at in candidates if sketch.jaccard(signatures[at]) >= SIMILARITY)
        repeated[row] = next(similar, -1)
        if repeated[row] < 0 and len(candidates) < _CROWD:
            index.insert(row, sketch)
    return repeated
