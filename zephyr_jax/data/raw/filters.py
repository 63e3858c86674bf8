"""What leaves a cleaned record out, whatever its set: lengths, and the prompts of benchmarks.

A record is *contaminated* if one of its messages, of whatever role, shares 13 consecutive words
with a prompt of a benchmark, the n-gram rule of the GPT-3 paper (Brown et al. 2020, appendix C).
A prompt with fewer words counts where all of them occur in a row, as the Zephyr handbook looks
for whole HumanEval prompts in its training text; but one of fewer than four words ("Hi") only
where it is a whole turn of the user, or it would take half the corpus with it.

Words are runs of Unicode letters and digits in lower case (NFKC), so that punctuation, underscores
and layout make no difference, in prose or in code. A script without spaces has long words: a
Chinese sentence is found as a whole only.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import gzip
import hashlib
import json
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zephyr_jax.data.raw.schema import window
from zephyr_jax.data.raw.words import WORD, Words, words

PROMPT_KEYS = ("turns", "instruction", "prompt", "question", "text")  # the first one there counts
_SUFFIXES = (".jsonl", ".json", ".txt")
_MIN_WORDS = 4  # of a prompt that counts inside a message


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which records stay; 0 and () switch a rule off.

    Attributes:
        max_chars: of all messages of a record; of a pair, of the longer one of its two dialogues.
        min_answer_chars: of every answer of the assistant, blanks around it not counted.
        max_turns: messages, the system's not counted.
        decontaminate: files with prompts of benchmarks, see `load_contaminants`.
        ngram: how many consecutive words shared with such a prompt are too many.

    Raises:
        ValueError: for a value that no record or every record would pass or fail by mistake.
    """

    max_chars: int = 0
    min_answer_chars: int = 0
    max_turns: int = 0
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13

    def __post_init__(self) -> None:
        for name in ("max_chars", "min_answer_chars", "max_turns", "ngram"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 0")
        _check_ngram(self.ngram)
        if self.max_turns == 1:
            raise ValueError("max_turns=1 leaves nothing: a question and its answer are 2 turns")
        if 0 < self.max_chars < self.min_answer_chars:
            raise ValueError(
                f"max_chars={self.max_chars} is below min_answer_chars={self.min_answer_chars}: "
                "no record could stay"
            )
        files = self.decontaminate
        if not isinstance(files, tuple) or not all(
            path and isinstance(path, str) for path in files
        ):
            raise ValueError(f"decontaminate={files!r} must be a tuple of paths of prompt files")


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """The prompts of one benchmark file; its name and digest stand for them in comparisons."""

    name: str
    sha256: str
    prompts: tuple[str, ...] = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Contaminants:
    """Prompts that must not be trained on; each process that asks for them makes its own index."""

    ngram: int
    files: tuple[PromptFile, ...]

    def identity(self) -> dict[str, Any]:
        """What decides the outcome, as JSON holds it: the rule, and each file's name and digest."""
        files = [
            {"name": file.name, "sha256": file.sha256, "prompts": len(file.prompts)}
            for file in self.files
        ]
        return {"ngram": self.ngram, "files": files}


def load_contaminants(paths: Sequence[str | Path], ngram: int = 13) -> Contaminants:
    """The prompts of benchmark files, in an order that does not hang on that of the paths.

    Read are `.jsonl` and `.json` (one object a line, or one list) with the prompt under one of
    `PROMPT_KEYS`, and `.txt` with one prompt a line, each also as `.gz`: MT-Bench's question.jsonl
    (every turn is a prompt), AlpacaEval's alpaca_eval.json, HumanEval.jsonl.gz and their like.

    Raises:
        FileNotFoundError: if a path is no file.
        ValueError: for a file of another kind, a damaged file or line, a row without a prompt of
            at least one letter or digit, a file without rows, and an `ngram` below 1.
    """
    _check_ngram(ngram)
    files = [_read_prompt_file(Path(path)) for path in paths]
    return Contaminants(ngram, tuple(sorted(files, key=lambda file: (file.name, file.sha256))))


def why_dropped(
    record: Mapping[str, Any], filters: Filters, contaminants: Contaminants | None
) -> str | None:
    """The first rule that drops a chat or preference record, None if it stays.

    The rules in their order: `too_long`, `too_short_answer`, `too_many_turns`, `contaminated`.
    Without contaminants nothing is contaminated.

    >>> talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    >>> why_dropped({"messages": talk}, Filters(min_answer_chars=4), None)
    'too_short_answer'
    >>> why_dropped({"messages": talk}, Filters(max_chars=9, max_turns=2), None)
    """
    dialogues = _dialogues(record)
    if filters.max_chars:
        chars = max(sum(len(turn["content"]) for turn in turns) for _, turns in dialogues)
        if chars > filters.max_chars:
            return "too_long"
    if filters.min_answer_chars and any(
        len(turn["content"].strip()) < filters.min_answer_chars
        for _, turns in dialogues
        for turn in turns
        if turn["role"] == "assistant"
    ):
        return "too_short_answer"
    if filters.max_turns:
        spoken = max(sum(turn["role"] != "system" for turn in turns) for _, turns in dialogues)
        if spoken > filters.max_turns:
            return "too_many_turns"
    if contaminants is not None and _find(record, contaminants) is not None:
        return "contaminated"
    return None


def contamination(
    record: Mapping[str, Any], contaminants: Contaminants
) -> tuple[str, str, str] | None:
    """Where a record meets a benchmark, None if it does not.

    The name of the file, an excerpt of its prompt that begins with the shared words, and the
    place in the record, such as `messages[2] (user)`. Of a prompt that is in several files, the
    first of them by name counts.
    """
    found = _find(record, contaminants)
    if found is None:
        return None
    (file, prompt, word), place = found
    shown = contaminants.files[file]
    text = " ".join(unicodedata.normalize("NFKC", shown.prompts[prompt]).split())
    starts = [match.start() for match in WORD.finditer(text)]
    return shown.name, window(text, at=starts[min(word, len(starts) - 1)] + 40), place


def _check_ngram(ngram: int) -> None:
    if ngram < 1:
        raise ValueError(f"ngram={ngram} must be at least 1 (13 is the usual number of words)")


def _dialogues(record: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, str]]]]:
    """The dialogues of a record and their keys: one of a chat, two of a pair."""
    # A published pair has `messages` too, which only repeats `chosen`.
    keys = ("chosen", "rejected") if "chosen" in record else ("messages",)
    return [(key, record[key]) for key in keys]


