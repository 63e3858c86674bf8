"""The words of texts: as strings, and as 64-bit codes that NumPy makes without them."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"[^\W_]+")
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
_BREAK = "\x80"  # between texts; a control character, in no word
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """The runs of letters and digits, in lower case and compatibility form (NFKC).

    >>> words("Don’t  has_close(elements, 2)!")
    ['don', 't', 'has', 'close', 'elements', '2']
    """
    if text.isascii():  # the same words, three times as fast
        return text.translate(_ASCII).split()
    return WORD.findall(_plain(text))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text.replace(_BREAK, " ")).lower()


class Words:
    """Several texts as one row of words, with a uint64 code for each word, all made by NumPy.

    A word's code is the polynomial of its characters at a fixed base, the difference of two
    prefix sums; so no string is made for the words of an innocent text. Between two texts stands
    a word that is in neither.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if all(map(str.isascii, texts)):
            self.flat = f" {f' {_BREAK} '.join(text.translate(_ASCII) for text in texts)} "
            points = np.frombuffer(self.flat.encode("latin-1"), np.uint8)
            inside = points != ord(" ")
        else:
            self.flat = f" {f' {_BREAK} '.join(map(_plain, texts))} "
            points = np.frombuffer(self.flat.encode("utf-32-le", "surrogatepass"), "<u4")
            inside = _word_characters()[points]
        edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1  # a blank stands at either end
        self.starts, self.stops = edges[::2], edges[1::2]
        powers, inverses = _powers(len(points).bit_length())
        sums = np.cumsum(points * powers[: len(points)])
        self.codes = (sums[self.stops - 1] - sums[self.starts - 1]) * inverses[self.starts]

    def __getitem__(self, run: slice) -> str:
        """The words of a slice with blanks between them."""
        spans = zip(self.starts[run].tolist(), self.stops[run].tolist(), strict=True)
        return " ".join(self.flat[start:stop] for start, stop in spans)

    def breaks(self) -> np.ndarray:
        """Where one text ends and the next begins, in words."""
        return np.flatnonzero(self.codes == ord(_BREAK))  # a lone character is its own code

    def runs(self, size: int) -> np.ndarray:
        """A uint64 for each run of `size` words [words - size + 1]."""
        places = max(0, len(self.codes) - size + 1)
        mixed = self.codes[:places]
        for offset in range(1, size):
            mixed = mixed * _FACTOR + self.codes[offset : offset + places]
        return mixed * _FACTOR


@functools.lru_cache(maxsize=1)
def _word_characters() -> np.ndarray:
    """Bool [code points]: what `WORD` takes for part of a word, and the break."""
    table = np.fromiter((chr(point).isalnum() for point in range(0x110000)), np.bool_, 0x110000)
    table[ord(_BREAK)] = True
    return table


@functools.lru_cache(maxsize=64)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 2^bits powers of the base, and of its inverse, modulo 2^64."""
    base = int(_FACTOR) ^ 0x5DEECE66C
    both = [np.full(1 << bits, value, np.uint64) for value in (base, pow(base, -1, 1 << 64))]
    for values in both:
        values[0] = 1
        np.cumprod(values, out=values)
    return both[0], both[1]
