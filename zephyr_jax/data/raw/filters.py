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
import gzip
import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
        ValueError: for a value that would drop every record, or is of the wrong type.
    """

    max_chars: int = 0
    min_answer_chars: int = 0
    max_turns: int = 0
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13

    def __post_init__(self) -> None:
        for name in ("max_chars", "min_answer_chars", "max_turns", "ngram"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 0")
        if self.ngram < 1:
            raise ValueError(f"ngram={self.ngram} must be at least 1 (13 is the usual number)")
        if self.max_turns == 1:
            raise ValueError("max_turns=1 leaves nothing: a question and its answer are 2 turns")
        if 0 < self.max_chars < self.min_answer_chars:
            raise ValueError(
                f"max_chars={self.max_chars} is below min_answer_chars={self.min_answer_chars}: "
                "no record could stay"
            )
        if not isinstance(self.decontaminate, tuple):
            raise ValueError(f"decontaminate={self.decontaminate!r} must be a tuple of file names")


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
        files = [
            {"name": file.name, "sha256": file.sha256, "prompts": len(file.prompts)}
            for file in self.files
        ]
        return {"ngram": self.ngram, "files": files}


def load_contaminants(paths: Sequence[str | Path], ngram: int = 13) -> Contaminants:
    """The prompts of benchmark files, in an order that does not depend on that of the paths.

    Files are `.jsonl` and `.json` (one object a line, or one list) with the prompt under one of
    `PROMPT_KEYS`, and `.txt` with one prompt a line, each also as `.gz`: MT-Bench's question.jsonl
    (every turn is a prompt), AlpacaEval's alpaca_eval.json, HumanEval.jsonl.gz and the like.

    Raises:
        FileNotFoundError: if a path is not a file.
        ValueError: for a file of another kind, a damaged file or line, a row without a prompt of
            at least one letter or digit, and a file without rows.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: `decontaminate` takes prompt files")
        stored = path.read_bytes()
        prompts = tuple(_prompts(path, stored))
        if not prompts:
            raise ValueError(f"{path} holds no prompt: is it the right file?")
        files.append(PromptFile(path.name, hashlib.sha256(stored).hexdigest(), prompts))
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
    answers = (
        turn["content"].strip()
        for turns in dialogues
        for turn in turns
        if turn["role"] == "assistant"
    )
    if filters.min_answer_chars and any(len(x) < filters.min_answer_chars for x in answers):
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
            text = words(turn["content"])
            run = tuple(text) if turn["role"] == "user" else ()
            file = index.whole.get(run)
            if file is None:
                file, run = _shared(text, index)
            if file is not None:
                return file, " ".join(run), f"{key}[{number}] ({turn['role']})"
    return None


def _keys(record: Mapping[str, Any]) -> tuple[str, ...]:
    # A published pair has `messages` too, which only repeats `chosen`.
    return ("chosen", "rejected") if "chosen" in record else ("messages",)


class _Index(NamedTuple):
    """The file names of the runs of words that contaminate a record.

    Each of `runs` begins with `head` words that are a key of `heads`, which gives the lengths of
    the runs that begin so. `whole` are the prompts that count only as a turn of the user.
    """

    head: int
    heads: dict[tuple[str, ...], set[int]]
    runs: dict[tuple[str, ...], str]
    whole: dict[tuple[str, ...], str]


@functools.lru_cache(maxsize=4)
def _index(contaminants: Contaminants) -> _Index:
    size = contaminants.ngram
    index = _Index(min(_MIN_WORDS, size), {}, {}, {})
    for file in contaminants.files:
        for text in (tuple(words(prompt)) for prompt in file.prompts):
            if len(text) < _MIN_WORDS:
                index.whole.setdefault(text, file.name)
                continue
            for run in (text[at : at + size] for at in range(max(1, len(text) - size + 1))):
                index.runs.setdefault(run, file.name)
                index.heads.setdefault(run[: index.head], set()).add(len(run))
    return index


def _shared(text: list[str], index: _Index) -> tuple[str | None, tuple[str, ...]]:
    """The file and the words of the first run that a text shares with a prompt."""
    shifted = [text[at:] for at in range(index.head)]
    if index.heads.keys().isdisjoint(zip(*shifted, strict=False)):  # nearly every text
        return None, ()
    for at, head in enumerate(zip(*shifted, strict=False)):
        for length in sorted(index.heads.get(head, ())):
            run = tuple(text[at : at + length])
            if run in index.runs:
                return index.runs[run], run
    return None, ()


def _prompts(path: Path, stored: bytes) -> Iterator[str]:
    """The prompts in a file: one a line of text, one or more an object of JSON."""
    for place, row in _rows(path, stored):
        keys = [key for key in PROMPT_KEYS if key in row] if isinstance(row, dict) else []
        if not keys:
            wanted = ", ".join(PROMPT_KEYS)
            raise ValueError(f"{place}: expected an object with one of {wanted}, not {row!r:.80}")
        turns = row[keys[0]] if isinstance(row[keys[0]], list) else [row[keys[0]]]
        if not turns or not all(isinstance(turn, str) and words(turn) for turn in turns):
            raise ValueError(
                f"{place}: {keys[0]!r} must be a text, or a list of texts, with letters or digits"
            )
        yield from turns


def _rows(path: Path, stored: bytes) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".json", ".txt"):
        raise ValueError(f"{path} must be .jsonl, .json or .txt, with or without .gz")
    try:
        text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf-8-sig")
        if kind != ".txt" and text.lstrip().startswith("["):
            rows = json.loads(text)
            yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))
            return
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from None
    for number, line in enumerate(text.split("\n"), 1):
        place, line = f"{path}:{number}", line.strip()
        try:
            if line:
                yield place, {"text": line} if kind == ".txt" else json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: broken JSON ({error})") from None