def _messages(record: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, str]]]:
    """Key, index and message; what both dialogues of a pair begin with comes once."""
    first: Sequence[Mapping[str, str]] = ()
    for key, turns in _dialogues(record):
        for index, turn in enumerate(turns):
            if index >= len(first) or turn != first[index]:
                yield key, index, turn
        first = turns


_Source = tuple[int, int, int]  # file, prompt, the word of the prompt where the run begins


@dataclasses.dataclass(frozen=True)
class _Index:
    """What is looked for, and a table that rules out almost every place of a text at once.

    `runs` are the runs of words that contaminate; each begins with `head` words whose hash is in
    `heads`, which gives the lengths of the runs that begin so. `whole` are the prompts that only
    count as a turn of the user. `table[h >> shift]` is False if no head has the hash h.
    """

    runs: dict[str, _Source]
    whole: dict[str, _Source]
    heads: dict[int, tuple[int, ...]]
    head: int
    table: np.ndarray
    shift: np.uint64


@functools.lru_cache(maxsize=4)
def _index(contaminants: Contaminants) -> _Index:
    """Made once in a process."""
    length = contaminants.ngram
    head = min(_MIN_WORDS, length)
    runs: dict[str, _Source] = {}
    whole: dict[str, _Source] = {}
    lengths: dict[int, set[int]] = {}
    for file, prompts in enumerate(file.prompts for file in contaminants.files):
        for number, prompt in enumerate(prompts):
            text = words(prompt)
            if len(text) < _MIN_WORDS:
                whole.setdefault(" ".join(text), (file, number, 0))
                continue
            heads = Words([prompt]).runs(head).tolist()
            for at in range(max(1, len(text) - length + 1)):
                run = text[at : at + length]
                runs.setdefault(" ".join(run), (file, number, at))
                lengths.setdefault(heads[at], set()).add(len(run))
    # Large enough that a place of an innocent text is looked at once in 32 times at most.
    bits = (32 * len(lengths) + 255).bit_length()
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, np.bool_)
    table[np.array(list(lengths), np.uint64) >> shift] = True
    ordered = {key: tuple(sorted(value)) for key, value in lengths.items()}
    return _Index(runs, whole, ordered, head, table, shift)


