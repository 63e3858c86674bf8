"""Rules that drop a cleaned record of any set: lengths, and the prompts of benchmarks.

A record is *contaminated* if one of its messages, of whatever role, shares 13 consecutive words
with a prompt of a benchmark, the n-gram rule of the GPT-3 paper (Brown et al. 2020, appendix C).
A shorter prompt counts where all of its words occur in a row, as the Zephyr handbook looks for
whole HumanEval prompts in its training text; one of fewer than four words ("Hi") counts only as
a whole turn of the user, or it would drop half of the corpus.

Words are runs of Unicode letters and digits in lower case (NFKC), so punctuation, underscores
and layout make no difference, in prose or in code. A script without spaces has long words: a
Chinese sentence is matched as a whole only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.data.raw.readers import SUFFIXES, chunks_of, read_rows

PROMPT_KEYS = ("turns", "instruction", "prompt", "question", "text")  # the first one present counts
_MIN_WORDS = 4  # of a prompt that counts inside a message
_WORD = re.compile(r"[^\W_]+")
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))


def words(text: str) -> list[str]:
    """The runs of letters and digits, in lower case and compatibility form (NFKC).

    >>> words("Don’t  has_close(elements, 2)!")
    ['don', 't', 'has', 'close', 'elements', '2']
    """
    if text.isascii():  # the same words, three times as fast
        return text.translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which records stay; 0 and () switch a rule off.

    Attributes:
        max_chars: of all messages of a record; of a pair, of the longer one of its two dialogues.
        min_answer_chars: of every answer of the assistant, without surrounding blanks.
        max_turns: messages, the system message not counted.
        decontaminate: files with prompts of benchmarks, see `load_contaminants`.
        ngram: how many consecutive words shared with such a prompt are too many.

    Raises:
        ValueError: for a value that would drop every record.
    """

    max_chars: int = 0
    min_answer_chars: int = 0
    max_turns: int = 0
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13

    def __post_init__(self) -> None:
        least = {"max_chars": 0, "min_answer_chars": 0, "max_turns": 0, "ngram": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}")
        if self.max_turns == 1:
            raise ValueError("max_turns=1 leaves nothing: a question and its answer are 2 turns")


class PromptFile(NamedTuple):
    """A file of benchmark prompts: its name, the SHA-256 of its bytes, and the prompts."""

    name: str
    sha256: str
    prompts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Contaminants:
    """Prompts that must not be trained on; each process builds its own index of them."""

    ngram: int
    files: tuple[PromptFile, ...]

    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON: the rule, and each file's name and digest."""
        files = [file._asdict() | {"prompts": len(file.prompts)} for file in self.files]
        return {"ngram": self.ngram, "files": files}


