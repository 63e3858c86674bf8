"""The Markdown of the project taken apart: pages, fenced blocks, links, headings, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^( *)(```+|~~~+)([\w+-]*)\s*$")
_BLOCK = re.compile(r"^( *)(```+|~~~+).*?\n(.*\n)*?\1\2 *$", re.M)
_MARK = re.compile(r"^ *<!-- (setup|run|not run)(?:: (.+?))? -->$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_SNIPPET = re.compile(r'^--8<-- "(.+)"$')


class Block(NamedTuple):
    """A fenced block: its language ("" for none), and the comment right above it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str  # "setup", "run", "not run" or ""
    argument: str  # what stands behind the mark

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    found = [*ROOT.glob("*.md")]
    for folder in ("docs", "zephyr_jax", "benchmarks", "notebooks"):
        found += (ROOT / folder).rglob("*.md")
    return sorted(found)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    result, opened, lines, mark = [], None, [], ("", "")
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if marked := _MARK.match(line):
                mark = marked[1], marked[2] or ""
            elif fence:
                opened, lines = (number, fence), []
            elif line.strip():
                mark = ("", "")
        elif fence and fence[2] == opened[1][2] and not fence[3]:
            text = "".join(f"{one[len(opened[1][1]) :]}\n" for one in lines)
            result.append(Block(page, opened[0], opened[1][3], text, *mark))
            opened, mark = None, ("", "")
        else:
            lines.append(line)
    assert opened is None, f"{page}:{opened[0]} is a block without an end"
    return result


def prose(page: Path) -> str:
    """A page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "``", _BLOCK.sub("", page.read_text("utf-8")))


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: headings that GitHub and MkDocs spell the same way."""
    text = _BLOCK.sub("", page.read_text("utf-8"))
    result = set(re.findall(r"^::: (.+)$", text, re.M))  # names of the reference
    seen = set()
    for words, own in re.findall(r"^#+ (.+?)(?: \{#([\w-]+)\})?$", text, re.M):
        words = re.sub(r"[`*]", "", words)
        github = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
        if own or (github == mkdocs and github not in seen):
            result.add(own or github)
        seen.add(github)
    return result


def included(page: Path) -> list[str]:
    """What a page takes from other files: `FILE` or `FILE:SECTION`."""
    return [found[1] for line in page.read_text().splitlines() if (found := _SNIPPET.match(line))]


def commands(block: Block) -> list[list[str]]:
    """The words of every command line of a shell block; lines that go on with a backslash joined.

    Left out are lines that use the shell's own variables, `"${train[@]}"` and the like: what they
    stand for is not known before they run.
    """
    found = []
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", block.text, flags=re.DOTALL)  # given to stdin
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip() and "${" not in line:
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an array or a string over several lines
                continue
            found += _apart(words)
    return found


def _apart(words: list[str]) -> list[list[str]]:
    """A line's commands, at `&&`, `;`, `|` and `&`, without what goes to files."""
    found: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "|", "&", ">", ">>"):
            found.append([] if word[0] != ">" else ["cat"])
        else:
            found[-1].append(word)
    return [command for command in found if command]