def _find(record: Mapping[str, Any], contaminants: Contaminants) -> tuple[_Source, str] | None:
    """The first prompt that is in a record, and where in the record."""
    messages = list(_messages(record))
    if not contaminants.files or not messages:
        return None
    index = _index(contaminants)
    text = Words([turn["content"] for _, _, turn in messages])
    stops = [*text.breaks().tolist(), len(text.codes)]  # of the messages
    start = 0
    for (key, number, turn), stop in zip(messages, stops, strict=True):
        if stop - start < _MIN_WORDS and turn["role"] == "user" and index.whole:
            source = index.whole.get(text[start:stop])
            if source is not None:
                return source, f"{key}[{number}] (user)"
        start = stop + 1
    heads = text.runs(index.head)
    places = np.flatnonzero(index.table[heads >> index.shift])
    for at, found in zip(places.tolist(), heads[places].tolist(), strict=True):
        for length in index.heads.get(found, ()):
            source = index.runs.get(text[at : at + length])
            if source is not None:
                key, number, turn = messages[bisect.bisect(stops, at)]
                return source, f"{key}[{number}] ({turn['role']})"
    return None


def _read_prompt_file(path: Path) -> PromptFile:
    """The prompts of one file, all of them or an error."""
    plain = path.name.lower().removesuffix(".gz")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: `decontaminate` takes files with prompts")
    if not plain.endswith(_SUFFIXES):
        raise ValueError(f"{path} must be one of {', '.join(_SUFFIXES)}, with or without .gz")
    stored = path.read_bytes()
    try:
        content = gzip.decompress(stored) if path.name.lower().endswith(".gz") else stored
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; convert the file") from None
    prompts: list[str] = []
    if plain.endswith(".txt"):
        found = ((place, [line]) for place, line in _lines(path, text))
    else:
        found = ((place, _prompts_of(place, row)) for place, row in _json_rows(path, text))
    for place, texts in found:
        if not all(map(words, texts)):
            raise ValueError(f"{place}: a prompt without letters or digits; remove it")
        prompts += texts
    if not prompts:
        raise ValueError(f"{path} holds no prompt: is it the right file?")
    return PromptFile(path.name, hashlib.sha256(stored).hexdigest(), tuple(prompts))


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, and where each stands."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """The objects of a list, of lines, or the only one, and where each stands."""
    if text.lstrip().startswith("[") or ".jsonl" not in path.name.lower():
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # which is what one object a line looks like
                raise ValueError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))
            return
    for place, line in _lines(path, text):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: broken JSON ({error.msg})") from None
        yield place, row


def _prompts_of(place: str, row: object) -> list[str]:
    """The prompts of an object: one, or every turn of several."""
    keys = [key for key in PROMPT_KEYS if key in row] if isinstance(row, dict) else []
    if not isinstance(row, dict) or not keys:
        shown = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        wanted = ", ".join(PROMPT_KEYS)
        raise ValueError(f"{place}: an object with one of {wanted} is wanted, not {shown[:120]}")
    value = row[keys[0]]
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"{place}: {keys[0]!r} must be a text or a list of texts")
    return turns