def load_contaminants(paths: Sequence[str | Path], ngram: int = 13) -> Contaminants:
    """The prompts of benchmark files, in an order that does not depend on that of the paths.

    Rows of `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet` and of a list in `.json` have the prompt
    under one of `PROMPT_KEYS`; `.txt` has one prompt a line. Examples are MT-Bench's
    question.jsonl (every turn is a prompt), alpaca_eval.json and HumanEval.jsonl.gz.

    Raises:
        FileNotFoundError: if a path is not a file.
        ValueError: for a file of another kind, a damaged file, a row without a prompt of at least
            one letter or digit, and a file without rows.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: `decontaminate` takes prompt files")
        if not path.name.endswith((*SUFFIXES, ".json", ".txt")):
            raise ValueError(f"{path} must be one of {', '.join(SUFFIXES)}, .json or .txt")
        prompts = tuple(_prompts(path))
        if not prompts:
            raise ValueError(f"{path} holds no prompt: is it the right file?")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(PromptFile(path.name, digest, prompts))
    return Contaminants(ngram, tuple(sorted(files)))


def why_dropped(
    record: Mapping[str, Any], filters: Filters, contaminants: Contaminants | None
) -> str | None:
    """The first rule that drops a chat or preference record, None if it stays.

    The rules in their order: `too_long`, `too_short_answer`, `too_many_turns`, `contaminated`.

    >>> talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    >>> why_dropped({"messages": talk}, Filters(min_answer_chars=4), None)
    'too_short_answer'
    >>> why_dropped({"messages": talk}, Filters(max_chars=9, max_turns=2), None)
    """
    dialogues = [record[key] for key in _keys(record)]
    chars = max(sum(len(turn["content"]) for turn in turns) for turns in dialogues)
    if 0 < filters.max_chars < chars:
        return "too_long"
    messages = [turn for turns in dialogues for turn in turns]
    answers = (turn["content"].strip() for turn in messages if turn["role"] == "assistant")
    if any(len(answer) < filters.min_answer_chars for answer in answers):
        return "too_short_answer"
    spoken = max(sum(turn["role"] != "system" for turn in turns) for turns in dialogues)
    if 0 < filters.max_turns < spoken:
        return "too_many_turns"
    if contaminants is not None and contamination(record, contaminants):
        return "contaminated"
    return None


def contamination(
    record: Mapping[str, Any], contaminants: Contaminants
) -> tuple[str, str, str] | None:
    """Where a record meets a benchmark, None if it does not.

    Returns the name of the file, the shared words, and the place in the record, such as
    `messages[2] (user)`. Of words that are in several files, the first file by name counts.
    """
    index = _index(contaminants)
    for key in _keys(record):
        for number, turn in enumerate(record[key]):
            match = _match(words(turn["content"]), index, whole=turn["role"] == "user")
            if match is not None:
                file, run = match
                return file, " ".join(run), f"{key}[{number}] ({turn['role']})"
    return None


def _keys(record: Mapping[str, Any]) -> tuple[str, ...]:
    # A published pair has `messages` too, which only repeats `chosen`.
    return ("chosen", "rejected") if "chosen" in record else ("messages",)


_Run = tuple[str, tuple[str, ...]]  # a benchmark's file, and words of one of its prompts


class _Index(NamedTuple):
    """The runs of words that contaminate a record, by their first `head` words.

    `whole` are the prompts that count only as a turn of the user.
    """

    head: int
    runs: dict[tuple[str, ...], dict[tuple[str, ...], str]]
    whole: dict[tuple[str, ...], str]


@functools.lru_cache(maxsize=4)
def _index(contaminants: Contaminants) -> _Index:
    size = contaminants.ngram
    index = _Index(min(_MIN_WORDS, size), {}, {})
    for file in contaminants.files:
        for text in (tuple(words(prompt)) for prompt in file.prompts):
            if len(text) < _MIN_WORDS:
                index.whole.setdefault(text, file.name)
                continue
            for run in (text[at : at + size] for at in range(max(1, len(text) - size + 1))):
                index.runs.setdefault(run[: index.head], {}).setdefault(run, file.name)
    return index


def _match(text: list[str], index: _Index, whole: bool) -> _Run | None:
    """The first run of words that a text shares with a benchmark."""
    if whole and (file := index.whole.get(tuple(text))):
        return file, tuple(text)
    shifted = [text[at:] for at in range(index.head)]
    if index.runs.keys().isdisjoint(zip(*shifted, strict=False)):  # nearly every text
        return None
    for at, head in enumerate(zip(*shifted, strict=False)):
        for run, file in index.runs.get(head, {}).items():
            if tuple(text[at : at + len(run)]) == run:
                return file, run
    return None


def _prompts(path: Path) -> Iterator[str]:
    """The prompts in a file: one a line of text, one or more a row."""
    rows: Any
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text("utf-8-sig"))
        elif path.suffix == ".txt":
            lines = path.read_text("utf-8-sig").split("\n")
            rows = [{"text": line.strip()} for line in lines if line.strip()]
        else:
            rows = [row for chunk in chunks_of(path) for row in read_rows(chunk) if row is not None]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from None
    for number, row in enumerate(rows, 1):
        fields = row if isinstance(row, dict) else {}
        value = next((fields[key] for key in PROMPT_KEYS if key in fields), None)
        turns: list[Any] = value if isinstance(value, list) else [value]
        if not turns or not all(isinstance(turn, str) and words(turn) for turn in turns):
            raise ValueError(
                f"{path}, row {number}: expected a text with letters or digits, or a list of them, "
                f"under one of {', '.join(PROMPT_KEYS)}; not {row!r:.80}"
            )
        yield from turns
